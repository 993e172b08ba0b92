// Fibers: a stack of its own for each GPU thread and a switch between two of them (x86-64, System V calling convention).
#pragma once
#include <cstddef>
#include <cstdint>

constexpr size_t kStackBytes = 256 << 10;
constexpr size_t kGuardBytes = 4096;

struct Fiber {
  void* stack_pointer = nullptr;
  char* stack = nullptr;  // kStackBytes, the lowest kGuardBytes of them not accessible

  bool owns(const char* address) const { return address >= stack && address < stack + kStackBytes; }
};

// Stacks for `count` fibers; they live as long as the process.
void allocate_stacks(Fiber* fibers, size_t count);

// Lets the next switch to this fiber start `entry` on an empty stack. `entry` must not return.
void prepare_fiber(Fiber& fiber, void (*entry)());

// Saves the registers that a call preserves, stores the stack pointer in *save and continues at `load`.
extern "C" void msl_switch_stack(void** save, void* load);
