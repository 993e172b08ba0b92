// Runs threadgroups: every GPU thread is a fiber that runs until it waits (barrier, simdgroup function) or returns.
// Nothing here depends on time, so a run with the same order and seed is the same run.
#include <algorithm>
#include <atomic>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <string>
#include <thread>

#include "findings.h"
#include "machine.h"
#include "monitor.h"

namespace {
constexpr int kDeviceMemory = 1, kThreadgroupMemory = 2;  // bits of MSL's mem_flags, as in shim/synchronization.h
constexpr uint32_t kMostThreads = 1024;

thread_local Worker* worker_of_this_thread = nullptr;
Launch launch;
std::atomic_flag atomic_access = ATOMIC_FLAG_INIT;

uintptr_t call_before(void* return_address) { return reinterpret_cast<uintptr_t>(return_address) - 1; }

std::string of(int part, int whole) { return std::to_string(part) + " of " + std::to_string(whole); }

bool same_site(const MslSite& a, const MslSite& b) {
  return a.line == b.line && a.column == b.column && strcmp(a.file, b.file) == 0;
}

void back_to_scheduler() {
  Worker* worker = worker_of_this_thread;
  monitor::lane_switches();
  msl_switch_stack(&worker->lane().fiber.stack_pointer, worker->scheduler_stack);
}

void make_ready(Worker& worker, int index) {
  worker.lanes[index].state = LaneState::kReady;
  worker.next_ready.push_back(index);
}

void lane_main() {
  Worker* worker = worker_of_this_thread;
  msl_entry(worker->buffers, &worker->lane().thread);
  Lane& lane = worker->lane();
  lane.state = LaneState::kDone;
  worker->live--;
  worker->simdgroups[lane.thread.simdgroup].live--;
  back_to_scheduler();
  abort();  // a lane that is done is never resumed
}

// ---- simdgroups

uint32_t waiting_lanes(const Worker& worker, const Simdgroup& group) {
  uint32_t lanes = 0;
  for (int i = 0; i < group.count; ++i)
    if (worker.lanes[group.first + i].state == LaneState::kAtSimdgroup) lanes |= 1u << i;
  return lanes;
}

void check_same_call(Worker& worker, const Simdgroup& group, uint32_t lanes, MslSite site) {
  for (int i = 0; i < group.count; ++i) {
    const Lane& other = worker.lanes[group.first + i];
    if (!(lanes >> i & 1) || same_site(other.site, site)) continue;
    report({"divergent simdgroup", nullptr, Place::at(site)}, [&] {
      return "lanes of one simdgroup call different simdgroup functions at the same time, here and at line " +
             std::to_string(other.site.line);
    });
    return;
  }
}

void release_simdgroup(Worker& worker, Simdgroup& group, uint32_t lanes) {
  group.exchanges++;
  group.waiting = 0;
  for (int i = 0; i < group.count; ++i) {
    if (!(lanes >> i & 1)) continue;
    worker.lanes[group.first + i].exchanged = lanes;
    make_ready(worker, group.first + i);
  }
}

// Waits for the simdgroup's other lanes and gives the lanes that came.
uint32_t meet(MslSite site) {
  Worker* worker = worker_of_this_thread;
  Lane& lane = worker->lane();
  Simdgroup& group = worker->simdgroups[lane.thread.simdgroup];
  lane.site = site;
  lane.state = LaneState::kAtSimdgroup;
  group.waiting++;
  if (group.waiting == group.live) {
    uint32_t lanes = waiting_lanes(*worker, group);
    check_same_call(*worker, group, lanes, site);
    release_simdgroup(*worker, group, lanes);
    // The last to arrive need not wait: it takes itself off the list.
    auto& list = worker->next_ready;
    list.erase(std::find(list.begin(), list.end(), worker->current));
    monitor::simdgroup_operation();
  } else {
    back_to_scheduler();
  }
  return lane.exchanged;
}

// When no lane can run: lanes of a simdgroup wait for others that never come. Reported, then they go on by themselves.
bool resolve_divergent_simdgroup(Worker& worker) {
  for (Simdgroup& group : worker.simdgroups) {
    if (!group.count || !group.waiting) continue;
    uint32_t lanes = waiting_lanes(worker, group);
    int arrived = __builtin_popcount(lanes);
    MslSite site = worker.lanes[group.first + __builtin_ctz(lanes)].site;
    if (arrived != group.live) {
      report({"divergent simdgroup", nullptr, Place::at(site)}, [&] {
        return "a simdgroup function in divergent control flow: " + of(arrived, group.live) + " lanes arrived";
      });
    }
    release_simdgroup(worker, group, lanes);
    return true;
  }
  return false;
}

// ---- threadgroup barriers

void pass_barrier(Worker& worker, int flags) {
  worker.at_barrier = 0;
  worker.barriers++;
  worker.epochs.pass(flags);
}

bool resolve_divergent_barrier(Worker& worker) {
  if (!worker.at_barrier) return false;
  MslSite site{};
  for (int i = 0; i < worker.threads; ++i) {
    if (worker.lanes[i].state != LaneState::kAtThreadgroupBarrier) continue;
    site = worker.lanes[i].site;
    make_ready(worker, i);
  }
  report({"divergent barrier", nullptr, Place::at(site)}, [&] {
    return "threadgroup_barrier reached by " + of(worker.at_barrier, worker.threads) + " threads; the others " +
           "returned or wait elsewhere";
  });
  pass_barrier(worker, kDeviceMemory | kThreadgroupMemory);
  return true;
}

// ---- threadgroups

void start_lanes(Worker& worker, const uint32_t position[3], const uint32_t size[3]) {
  if (worker.lanes.size() < static_cast<size_t>(worker.threads)) {
    size_t before = worker.lanes.size();
    worker.lanes.resize(worker.threads);
    std::vector<Fiber> fibers(worker.threads - before);
    allocate_stacks(fibers.data(), fibers.size());
    for (size_t i = 0; i < fibers.size(); ++i) worker.lanes[before + i].fiber = fibers[i];
  }
  for (int i = 0; i < worker.threads; ++i) {
    Lane& lane = worker.lanes[i];
    MslThread& thread = lane.thread;
    const uint32_t place[3] = {i % size[0], i / size[0] % size[1], i / size[0] / size[1]};
    for (int axis = 0; axis < 3; ++axis) {
      thread.position_in_threadgroup[axis] = place[axis];
      thread.position_in_grid[axis] = position[axis] * launch.threadgroup[axis] + place[axis];
      thread.threadgroup_position[axis] = position[axis];
      thread.threads_per_threadgroup[axis] = size[axis];
      thread.dispatch_threads_per_threadgroup[axis] = launch.threadgroup[axis];
      thread.threads_per_grid[axis] = launch.grid[axis];
      thread.threadgroups_per_grid[axis] = launch.groups(axis);
    }
    thread.index = i;
    thread.lane = i % kLanes;
    thread.simdgroup = i / kLanes;
    thread.simdgroups = (worker.threads + kLanes - 1) / kLanes;
    prepare_fiber(lane.fiber, lane_main);
    make_ready(worker, i);
  }
}

void start_simdgroups(Worker& worker) {
  worker.simdgroups.resize((worker.threads + kLanes - 1) / kLanes);
  for (size_t i = 0; i < worker.simdgroups.size(); ++i) {
    Simdgroup& group = worker.simdgroups[i];
    group.exchanges = 0;
    group.first = static_cast<int>(i) * kLanes;
    group.count = group.live = std::min(kLanes, worker.threads - group.first);
    group.waiting = 0;
    group.epochs = {};
  }
}

void arrange(Worker& worker, std::vector<int>& batch) {
  if (launch.order == Order::kReversed) std::reverse(batch.begin(), batch.end());
  if (launch.order == Order::kSeeded) std::shuffle(batch.begin(), batch.end(), worker.random);
}

void run_ready_lanes(Worker& worker) {
  while (!worker.next_ready.empty()) {
    worker.ready.swap(worker.next_ready);
    worker.next_ready.clear();
    arrange(worker, worker.ready);
    for (int index : worker.ready) {
      worker.current = index;
      msl_switch_stack(&worker.scheduler_stack, worker.lanes[index].fiber.stack_pointer);
      worker.current = -1;
    }
  }
}

void run_threadgroup(Worker& worker, uint32_t number) {
  const uint32_t columns = launch.groups(0), rows = launch.groups(1);
  const uint32_t position[3] = {number % columns, number / columns % rows, number / columns / rows};
  uint32_t size[3];  // Metal trims threadgroups at the edge of the grid
  for (int axis = 0; axis < 3; ++axis)
    size[axis] = std::min(launch.threadgroup[axis], launch.grid[axis] - position[axis] * launch.threadgroup[axis]);
  worker.threads = worker.live = static_cast<int>(size[0] * size[1] * size[2]);
  worker.at_barrier = 0;
  worker.group = number + 1;
  worker.epochs = {};
  worker.live_variables.clear();
  worker.threadgroup_bytes = 0;
  worker.next_ready.clear();
  start_simdgroups(worker);
  start_lanes(worker, position, size);
  do {
    run_ready_lanes(worker);
  } while (worker.live && (resolve_divergent_simdgroup(worker) || resolve_divergent_barrier(worker)));
  worker.most_threadgroup_bytes = std::max(worker.most_threadgroup_bytes, worker.threadgroup_bytes);
  monitor::group_ends(worker);
}

std::vector<uint32_t> threadgroup_order() {
  std::vector<uint32_t> numbers(launch.groups(0) * launch.groups(1) * launch.groups(2));
  for (size_t i = 0; i < numbers.size(); ++i) numbers[i] = static_cast<uint32_t>(i);
  if (launch.order == Order::kReversed) std::reverse(numbers.begin(), numbers.end());
  if (launch.order == Order::kSeeded) std::shuffle(numbers.begin(), numbers.end(), std::mt19937(launch.seed));
  return numbers;
}
}  // namespace

