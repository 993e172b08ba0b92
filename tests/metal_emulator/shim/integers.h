// Integer functions, and the functions that numbers of every type share: min, max, clamp, select, any, all.
#pragma once

namespace metal {
#define MSL_INTEGER(T)                                                                \
  inline T max(T a, T b) { return a < b ? b : a; }                                    \
  inline T min(T a, T b) { return b < a ? b : a; }                                    \
  inline T clamp(T x, T low, T high) { return min(max(x, low), high); }               \
  inline T max3(T a, T b, T c) { return max(max(a, b), c); }                          \
  inline T min3(T a, T b, T c) { return min(min(a, b), c); }                          \
  inline T median3(T a, T b, T c) { return max(min(a, b), min(max(a, b), c)); }       \
  inline T select(T a, T b, bool second) { return second ? b : a; }                   \
  inline T absdiff(T a, T b) { return (T)(a < b ? b - a : a - b); }
MSL_INTEGER(char)
MSL_INTEGER(int8_t)
MSL_INTEGER(uchar)
MSL_INTEGER(short)
MSL_INTEGER(ushort)
MSL_INTEGER(int)
MSL_INTEGER(uint)
MSL_INTEGER(long)
MSL_INTEGER(ulong)
#undef MSL_INTEGER

inline int abs(int x) { return x < 0 ? -x : x; }
inline long abs(long x) { return x < 0 ? -x : x; }
inline short abs(short x) { return (short)(x < 0 ? -x : x); }
inline float select(float a, float b, bool second) { return second ? b : a; }
inline half select(half a, half b, bool second) { return second ? b : a; }
inline bfloat select(bfloat a, bfloat b, bool second) { return second ? b : a; }
inline bool select(bool a, bool b, bool second) { return second ? b : a; }
inline float max3(float a, float b, float c) { return max(max(a, b), c); }
inline float min3(float a, float b, float c) { return min(min(a, b), c); }
inline float median3(float a, float b, float c) { return __metal_fmedian3(a, b, c); }

template <class T, int N>
inline vec<T, N> max(vec<T, N> a, vec<T, N> b) {
  vec<T, N> result;
  for (int i = 0; i < N; ++i) result[i] = max((T)a[i], (T)b[i]);
  return result;
}
template <class T, int N>
inline vec<T, N> min(vec<T, N> a, vec<T, N> b) {
  vec<T, N> result;
  for (int i = 0; i < N; ++i) result[i] = min((T)a[i], (T)b[i]);
  return result;
}
template <class T, int N>
inline vec<T, N> clamp(vec<T, N> x, vec<T, N> low, vec<T, N> high) {
  return min(max(x, low), high);
}
template <class T, int N>
inline vec<T, N> clamp(vec<T, N> x, T low, T high) {
  return min(max(x, (vec<T, N>)low), (vec<T, N>)high);
}
template <class T, int N>
inline vec<T, N> abs(vec<T, N> a) {
  vec<T, N> result;
  for (int i = 0; i < N; ++i) result[i] = abs((T)a[i]);
  return result;
}
template <class T, int N, class B>
inline vec<T, N> select(vec<T, N> a, vec<T, N> b, vec<B, N> second) {
  vec<T, N> result;
  for (int i = 0; i < N; ++i) result[i] = second[i] ? b[i] : a[i];
  return result;
}
template <class B, int N>
inline bool all(vec<B, N> a) {
  for (int i = 0; i < N; ++i)
    if (!a[i]) return false;
  return true;
}
template <class B, int N>
inline bool any(vec<B, N> a) {
  for (int i = 0; i < N; ++i)
    if (a[i]) return true;
  return false;
}

#define MSL_BITS(T, BITS)                                                                                             \
  inline T popcount(T x) { return (T)__builtin_popcountg((std::make_unsigned_t<T>)x); }                               \
  inline T clz(T x) { return (T)__builtin_clzg((std::make_unsigned_t<T>)x, BITS); }                                   \
  inline T ctz(T x) { return (T)__builtin_ctzg((std::make_unsigned_t<T>)x, BITS); }                                   \
  inline T extract_bits(T x, uint offset, uint bits) {                                                                \
    return bits == 0 ? (T)0 : (T)((T)((std::make_unsigned_t<T>)x << (BITS - offset - bits)) >> (BITS - bits));        \
  }                                                                                                                   \
  inline T rotate(T x, T by) {                                                                                        \
    using U = std::make_unsigned_t<T>;                                                                                \
    uint n = (uint)by % BITS;                                                                                         \
    return (T)(n ? (U)((U)x << n) | (U)((U)x >> (BITS - n)) : (U)x);                                                  \
  }
MSL_BITS(uchar, 8)
MSL_BITS(short, 16)
MSL_BITS(ushort, 16)
MSL_BITS(int, 32)
MSL_BITS(uint, 32)
MSL_BITS(long, 64)
MSL_BITS(ulong, 64)
#undef MSL_BITS
inline uint reverse_bits(uint x) { return __builtin_bitreverse32(x); }
inline int mulhi(int a, int b) { return (int)(((long)a * b) >> 32); }
inline uint mulhi(uint a, uint b) { return (uint)(((ulong)a * b) >> 32); }
inline int mul24(int a, int b) { return a * b; }
inline uint mul24(uint a, uint b) { return a * b; }
inline int mad24(int a, int b, int c) { return a * b + c; }
inline uint mad24(uint a, uint b, uint c) { return a * b + c; }
}  // namespace metal
