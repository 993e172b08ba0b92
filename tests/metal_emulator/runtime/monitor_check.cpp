// Mode "check": races, bounds, uninitialized reads, writes to inputs, alignment.
//
// Every element that a kernel may write has a cell that remembers its last write and two reads. Two accesses are ordered
// when a barrier that covers the memory stood between them; that is decided by counting barriers, not by watching in
// which order the lanes happened to run, so a race is found in every order.
#include <algorithm>
#include <cstring>
#include <optional>
#include <unordered_map>
#include <vector>

#include "findings.h"
#include "monitor.h"

extern "C" char __executable_start, _end;  // set by the linker

namespace {
// One access, with what is needed to tell whether another one is ordered after it.
struct Access {
  uint32_t group = 0;  // serial number of the threadgroup; 0: no access
  uint32_t epoch = 0;  // barriers of the threadgroup that cover this memory, passed before it
  uint32_t simdgroup_epoch = 0;
  uint32_t barriers = 0;  // barriers passed, whatever they cover
  uint32_t pc = 0;        // the executable is linked at a fixed address below 4 GB
  uint16_t lane = 0;      // thread_index_in_threadgroup
  bool atomic = false;

  uint32_t simdgroup() const { return lane / kLanes; }
};

struct Cell {
  Access write, reads[2];
  bool initialized = false;
};

struct Shadow {
  size_t granule;  // bytes per cell: an element, or one byte after the first access to part of an element
  std::vector<Cell> cells;
};

// A write to what another lane wrote: harmless if it leaves the value as it was, known only after the store.
struct PendingWrite {
  const char* address = nullptr;
  size_t bytes = 0;
  char before[16];
  Region* region = nullptr;
  Access now, earlier;
};

std::unordered_map<const Region*, Shadow> shadows;
Region* last_region;
PendingWrite pending;
bool in_atomic;

Region* region_of(const char* address) {
  if (last_region && last_region->contains(address)) return last_region;
  Region* region = find_region(address);
  if (region) last_region = region;
  return region;
}

bool ordered(const Access& earlier, const Access& later) {
  if (!earlier.group) return true;
  if (earlier.group != later.group) return false;
  if (earlier.lane == later.lane || earlier.epoch != later.epoch) return true;
  return earlier.simdgroup() == later.simdgroup() && earlier.simdgroup_epoch != later.simdgroup_epoch;
}

bool conflict(const Access& earlier, const Access& later) {
  return !ordered(earlier, later) && !(earlier.atomic && later.atomic);
}

std::string who(const Access& access) { return "thread " + std::to_string(access.lane); }

void report_race(const char* kind, const char* what, Region* region, const char* address, const Access& earlier,
                 const Access& later) {
  report({kind, region, Place::at(later.pc), earlier.pc}, [&] {
    std::string text = std::string(what) + " on " + region->label() + ": " + region->element(address) + ", " +
                       who(later) + " after " + who(earlier);
    if (earlier.group != later.group) return text + " of another threadgroup";
    if (earlier.barriers != later.barriers)
      return text + ": the barrier between them does not cover this memory (see its mem_flags)";
    return text + ", no barrier between them";
  });
}

void settle_pending_write() {
  if (!pending.address) return;
  bool same = memcmp(pending.before, pending.address, pending.bytes) == 0;
  report_race(same ? "same-value race" : "race", same ? "two writes of the same value" : "two writes", pending.region,
              pending.address, pending.earlier, pending.now);
  pending.address = nullptr;
}

void remember_write(Region* region, const char* address, size_t bytes, const Access& earlier, const Access& now) {
  if (bytes > sizeof pending.before) {
    report_race("race", "two writes", region, address, earlier, now);
    return;
  }
  pending.address = address;
  pending.bytes = bytes;
  memcpy(pending.before, address, bytes);
  pending.region = region;
  pending.earlier = earlier;
  pending.now = now;
}

// Keeps, of all reads, two that between them conflict with every write that would conflict with any of them:
// from different threadgroups if there are such, else from different simdgroups, else from different lanes.
void remember_read(Cell& cell, const Access& now) {
  for (Access& read : cell.reads) {
    if (!read.group || (read.group == now.group && ordered(read, now))) {
      read = now;
      return;
    }
  }
  auto& [a, b] = cell.reads;
  if (a.group != b.group) return;
  if (now.group != a.group || (a.simdgroup() == b.simdgroup() && now.simdgroup() != a.simdgroup())) b = now;
}

void split_cells(Shadow& shadow) {
  std::vector<Cell> cells;
  cells.reserve(shadow.cells.size() * shadow.granule);
  for (const Cell& cell : shadow.cells) cells.insert(cells.end(), shadow.granule, cell);
  shadow.cells = std::move(cells);
  shadow.granule = 1;
}

Shadow fresh_shadow(const Region* region) {
  // An output whose size is no multiple of its element would be a mistake of the job file.
  size_t granule = region->bytes % region->granule ? 1 : region->granule;
  Shadow shadow{granule, std::vector<Cell>(region->bytes / granule)};
  if (region->initialized)
    for (Cell& cell : shadow.cells) cell.initialized = true;
  return shadow;
}

void check_cells(Region* region, const char* address, size_t bytes, bool write, const Access& now) {
  Shadow& shadow = shadows[region];
  size_t offset = static_cast<size_t>(address - region->start);
  if (offset % shadow.granule || bytes % shadow.granule) split_cells(shadow);
  std::optional<Access> other_write;
  for (size_t i = offset / shadow.granule; i < (offset + bytes) / shadow.granule; ++i) {
    Cell& cell = shadow.cells[i];
    const char* element = region->start + i * shadow.granule;
    if (!write && !cell.initialized) {
      cell.initialized = true;  // one finding per element
      report({"uninitialized read", region, Place::at(now.pc)},
             [&] { return "read of " + region->element(element) + ", which nothing has written"; });
    }
    if (conflict(cell.write, now)) {
      if (write) {
        other_write = cell.write;
      } else {
        report_race("race", "read after write", region, element, cell.write, now);
      }
    }
    if (!write) {
      remember_read(cell, now);
      continue;
    }
    for (const Access& read : cell.reads)
      if (conflict(read, now)) report_race("race", "write after read", region, element, read, now);
    cell.write = now;
    cell.initialized = true;
  }
  if (other_write) remember_write(region, address, bytes, *other_write, now);
}

void report_outside(const char* address, bool write, uintptr_t pc) {
  Region* region = nearest_region(address);
  report({"out of bounds", region, Place::at(pc)}, [&] {
    return std::string(write ? "write" : "read") + " of " + (region ? region->element(address) : "no buffer") +
           (region ? ", which has " + std::to_string(region->bytes / region->granule) : "");
  });
}
}  // namespace

