// What a translated kernel and the runtime know of each other: the thread's place in the grid and the calls a kernel makes.
// Included by both sides; contains no MSL.
#pragma once
#include <cstddef>
#include <cstdint>

// The values of MSL's thread attributes for one thread ([[thread_position_in_grid]] and so on).
struct MslThread {
  uint32_t position_in_grid[3];
  uint32_t position_in_threadgroup[3];
  uint32_t threadgroup_position[3];
  uint32_t threads_per_threadgroup[3];           // of this threadgroup: smaller at the grid's edge
  uint32_t dispatch_threads_per_threadgroup[3];  // as launched
  uint32_t threads_per_grid[3];
  uint32_t threadgroups_per_grid[3];
  uint32_t index;      // thread_index_in_threadgroup
  uint32_t lane;       // thread_index_in_simdgroup
  uint32_t simdgroup;  // simdgroup_index_in_threadgroup
  uint32_t simdgroups; // simdgroups_per_threadgroup
};

// The place that a barrier or simdgroup function was called from. The source position tells calls apart (the compiler may
// copy one call to several addresses); the address leads through inlined helpers to the kernel's own line.
struct MslSite {
  const char* file;
  int line;
  int column;
  uintptr_t pc;
};

constexpr int kLanes = 32;      // threads of a simdgroup, on every Apple GPU so far
constexpr int kSlotBytes = 32;  // room for one lane's value in an exchange

// The values that the lanes of a simdgroup published, and which lanes did.
struct MslExchange {
  const char* slots;  // kLanes × kSlotBytes
  uint32_t lanes;     // bit i: lane i took part
};

extern "C" {
// The kernel, written by translate.py: buffers as numbered in the signature.
void msl_entry(void** buffers, const MslThread* thread);

void msl_threadgroup_barrier(int flags, MslSite site);
void msl_simdgroup_barrier(int flags, MslSite site);
MslExchange msl_exchange(const void* value, int bytes, MslSite site);
void msl_inactive_lane(int lane, MslSite site);
int msl_lane();

// Storage of one threadgroup variable; `granule` is the size of its smallest element.
void* msl_threadgroup_variable(const char* name, int id, size_t bytes, size_t granule);

// Everything between these two is one atomic access to memory.
void msl_atomic_begin();
void msl_atomic_end();

// Inserted by counting.py into the compiled kernel, once per basic block that computes something.
void msl_count(int flops, int special);

// Math functions that a GPU has as one instruction: kept as calls so that they are counted as such.
__attribute__((const)) float msl_rsqrt(float x);
}
