// The functions that -fsanitize=thread makes a kernel call before its accesses to memory. ThreadSanitizer itself is not
// linked: it does not know barriers, simdgroups or mem_flags.
#include <cstring>

#include "monitor.h"

namespace {
uintptr_t call_before(void* return_address) { return reinterpret_cast<uintptr_t>(return_address) - 1; }
}  // namespace

#define PC call_before(__builtin_return_address(0))
#define READ(NAME, BYTES, ALIGNED) \
  void __tsan_##NAME##BYTES(void* a) { monitor::access(static_cast<char*>(a), BYTES, false, ALIGNED, PC); }
#define WRITE(NAME, BYTES, ALIGNED) \
  void __tsan_##NAME##BYTES(void* a) { monitor::access(static_cast<char*>(a), BYTES, true, ALIGNED, PC); }
#define READ_WRITE(NAME, BYTES, ALIGNED)                                     \
  void __tsan_##NAME##BYTES(void* a) {                                       \
    monitor::access(static_cast<char*>(a), BYTES, false, ALIGNED, PC);       \
    monitor::access(static_cast<char*>(a), BYTES, true, ALIGNED, PC);        \
  }
#define ACCESSES(BYTES)                        \
  READ(read, BYTES, true)                      \
  WRITE(write, BYTES, true)                    \
  READ_WRITE(read_write, BYTES, true)          \
  READ(unaligned_read, BYTES, false)           \
  WRITE(unaligned_write, BYTES, false)         \
  READ_WRITE(unaligned_read_write, BYTES, false) \
  READ(volatile_read, BYTES, true)             \
  WRITE(volatile_write, BYTES, true)           \
  READ(unaligned_volatile_read, BYTES, false)  \
  WRITE(unaligned_volatile_write, BYTES, false)

extern "C" {
ACCESSES(1)
ACCESSES(2)
ACCESSES(4)
ACCESSES(8)
ACCESSES(16)
void __tsan_init() {}
void __tsan_func_entry(void*) {}
void __tsan_func_exit() {}
void __tsan_vptr_update(void**, void*) {}
void __tsan_vptr_read(void**) {}

void* __tsan_memcpy(void* to, const void* from, size_t bytes) {
  monitor::access(static_cast<const char*>(from), bytes, false, false, PC);
  monitor::access(static_cast<char*>(to), bytes, true, false, PC);
  return memcpy(to, from, bytes);
}
void* __tsan_memmove(void* to, const void* from, size_t bytes) {
  monitor::access(static_cast<const char*>(from), bytes, false, false, PC);
  monitor::access(static_cast<char*>(to), bytes, true, false, PC);
  return memmove(to, from, bytes);
}
void* __tsan_memset(void* to, int value, size_t bytes) {
  monitor::access(static_cast<char*>(to), bytes, true, false, PC);
  return memset(to, value, bytes);
}
}
