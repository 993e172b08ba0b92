// Atomics: one access at a time, by the runtime's lock; the checker sees them as ordered with each other only.
#pragma once

namespace metal {
enum memory_order { memory_order_relaxed };

template <class T>
struct atomic {
  T value;
};
typedef atomic<int> atomic_int;
typedef atomic<uint> atomic_uint;
typedef atomic<float> atomic_float;
typedef atomic<bool> atomic_bool;
typedef atomic<ulong> atomic_ulong;
}  // namespace metal

namespace msl {
struct AtomicAccess {
  AtomicAccess() { msl_atomic_begin(); }
  ~AtomicAccess() { msl_atomic_end(); }
};
}  // namespace msl

namespace metal {
// NEW: the value to store, from `old` and `operand`.
#define MSL_ATOMIC_UPDATE(NAME, SPACE, NEW)                                                             \
  template <class T>                                                                                    \
  inline T NAME(volatile SPACE atomic<T>* object, std::common_type_t<T> operand, memory_order) {        \
    msl::AtomicAccess access;                                                                           \
    T old = object->value;                                                                              \
    object->value = (T)(NEW);                                                                           \
    return old;                                                                                         \
  }
#define MSL_ATOMICS(SPACE)                                                                                           \
  template <class T>                                                                                                 \
  inline T atomic_load_explicit(const volatile SPACE atomic<T>* object, memory_order) {                              \
    msl::AtomicAccess access;                                                                                        \
    return object->value;                                                                                            \
  }                                                                                                                  \
  template <class T>                                                                                                 \
  inline void atomic_store_explicit(volatile SPACE atomic<T>* object, std::common_type_t<T> operand, memory_order) { \
    msl::AtomicAccess access;                                                                                        \
    object->value = operand;                                                                                         \
  }                                                                                                                  \
  template <class T>                                                                                                 \
  inline bool atomic_compare_exchange_weak_explicit(volatile SPACE atomic<T>* object, thread T* expected,            \
                                                    std::common_type_t<T> operand, memory_order, memory_order) {     \
    msl::AtomicAccess access;                                                                                        \
    T old = object->value;                                                                                           \
    bool same = __builtin_memcmp(&old, expected, sizeof(T)) == 0;                                                    \
    if (same) {                                                                                                      \
      object->value = operand;                                                                                       \
    } else {                                                                                                         \
      *expected = old;                                                                                               \
    }                                                                                                                \
    return same;                                                                                                     \
  }                                                                                                                  \
  MSL_ATOMIC_UPDATE(atomic_exchange_explicit, SPACE, operand)                                                        \
  MSL_ATOMIC_UPDATE(atomic_fetch_add_explicit, SPACE, old + operand)                                                 \
  MSL_ATOMIC_UPDATE(atomic_fetch_sub_explicit, SPACE, old - operand)                                                 \
  MSL_ATOMIC_UPDATE(atomic_fetch_max_explicit, SPACE, old < operand ? operand : old)                                 \
  MSL_ATOMIC_UPDATE(atomic_fetch_min_explicit, SPACE, operand < old ? operand : old)                                 \
  MSL_ATOMIC_UPDATE(atomic_fetch_or_explicit, SPACE, old | operand)                                                  \
  MSL_ATOMIC_UPDATE(atomic_fetch_and_explicit, SPACE, old& operand)                                                  \
  MSL_ATOMIC_UPDATE(atomic_fetch_xor_explicit, SPACE, old ^ operand)
#if MSL_STATIC_CHECK
MSL_ATOMICS(device)
MSL_ATOMICS(threadgroup)
#else
MSL_ATOMICS()
#endif
#undef MSL_ATOMICS
#undef MSL_ATOMIC_UPDATE
}  // namespace metal
