// Collects findings. Workers report at the same time, so one lock guards the table.
#include "findings.h"

#include <map>
#include <mutex>
#include <tuple>

namespace {
using Key = std::tuple<const char*, const void*, uintptr_t, int, uintptr_t>;
struct Found {
  Report report;
  std::string message;
  long count;
};
std::map<Key, Found> table;
std::mutex lock;

std::string quoted(const std::string& text) {
  std::string out = "\"";
  for (char c : text) {
    if (c == '"' || c == '\\') out += '\\';
    out += c == '\n' ? ' ' : c;
  }
  return out + "\"";
}
}  // namespace

void report(const Report& finding, const std::function<std::string()>& message) {
  std::lock_guard<std::mutex> guard(lock);
  Key key{finding.kind, finding.subject, finding.place.pc, finding.place.line, finding.other_pc};
  auto found = table.find(key);
  if (found != table.end()) {
    found->second.count++;
    return;
  }
  table.emplace(key, Found{finding, message(), 1});
}

std::string findings_as_json() {
  std::lock_guard<std::mutex> guard(lock);
  std::string out = "[";
  for (const auto& [key, found] : table) {
    const Report& r = found.report;
    if (out.size() > 1) out += ",\n ";
    out += "{\"kind\": " + quoted(r.kind) + ", \"message\": " + quoted(found.message) +
           ", \"pc\": " + std::to_string(r.place.pc) + ", \"other_pc\": " + std::to_string(r.other_pc) +
           ", \"file\": " + quoted(r.place.file ? r.place.file : "") + ", \"line\": " + std::to_string(r.place.line) +
           ", \"count\": " + std::to_string(found.count) + "}";
  }
  return out + "]";
}
