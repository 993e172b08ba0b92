// Simdgroup functions: each lane publishes its value and reads the others'. What they compute inside stands for hardware,
// so counting.py skips namespace msl::uncounted and the checker does not instrument it.
#pragma once

#define MSL_UNCOUNTED __attribute__((noinline))
// The exchange between lanes is no access to memory of the kernel's.
#define MSL_UNWATCHED_BEGIN _Pragma("clang attribute push(__attribute__((no_sanitize(\"thread\"))), apply_to = function)")
#define MSL_UNWATCHED_END _Pragma("clang attribute pop")

MSL_UNWATCHED_BEGIN

namespace msl::uncounted {
template <class T>
struct Values {
  MslExchange exchange;

  bool has(int lane) const { return exchange.lanes >> lane & 1; }
  T operator[](int lane) const {
    T value;
    __builtin_memcpy(&value, exchange.slots + lane * kSlotBytes, sizeof(T));
    return value;
  }
};

template <class T>
inline Values<T> publish(const T& value, MslSite& site, void* caller) {
  static_assert(sizeof(T) <= kSlotBytes);
  site.pc = (uintptr_t)caller - 1;
  return {msl_exchange(&value, sizeof(T), site)};
}

template <class T, class Combine>
MSL_UNCOUNTED T reduce(T value, Combine combine, MslSite site) {
  Values<T> values = publish(value, site, __builtin_return_address(0));
  T result{};
  bool first = true;
  for (int lane = 0; lane < kLanes; ++lane) {
    if (!values.has(lane)) continue;
    result = first ? values[lane] : combine(result, values[lane]);
    first = false;
  }
  return result;
}

// Lanes before this one, and this one too if `inclusive`.
template <class T, class Combine>
MSL_UNCOUNTED T prefix(T value, T neutral, bool inclusive, Combine combine, MslSite site) {
  Values<T> values = publish(value, site, __builtin_return_address(0));
  T result = neutral;
  for (int lane = 0; lane < msl_lane() + inclusive; ++lane)
    if (values.has(lane)) result = combine(result, values[lane]);
  return result;
}

// The value of lane `source`; outside the simdgroup: `otherwise`.
template <class T>
MSL_UNCOUNTED T from_lane(T value, int source, T otherwise, MslSite site) {
  Values<T> values = publish(value, site, __builtin_return_address(0));
  if (source < 0 || source >= kLanes) return otherwise;
  if (!values.has(source)) msl_inactive_lane(source, site);
  return values[source];
}

template <class T>
MSL_UNCOUNTED T from_first_lane(T value, MslSite site) {
  Values<T> values = publish(value, site, __builtin_return_address(0));
  return values[__builtin_ctz(values.exchange.lanes)];
}

MSL_UNCOUNTED inline uint32_t votes(bool vote, MslSite site) {
  Values<bool> values = publish(vote, site, __builtin_return_address(0));
  uint32_t result = 0;
  for (int lane = 0; lane < kLanes; ++lane)
    if (values.has(lane) && values[lane]) result |= 1u << lane;
  return result;
}

MSL_UNCOUNTED inline bool all_vote(bool vote, MslSite site) {
  Values<bool> values = publish(vote, site, __builtin_return_address(0));
  for (int lane = 0; lane < kLanes; ++lane)
    if (values.has(lane) && !values[lane]) return false;
  return true;
}
}  // namespace msl::uncounted

namespace msl {
// MSL's simdgroup functions take 8-, 16- and 32-bit numbers and vectors of them, no bool and nothing of 64 bits.
template <class T>
using SimdValue = std::enable_if_t<
    sizeof(typename Shape<T>::element) <= 4 && !std::is_same_v<typename Shape<T>::element, bool> && !std::is_class_v<T>, T>;
}  // namespace msl

