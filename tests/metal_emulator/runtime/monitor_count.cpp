// Mode "count": how often and how much memory a kernel reads and writes, and what it computes.
#include <unordered_map>
#include <vector>

#include "monitor.h"

namespace {
// One direction (reads or writes) of one kind of memory.
struct Traffic {
  long accesses = 0;
  long bytes = 0;
  long unique_bytes = 0;     // each byte once per launch
  long per_group_bytes = 0;  // each byte once per threadgroup that touches it
};

// The last threadgroup that read and wrote each byte of a buffer; 0: none yet.
struct Touched {
  std::vector<uint32_t> reader, writer;
};

Traffic device[2], constant_reads, threadgroup[2];  // [0] reads, [1] writes
long flops, special, simdgroup_operations;
std::unordered_map<const Region*, Touched> touched;
Region* last_region;

Region* region_of(const char* address) {
  if (last_region && last_region->contains(address)) return last_region;
  Region* region = find_region(address);
  if (region) last_region = region;
  return region;
}

void touch(Traffic& traffic, std::vector<uint32_t>& last_group, size_t offset, size_t bytes, uint32_t group) {
  for (size_t i = offset; i < offset + bytes; ++i) {
    if (last_group[i] == group) continue;
    if (!last_group[i]) traffic.unique_bytes++;
    traffic.per_group_bytes++;
    last_group[i] = group;
  }
}

std::string field(const std::string& name, long value) { return "\"" + name + "\": " + std::to_string(value); }

std::string fields(const std::string& name, const Traffic& traffic) {
  return field(name + "_accesses", traffic.accesses) + ", " + field(name + "_bytes", traffic.bytes) + ", " +
         field(name + "_unique_bytes", traffic.unique_bytes) + ", " +
         field(name + "_per_group_bytes", traffic.per_group_bytes);
}
}  // namespace

namespace monitor {
bool single_worker() { return true; }

void buffer_added(Region* region) {
  touched[region] = {std::vector<uint32_t>(region->bytes), std::vector<uint32_t>(region->bytes)};
}

void threadgroup_variable(Region*) {}
void lane_switches() {}
void group_ends(const Worker&) {}
void atomic_begins() {}
void atomic_ends() {}

void access(const char* address, size_t bytes, bool write, bool, uintptr_t) {
  Worker* worker = current_worker();
  if (!worker || !in_arena(address)) return;
  Region* region = region_of(address);
  if (!region || !region->contains(address + bytes - 1)) return;  // out of bounds: mode "check" says where
  if (region->space == Space::kThreadgroup) {
    threadgroup[write].accesses++;
    threadgroup[write].bytes += static_cast<long>(bytes);
    return;
  }
  Traffic& traffic = region->space == Space::kConstant ? constant_reads : device[write];
  traffic.accesses++;
  traffic.bytes += static_cast<long>(bytes);
  Touched& seen = touched[region];
  touch(traffic, write ? seen.writer : seen.reader, static_cast<size_t>(address - region->start), bytes, worker->group);
}

void arithmetic(int more_flops, int more_special) {
  flops += more_flops;
  special += more_special;
}

void simdgroup_operation() { simdgroup_operations++; }

std::string finish() {
  return "{" + fields("device_read", device[0]) + ", " + fields("device_write", device[1]) + ", " +
         fields("constant_read", constant_reads) + ", " + fields("threadgroup_read", threadgroup[0]) + ", " +
         fields("threadgroup_write", threadgroup[1]) + ", " + field("flops", flops) + ", " + field("special", special) +
         ", " + field("simdgroup_operations", simdgroup_operations) + "}";
}
}  // namespace monitor
