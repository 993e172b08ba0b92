// Math functions: float, half (computed in float, rounded once) and vectors of them; bfloat comes from MLX's bf16_math.h,
// which is built on the __metal_ names. metal::fast and metal::precise are the same functions: results are the CPU's.
#pragma once

// The last argument selects fast or precise math in Metal.
#define MSL_FLOAT1(NAME, EXPRESSION) \
  inline float __metal_##NAME(float x, int = 0) { return EXPRESSION; }
#define MSL_FLOAT2(NAME, EXPRESSION) \
  inline float __metal_##NAME(float x, float y, int = 0) { return EXPRESSION; }
#define MSL_FLOAT3(NAME, EXPRESSION) \
  inline float __metal_##NAME(float x, float y, float z, int = 0) { return EXPRESSION; }
MSL_FLOAT1(acos, __builtin_acosf(x))
MSL_FLOAT1(acosh, __builtin_acoshf(x))
MSL_FLOAT1(asin, __builtin_asinf(x))
MSL_FLOAT1(asinh, __builtin_asinhf(x))
MSL_FLOAT1(atan, __builtin_atanf(x))
MSL_FLOAT1(atanh, __builtin_atanhf(x))
MSL_FLOAT1(ceil, __builtin_ceilf(x))
MSL_FLOAT1(cos, __builtin_cosf(x))
MSL_FLOAT1(cosh, __builtin_coshf(x))
MSL_FLOAT1(cospi, __builtin_cosf(x* M_PI_F))
MSL_FLOAT1(exp, __builtin_expf(x))
MSL_FLOAT1(exp10, __builtin_exp10f(x))
MSL_FLOAT1(exp2, __builtin_exp2f(x))
MSL_FLOAT1(fabs, __builtin_fabsf(x))
MSL_FLOAT1(floor, __builtin_floorf(x))
MSL_FLOAT1(fract, x - __builtin_floorf(x))
MSL_FLOAT1(log, __builtin_logf(x))
MSL_FLOAT1(log10, __builtin_log10f(x))
MSL_FLOAT1(log2, __builtin_log2f(x))
MSL_FLOAT1(rint, __builtin_rintf(x))
MSL_FLOAT1(round, __builtin_roundf(x))
MSL_FLOAT1(rsqrt, msl_rsqrt(x))
MSL_FLOAT1(sin, __builtin_sinf(x))
MSL_FLOAT1(sinh, __builtin_sinhf(x))
MSL_FLOAT1(sinpi, __builtin_sinf(x* M_PI_F))
MSL_FLOAT1(sqrt, __builtin_sqrtf(x))
MSL_FLOAT1(tan, __builtin_tanf(x))
MSL_FLOAT1(tanh, __builtin_tanhf(x))
MSL_FLOAT1(tanpi, __builtin_tanf(x* M_PI_F))
MSL_FLOAT1(trunc, __builtin_truncf(x))
MSL_FLOAT2(atan2, __builtin_atan2f(x, y))
MSL_FLOAT2(copysign, __builtin_copysignf(x, y))
MSL_FLOAT2(divide, x / y)
MSL_FLOAT2(fdim, x > y ? x - y : 0.0f)
MSL_FLOAT2(fmax, __builtin_fmaxf(x, y))
MSL_FLOAT2(fmin, __builtin_fminf(x, y))
MSL_FLOAT2(fmod, __builtin_fmodf(x, y))
MSL_FLOAT2(nextafter, __builtin_nextafterf(x, y))
MSL_FLOAT2(pow, __builtin_powf(x, y))
MSL_FLOAT2(powr, __builtin_powf(x, y))
MSL_FLOAT3(fma, __builtin_fmaf(x, y, z))
MSL_FLOAT3(fmax3, __builtin_fmaxf(__builtin_fmaxf(x, y), z))
MSL_FLOAT3(fmin3, __builtin_fminf(__builtin_fminf(x, y), z))
MSL_FLOAT3(fmedian3, __builtin_fmaxf(__builtin_fminf(x, y), __builtin_fminf(__builtin_fmaxf(x, y), z)))
#undef MSL_FLOAT1
#undef MSL_FLOAT2
#undef MSL_FLOAT3
inline float __metal_ldexp(float x, int exponent, int = 0) { return __builtin_ldexpf(x, exponent); }
inline float __metal_frexp(float x, int* exponent, int = 0) { return __builtin_frexpf(x, exponent); }