namespace monitor {
bool single_worker() { return true; }

void buffer_added(Region* region) {
  if (!region->read_only()) shadows[region] = fresh_shadow(region);
}

void threadgroup_variable(Region* region) { shadows[region] = fresh_shadow(region); }
void lane_switches() { settle_pending_write(); }
void group_ends(const Worker&) { settle_pending_write(); }
void atomic_begins() { in_atomic = true; }
void atomic_ends() { in_atomic = false; }
void arithmetic(int, int) {}
void simdgroup_operation() {}

void access(const char* address, size_t bytes, bool write, bool known_alignment, uintptr_t pc) {
  settle_pending_write();
  Worker* worker = current_worker();
  if (!worker) return;
  const Lane& lane = worker->lane();
  if (lane.fiber.owns(address)) return;
  if (!in_arena(address)) {
    for (const Lane& other : worker->lanes) {
      if (!other.fiber.owns(address)) continue;
      report({"out of bounds", nullptr, Place::at(pc)}, [&] { return "access to another thread's private memory"; });
      return;
    }
    bool constant_data = address >= &__executable_start && address < &_end;
    if (!constant_data) report_outside(address, write, pc);
    return;
  }
  Region* region = region_of(address);
  if (!region || !region->contains(address + bytes - 1)) {
    report_outside(region ? address + bytes - 1 : address, write, pc);
    return;
  }
  if (known_alignment && reinterpret_cast<uintptr_t>(address) % bytes) {
    report({"misaligned", region, Place::at(pc)}, [&] {
      return "access of " + std::to_string(bytes) + " bytes at byte " + std::to_string(address - region->start) +
             " of " + region->label() + ", not a multiple of its size";
    });
  }
  if (region->read_only()) {
    if (write) {
      report({"write to input", region, Place::at(pc)},
             [&] { return "write to " + region->element(address) + ", an input"; });
    }
    return;
  }
  bool tile = region->space == Space::kThreadgroup;
  const Epochs& group = worker->epochs;
  const Epochs& simdgroup = worker->simdgroups[lane.thread.simdgroup].epochs;
  Access now;
  now.group = worker->group;
  now.epoch = tile ? group.threadgroup_memory : group.device_memory;
  now.simdgroup_epoch = tile ? simdgroup.threadgroup_memory : simdgroup.device_memory;
  now.barriers = group.barriers + simdgroup.barriers;
  now.pc = static_cast<uint32_t>(pc);
  now.lane = static_cast<uint16_t>(lane.thread.index);
  now.atomic = in_atomic;
  check_cells(region, address, bytes, write, now);
}

std::string finish() {
  for (Region* region : all_regions()) {
    if (region->space != Space::kOutput) continue;
    const Shadow& shadow = shadows[region];
    size_t missing = 0, first = 0;
    for (size_t i = shadow.cells.size(); i-- > 0;) {
      if (shadow.cells[i].initialized) continue;
      missing++;
      first = i;
    }
    if (!missing) continue;
    report({"unwritten output", region}, [&] {
      return std::to_string(missing * shadow.granule / region->granule) + " of " +
             std::to_string(region->bytes / region->granule) + " elements of " + region->name +
             " were never written, the first is " + region->element(region->start + first * shadow.granule);
    });
  }
  return "null";
}
}  // namespace monitor
