// The hooks through which a run is watched. One of monitor_none.cpp, monitor_check.cpp and monitor_count.cpp is linked.
// The kernel is compiled with -fsanitize=thread but without its runtime: the compiler then calls __tsan_read4(address)
// and so on before every access to memory, and those calls end in monitor::access (access_hooks.cpp).
#pragma once
#include <cstddef>
#include <cstdint>
#include <string>

#include "machine.h"
#include "memory.h"

namespace monitor {
// Whether regions need one worker at a time (the watching monitors keep state per access).
bool single_worker();

void buffer_added(Region* region);
// A threadgroup variable comes to life for the worker's current threadgroup; its content is undefined.
void threadgroup_variable(Region* region);

// The lane running on this worker stops for another one, or ends.
void lane_switches();
void group_ends(const Worker& worker);

// `known_alignment`: the kernel claims that the address is a multiple of `bytes`.
void access(const char* address, size_t bytes, bool write, bool known_alignment, uintptr_t pc);
void atomic_begins();
void atomic_ends();
void arithmetic(int flops, int special);
void simdgroup_operation();

// After the last threadgroup: a JSON object of counts, or "null".
std::string finish();
}  // namespace monitor