// One function for float, half and vectors, in terms of the float one.
#define MSL_MATH1(NAME)                                                               \
  inline float NAME(float x) { return __metal_##NAME(x); }                            \
  inline half NAME(half x) { return (half)__metal_##NAME((float)x); }                 \
  template <class T, int N>                                                           \
  inline vec<T, N> NAME(vec<T, N> x) {                                                \
    vec<T, N> result;                                                                 \
    for (int i = 0; i < N; ++i) result[i] = (T)__metal_##NAME((float)x[i]);           \
    return result;                                                                    \
  }
#define MSL_MATH2(NAME)                                                                           \
  inline float NAME(float x, float y) { return __metal_##NAME(x, y); }                            \
  inline half NAME(half x, half y) { return (half)__metal_##NAME((float)x, (float)y); }           \
  template <class T, int N>                                                                       \
  inline vec<T, N> NAME(vec<T, N> x, vec<T, N> y) {                                               \
    vec<T, N> result;                                                                             \
    for (int i = 0; i < N; ++i) result[i] = (T)__metal_##NAME((float)x[i], (float)y[i]);          \
    return result;                                                                                \
  }
#define MSL_MATH3(NAME)                                                                                      \
  inline float NAME(float x, float y, float z) { return __metal_##NAME(x, y, z); }                           \
  inline half NAME(half x, half y, half z) { return (half)__metal_##NAME((float)x, (float)y, (float)z); }    \
  template <class T, int N>                                                                                  \
  inline vec<T, N> NAME(vec<T, N> x, vec<T, N> y, vec<T, N> z) {                                             \
    vec<T, N> result;                                                                                        \
    for (int i = 0; i < N; ++i) result[i] = (T)__metal_##NAME((float)x[i], (float)y[i], (float)z[i]);        \
    return result;                                                                                           \
  }
#define MSL_ALL_MATH                                                                                                    \
  MSL_MATH1(acos) MSL_MATH1(acosh) MSL_MATH1(asin) MSL_MATH1(asinh) MSL_MATH1(atan) MSL_MATH1(atanh) MSL_MATH1(ceil)    \
  MSL_MATH1(cos) MSL_MATH1(cosh) MSL_MATH1(cospi) MSL_MATH1(exp) MSL_MATH1(exp10) MSL_MATH1(exp2) MSL_MATH1(fabs)       \
  MSL_MATH1(floor) MSL_MATH1(fract) MSL_MATH1(log) MSL_MATH1(log10) MSL_MATH1(log2) MSL_MATH1(rint) MSL_MATH1(round)    \
  MSL_MATH1(rsqrt) MSL_MATH1(sin) MSL_MATH1(sinh) MSL_MATH1(sinpi) MSL_MATH1(sqrt) MSL_MATH1(tan) MSL_MATH1(tanh)       \
  MSL_MATH1(tanpi) MSL_MATH1(trunc)                                                                                     \
  MSL_MATH2(atan2) MSL_MATH2(copysign) MSL_MATH2(divide) MSL_MATH2(fdim) MSL_MATH2(fmax) MSL_MATH2(fmin)                \
  MSL_MATH2(fmod) MSL_MATH2(nextafter) MSL_MATH2(pow) MSL_MATH2(powr)                                                   \
  MSL_MATH3(fma) MSL_MATH3(fmax3) MSL_MATH3(fmin3)

namespace metal {
MSL_ALL_MATH
namespace fast {
MSL_ALL_MATH
}
namespace precise {
MSL_ALL_MATH
}
#undef MSL_MATH1
#undef MSL_MATH2
#undef MSL_MATH3
#undef MSL_ALL_MATH

inline float ldexp(float x, int exponent) { return __metal_ldexp(x, exponent); }
inline half ldexp(half x, int exponent) { return (half)__metal_ldexp((float)x, exponent); }
inline float frexp(float x, thread int& exponent) { return __metal_frexp(x, &exponent); }
inline float sincos(float x, thread float& cosine) {
  cosine = cos(x);
  return sin(x);
}
inline float modf(float x, thread float& whole) {
  whole = trunc(x);
  return x - whole;
}

inline bool isnan(float x) { return x != x; }
inline bool isnan(half x) { return x != x; }
inline bool isinf(float x) { return __builtin_isinf(x); }
inline bool isinf(half x) { return __builtin_isinf((float)x); }
inline bool isfinite(float x) { return __builtin_isfinite(x); }
inline bool isfinite(half x) { return __builtin_isfinite((float)x); }
inline bool signbit(float x) { return __builtin_signbitf(x); }

inline float max(float a, float b) { return fmax(a, b); }
inline half max(half a, half b) { return fmax(a, b); }
inline float min(float a, float b) { return fmin(a, b); }
inline half min(half a, half b) { return fmin(a, b); }
inline float abs(float x) { return fabs(x); }
inline half abs(half x) { return fabs(x); }
inline float sign(float x) { return x > 0.0f ? 1.0f : x < 0.0f ? -1.0f : x; }
inline half sign(half x) { return (half)sign((float)x); }
inline float clamp(float x, float low, float high) { return fmin(fmax(x, low), high); }
inline half clamp(half x, half low, half high) { return fmin(fmax(x, low), high); }
inline float saturate(float x) { return clamp(x, 0.0f, 1.0f); }
inline half saturate(half x) { return (half)saturate((float)x); }
inline float mix(float x, float y, float a) { return x + (y - x) * a; }
inline half mix(half x, half y, half a) { return x + (y - x) * a; }
inline float step(float edge, float x) { return x < edge ? 0.0f : 1.0f; }
inline float smoothstep(float low, float high, float x) {
  float t = saturate((x - low) / (high - low));
  return t * t * (3.0f - 2.0f * t);
}

template <class T, int N>
inline vec<T, N> mix(vec<T, N> x, vec<T, N> y, vec<T, N> a) {
  return x + (y - x) * a;
}
template <class T, int N>
inline vec<T, N> mix(vec<T, N> x, vec<T, N> y, T a) {
  return x + (y - x) * a;
}
template <class T, int N>
inline T dot(vec<T, N> a, vec<T, N> b) {
  T sum = a[0] * b[0];
  for (int i = 1; i < N; ++i) sum += a[i] * b[i];
  return sum;
}
template <class T, int N>
inline T length_squared(vec<T, N> a) {
  return dot(a, a);
}
template <class T, int N>
inline T length(vec<T, N> a) {
  return (T)__metal_sqrt((float)dot(a, a));
}
template <class T, int N>
inline T distance(vec<T, N> a, vec<T, N> b) {
  return length(a - b);
}
template <class T, int N>
inline vec<T, N> normalize(vec<T, N> a) {
  return a * (T)__metal_rsqrt((float)dot(a, a));
}
template <class T>
inline vec<T, 3> cross(vec<T, 3> a, vec<T, 3> b) {
  return a.yzx * b.zxy - a.zxy * b.yzx;
}
}  // namespace metal
