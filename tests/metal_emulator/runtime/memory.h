// The emulated GPU's memory: buffers and threadgroup variables in one arena, far apart, so that an address says which
// one it belongs to and an access past an end does not reach the next.
#pragma once
#include <cstddef>
#include <string>
#include <vector>

enum class Space { kConstant, kInput, kOutput, kThreadgroup };

struct Region {
  std::string name;
  Space space;
  char* start;
  size_t bytes;
  size_t granule;       // size of an element
  bool initialized;
  int id;               // of a threadgroup variable: its number in the kernel

  bool contains(const char* address) const { return address >= start && address < start + bytes; }
  bool read_only() const { return space == Space::kConstant || space == Space::kInput; }
  // "element 12 of out" for messages; the address may lie outside.
  std::string element(const char* address) const;
  // "out (device)" or "tile (threadgroup)"
  std::string label() const;
};

// Reserves address space for `bytes` of regions; called once before the first allocation.
void reserve_arena(size_t bytes, size_t regions);

// A new region, 4096-byte aligned, its memory filled with 0xFF: NaN in every float type.
Region* allocate_region(const std::string& name, Space space, size_t bytes, size_t granule);

bool in_arena(const char* address);
Region* find_region(const char* address);
Region* nearest_region(const char* address);
const std::vector<Region*>& all_regions();
