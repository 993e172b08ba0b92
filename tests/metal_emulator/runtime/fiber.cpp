// Fibers by hand: ucontext does two system calls per switch and is twenty times slower.
#include "fiber.h"

#include <sys/mman.h>

#include <cstdio>
#include <cstdlib>

#ifndef __x86_64__
#error "the stack switch is written for x86-64"
#endif

asm(R"(
.text
.globl msl_switch_stack
.type msl_switch_stack, @function
msl_switch_stack:
  pushq %rbp
  pushq %rbx
  pushq %r12
  pushq %r13
  pushq %r14
  pushq %r15
  movq %rsp, (%rdi)
  movq %rsi, %rsp
  popq %r15
  popq %r14
  popq %r13
  popq %r12
  popq %rbx
  popq %rbp
  ret
.size msl_switch_stack, .-msl_switch_stack
)");

void allocate_stacks(Fiber* fibers, size_t count) {
  char* memory = static_cast<char*>(mmap(nullptr, count * kStackBytes, PROT_READ | PROT_WRITE,
                                         MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0));
  if (memory == MAP_FAILED) {
    perror("stacks of the emulated threads");
    exit(2);
  }
  for (size_t i = 0; i < count; ++i) {
    fibers[i].stack = memory + i * kStackBytes;
    mprotect(fibers[i].stack, kGuardBytes, PROT_NONE);
  }
}

void prepare_fiber(Fiber& fiber, void (*entry)()) {
  constexpr int kSavedRegisters = 6;
  // 64 bytes above keep the first frame's stack pointer aligned as after a call: 16n + 8.
  auto* top = reinterpret_cast<uint64_t*>(fiber.stack + kStackBytes - 64);
  *--top = 0;  // where `entry` would return to
  *--top = reinterpret_cast<uint64_t>(entry);
  for (int i = 0; i < kSavedRegisters; ++i) *--top = 0;
  fiber.stack_pointer = top;
}
