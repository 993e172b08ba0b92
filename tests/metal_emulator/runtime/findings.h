// What the runtime found wrong with a kernel, each finding once with the number of times it happened.
#pragma once
#include <cstdint>
#include <functional>
#include <string>

#include "interface.h"

// Where it happened: an address in the compiled kernel (named by llvm-symbolizer afterwards) or a known source line.
struct Place {
  uintptr_t pc = 0;
  const char* file = nullptr;
  int line = 0;

  static Place at(uintptr_t pc) { return {pc, nullptr, 0}; }
  static Place at(MslSite site) { return {site.pc, site.file, site.line}; }
};

struct Report {
  const char* kind;             // one of the kinds in findings.py; a literal, compared by address
  const void* subject = nullptr;  // what it is about (a region): part of what makes two findings the same
  Place place = {};
  uintptr_t other_pc = 0;       // the other access of a race
};

// Counts the finding; `message` is called for the first of its kind, subject and place only.
void report(const Report& finding, const std::function<std::string()>& message);

// All findings as a JSON array.
std::string findings_as_json();
