// The emulated GPU: lanes (threads), simdgroups and the worker that runs one threadgroup at a time.
#pragma once
#include <cstdint>
#include <map>
#include <random>
#include <vector>

#include "fiber.h"
#include "interface.h"
#include "memory.h"

enum class LaneState { kReady, kAtThreadgroupBarrier, kAtSimdgroup, kDone };

struct Lane {
  Fiber fiber;
  MslThread thread;
  LaneState state;
  MslSite site;         // where it waits
  uint32_t exchanged;   // lanes that took part in its last exchange
};

// What orders memory accesses: barriers passed so far, those that cover threadgroup memory, those that cover device memory.
struct Epochs {
  uint32_t barriers = 0;
  uint32_t threadgroup_memory = 0;
  uint32_t device_memory = 0;

  void pass(int flags);
};

struct Simdgroup {
  char slots[2][kLanes * kSlotBytes];  // two: a fast lane may publish its next value while a slow one still reads
  uint32_t exchanges;
  int first;    // its lane 0 among the threadgroup's threads
  int count;    // lanes it has
  int live;     // lanes that have not returned
  int waiting;
  Epochs epochs;
};

struct Worker {
  std::vector<Lane> lanes;
  std::vector<Simdgroup> simdgroups;
  int threads = 0;   // of the current threadgroup
  int live = 0;      // of those, not returned
  int at_barrier = 0;
  int current = -1;  // lane that runs
  uint32_t group = 0;  // serial number of the current threadgroup, from 1
  Epochs epochs;
  long barriers = 0;  // threadgroup barriers executed, over all threadgroups
  std::vector<int> ready, next_ready;
  std::map<int, Region*> variables;  // threadgroup variables by number
  std::vector<int> live_variables;   // those the current threadgroup has reached
  size_t threadgroup_bytes = 0;
  size_t most_threadgroup_bytes = 0;
  void* scheduler_stack = nullptr;
  void** buffers = nullptr;
  std::mt19937 random;

  Lane& lane() { return lanes[current]; }
};

enum class Order { kForward = 0, kReversed = 1, kSeeded = 2 };

struct Launch {
  uint32_t grid[3];
  uint32_t threadgroup[3];
  Order order;
  uint32_t seed;
  uint32_t workers;
  uint32_t threadgroup_memory_limit;

  uint32_t groups(int axis) const { return (grid[axis] + threadgroup[axis] - 1) / threadgroup[axis]; }
};

struct Totals {
  long barriers = 0;
  long threadgroups = 0;
  size_t threadgroup_bytes = 0;
};

// The worker of this OS thread; null outside a kernel.
Worker* current_worker();

// Runs every threadgroup of the launch.
Totals run_launch(const Launch& launch, void** buffers);