namespace metal {
#define MSL_REDUCTION(NAME, EXPRESSION)                                                             \
  template <class T>                                                                                \
  inline msl::SimdValue<T> NAME(T value, MslSite site = MSL_HERE) {                                 \
    return msl::uncounted::reduce(value, [](T a, T b) { return (T)(EXPRESSION); }, site);           \
  }
MSL_REDUCTION(simd_sum, a + b)
MSL_REDUCTION(simd_product, a* b)
MSL_REDUCTION(simd_max, a > b ? a : b)
MSL_REDUCTION(simd_min, a < b ? a : b)
MSL_REDUCTION(simd_or, a | b)
MSL_REDUCTION(simd_and, a& b)
MSL_REDUCTION(simd_xor, a ^ b)
#undef MSL_REDUCTION

#define MSL_PREFIX(NAME, NEUTRAL, INCLUSIVE, EXPRESSION)                                                                 \
  template <class T>                                                                                                     \
  inline msl::SimdValue<T> NAME(T value, MslSite site = MSL_HERE) {                                                      \
    return msl::uncounted::prefix(value, (T)NEUTRAL, INCLUSIVE, [](T a, T b) { return (T)(EXPRESSION); }, site);         \
  }
MSL_PREFIX(simd_prefix_inclusive_sum, 0, true, a + b)
MSL_PREFIX(simd_prefix_exclusive_sum, 0, false, a + b)
MSL_PREFIX(simd_prefix_inclusive_product, 1, true, a* b)
MSL_PREFIX(simd_prefix_exclusive_product, 1, false, a* b)
#undef MSL_PREFIX

#define MSL_SHUFFLE(NAME, SOURCE, OTHERWISE)                                                 \
  template <class T>                                                                         \
  inline msl::SimdValue<T> NAME(T value, ushort by, MslSite site = MSL_HERE) {               \
    return msl::uncounted::from_lane(value, SOURCE, OTHERWISE, site);                        \
  }
MSL_SHUFFLE(simd_shuffle, by & 31, value)
MSL_SHUFFLE(simd_broadcast, by & 31, value)
MSL_SHUFFLE(simd_shuffle_xor, (msl_lane() ^ by) & 31, value)
MSL_SHUFFLE(simd_shuffle_down, msl_lane() + by, value)
MSL_SHUFFLE(simd_shuffle_up, msl_lane() - by, value)
MSL_SHUFFLE(simd_shuffle_rotate_down, (msl_lane() + by) & 31, value)
MSL_SHUFFLE(simd_shuffle_rotate_up, (msl_lane() - by) & 31, value)
#undef MSL_SHUFFLE

template <class T>
inline msl::SimdValue<T> simd_shuffle_and_fill_down(T value, T filling, ushort by, MslSite site = MSL_HERE) {
  return msl::uncounted::from_lane(value, msl_lane() + by, filling, site);
}
template <class T>
inline msl::SimdValue<T> simd_shuffle_and_fill_up(T value, T filling, ushort by, MslSite site = MSL_HERE) {
  return msl::uncounted::from_lane(value, msl_lane() - by, filling, site);
}
template <class T>
inline msl::SimdValue<T> simd_broadcast_first(T value, MslSite site = MSL_HERE) {
  return msl::uncounted::from_first_lane(value, site);
}

struct simd_vote {
  using vote_t = uint64_t;
  vote_t lanes;
  explicit operator vote_t() const { return lanes; }
  bool all() const { return lanes == 0xFFFFFFFFu; }
  bool any() const { return lanes != 0; }
};
inline simd_vote simd_ballot(bool vote, MslSite site = MSL_HERE) { return {msl::uncounted::votes(vote, site)}; }
inline bool simd_any(bool vote, MslSite site = MSL_HERE) { return msl::uncounted::votes(vote, site) != 0; }
inline bool simd_all(bool vote, MslSite site = MSL_HERE) { return msl::uncounted::all_vote(vote, site); }
inline bool simd_is_first(MslSite site = MSL_HERE) {
  return msl_lane() == __builtin_ctz(msl::uncounted::votes(true, site));
}
}  // namespace metal

// The names that MLX's bf16_math.h builds its bfloat versions on.
#define MSL_FORWARD(NAME)                               \
  template <class T, class... More>                     \
  inline T __metal_##NAME(T value, More... more) {      \
    return metal::NAME(value, more...);                 \
  }
MSL_FORWARD(simd_sum)
MSL_FORWARD(simd_max)
MSL_FORWARD(simd_min)
MSL_FORWARD(simd_product)
MSL_FORWARD(simd_broadcast)
MSL_FORWARD(simd_shuffle)
MSL_FORWARD(simd_shuffle_xor)
MSL_FORWARD(simd_shuffle_down)
MSL_FORWARD(simd_shuffle_up)
MSL_FORWARD(simd_shuffle_rotate_down)
MSL_FORWARD(simd_shuffle_rotate_up)
MSL_FORWARD(simd_prefix_inclusive_sum)
MSL_FORWARD(simd_prefix_exclusive_sum)
MSL_FORWARD(simd_prefix_inclusive_product)
MSL_FORWARD(simd_prefix_exclusive_product)
#undef MSL_FORWARD
template <class T>
inline T __metal_simd_xor(T value);  // declared by MLX for bfloat, meaningless for floats: never defined
template <class T>
inline T __metal_simd_shuffle_and_fill_down(T value, T filling, ushort by, ushort) {
  return metal::simd_shuffle_and_fill_down(value, filling, by);
}
template <class T>
inline T __metal_simd_shuffle_and_fill_up(T value, T filling, ushort by, ushort) {
  return metal::simd_shuffle_and_fill_up(value, filling, by);
}
inline ushort __metal_get_simdgroup_size(ushort) { return kLanes; }
MSL_UNWATCHED_END