void Epochs::pass(int flags) {
  barriers++;
  if (flags & kThreadgroupMemory) threadgroup_memory++;
  if (flags & kDeviceMemory) device_memory++;
}

Worker* current_worker() {
  Worker* worker = worker_of_this_thread;
  return worker && worker->current >= 0 ? worker : nullptr;
}

Totals run_launch(const Launch& what, void** buffers) {
  launch = what;
  uint32_t threads = launch.threadgroup[0] * launch.threadgroup[1] * launch.threadgroup[2];
  if (threads > kMostThreads) {
    report({"thread count"}, [&] {
      return "a threadgroup of " + std::to_string(threads) + " threads; Metal allows " + std::to_string(kMostThreads);
    });
  }
  std::vector<uint32_t> numbers = threadgroup_order();
  uint32_t count = monitor::single_worker() ? 1 : std::max(1u, launch.workers);
  std::vector<Worker> workers(count);
  std::atomic<size_t> next{0};
  auto work = [&](uint32_t which) {
    Worker& worker = workers[which];
    worker_of_this_thread = &worker;
    worker.buffers = buffers;
    worker.random.seed(launch.seed * 7919u + which);
    for (size_t i; (i = next++) < numbers.size();) run_threadgroup(worker, numbers[i]);
  };
  std::vector<std::thread> others;
  for (uint32_t i = 1; i < count; ++i) others.emplace_back(work, i);
  work(0);
  for (std::thread& other : others) other.join();
  Totals totals;
  totals.threadgroups = static_cast<long>(numbers.size());
  for (const Worker& worker : workers) {
    totals.barriers += worker.barriers;
    totals.threadgroup_bytes = std::max(totals.threadgroup_bytes, worker.most_threadgroup_bytes);
  }
  return totals;
}

// ---- the calls a kernel makes

extern "C" int msl_lane() { return static_cast<int>(worker_of_this_thread->lane().thread.lane); }

extern "C" MslExchange msl_exchange(const void* value, int bytes, MslSite site) {
  Worker* worker = worker_of_this_thread;
  Lane& lane = worker->lane();
  Simdgroup& group = worker->simdgroups[lane.thread.simdgroup];
  char* slots = group.slots[group.exchanges & 1];
  memcpy(slots + lane.thread.lane * kSlotBytes, value, static_cast<size_t>(bytes));
  uint32_t lanes = meet(site);
  return {slots, lanes};
}

extern "C" void msl_inactive_lane(int lane, MslSite site) {
  report({"inactive lane", nullptr, Place::at(site)},
         [&] { return "reads the value of lane " + std::to_string(lane) + ", which took no part"; });
}

extern "C" void msl_simdgroup_barrier(int flags, MslSite site) {
  site.pc = call_before(__builtin_return_address(0));
  Worker* worker = worker_of_this_thread;
  Simdgroup& group = worker->simdgroups[worker->lane().thread.simdgroup];
  uint32_t passed = group.epochs.barriers;
  meet(site);
  if (group.epochs.barriers == passed) group.epochs.pass(flags);  // once, by the first lane that goes on
}

extern "C" void msl_threadgroup_barrier(int flags, MslSite site) {
  site.pc = call_before(__builtin_return_address(0));
  Worker* worker = worker_of_this_thread;
  Lane& lane = worker->lane();
  lane.site = site;
  lane.state = LaneState::kAtThreadgroupBarrier;
  worker->at_barrier++;
  if (worker->at_barrier < worker->live) {
    back_to_scheduler();
    return;
  }
  if (worker->live != worker->threads) {
    report({"divergent barrier", nullptr, Place::at(site)}, [&] {
      return "threadgroup_barrier reached by " + of(worker->live, worker->threads) + " threads; the others returned early";
    });
  }
  for (int i = 0; i < worker->threads; ++i) {
    Lane& other = worker->lanes[i];
    if (other.state != LaneState::kAtThreadgroupBarrier) continue;
    if (!same_site(other.site, site)) {
      report({"divergent barrier", nullptr, Place::at(site)}, [&] {
        return "threads wait at different barriers: here and at line " + std::to_string(other.site.line);
      });
    }
    other.state = LaneState::kReady;
    if (i != worker->current) worker->next_ready.push_back(i);
  }
  monitor::lane_switches();
  pass_barrier(*worker, flags);
}

extern "C" void* msl_threadgroup_variable(const char* name, int id, size_t bytes, size_t granule) {
  Worker* worker = worker_of_this_thread;
  auto& live = worker->live_variables;
  Region*& region = worker->variables[id];
  if (std::find(live.begin(), live.end(), id) != live.end()) return region->start;
  if (!region) {
    region = allocate_region(name, Space::kThreadgroup, bytes, granule);
    region->id = id;
  } else {
    memset(region->start, 0xFF, bytes);
  }
  live.push_back(id);
  monitor::threadgroup_variable(region);
  worker->threadgroup_bytes += bytes;
  if (worker->threadgroup_bytes > launch.threadgroup_memory_limit) {
    report({"threadgroup memory", region}, [&] {
      return "threadgroup variables take " + std::to_string(worker->threadgroup_bytes) + " bytes with " + name +
             "; Metal allows " + std::to_string(launch.threadgroup_memory_limit);
    });
  }
  return region->start;
}

extern "C" void msl_atomic_begin() {
  while (atomic_access.test_and_set(std::memory_order_acquire)) {
  }
  monitor::atomic_begins();
}

extern "C" void msl_atomic_end() {
  monitor::atomic_ends();
  atomic_access.clear(std::memory_order_release);
}

extern "C" void msl_count(int flops, int special) { monitor::arithmetic(flops, special); }
extern "C" __attribute__((const)) float msl_rsqrt(float x) { return 1.0f / __builtin_sqrtf(x); }
