"""CUDA's side of the kernel bodies: a header in which the part of Metal's language that they use means the same.

MLX compiles it with NVRTC, where every function is a device function. Lengths and alignments of `vec<T, 4>` equal Metal's.
"""

CUDA_DIALECT = r"""
#define threadgroup __shared__
#define device
#define constant
#define thread
#define threadgroup_position_in_grid (::uint3{blockIdx.x, blockIdx.y, blockIdx.z})
#define thread_position_in_threadgroup (::uint3{threadIdx.x, threadIdx.y, threadIdx.z})
#define thread_position_in_grid \
    (::uint3{blockIdx.x * blockDim.x + threadIdx.x, blockIdx.y * blockDim.y + threadIdx.y, \
             blockIdx.z * blockDim.z + threadIdx.z})
#define thread_index_in_threadgroup (threadIdx.x + blockDim.x * (threadIdx.y + blockDim.y * threadIdx.z))
#define thread_index_in_simdgroup (thread_index_in_threadgroup & 31u)
#define simdgroup_index_in_threadgroup (thread_index_in_threadgroup >> 5)

namespace mlx::core::cu {

using uint = unsigned int;

enum class mem_flags { mem_none, mem_device, mem_threadgroup };

inline void threadgroup_barrier(mem_flags) {
    __syncthreads();
}

inline float simd_sum(float value) {
    for (int lanes = 16; lanes > 0; lanes >>= 1) {
        value += __shfl_xor_sync(~0u, value, lanes);
    }
    return value;
}

namespace metal {
inline float exp(float x) { return ::expf(x); }
inline float exp2(float x) { return ::exp2f(x); }
inline float cos(float x) { return ::cosf(x); }
inline float sin(float x) { return ::sinf(x); }
inline float rsqrt(float x) { return ::rsqrtf(x); }
inline float max(float a, float b) { return ::fmaxf(a, b); }
inline float min(float a, float b) { return ::fminf(a, b); }
} // namespace metal

template <typename T, int N>
struct vec;

// Four numbers as one word, so that a copy is one load and one store: NVRTC would copy halves one by one.
template <int BYTES>
struct Word;
template <>
struct Word<8> {
    using type = ::uint2;
};
template <>
struct Word<16> {
    using type = ::uint4;
};

template <typename T>
struct alignas(4 * sizeof(T)) vec<T, 4> {
    T x, y, z, w;
    using Bits = typename Word<4 * sizeof(T)>::type;
    vec() = default;
    vec(const vec& v) { *(Bits*)this = *(const Bits*)&v; }
    vec& operator=(const vec& v) {
        *(Bits*)this = *(const Bits*)&v;
        return *this;
    }
    explicit vec(T value) : x(value), y(value), z(value), w(value) {}
    vec(T x, T y, T z, T w) : x(x), y(y), z(z), w(w) {}
    template <typename U>
    explicit vec(const vec<U, 4>& from) {
        const vec<U, 4> v = from;
        x = T(float(v.x)), y = T(float(v.y)), z = T(float(v.z)), w = T(float(v.w));
    }
};

using float4 = vec<float, 4>;

inline float4 operator+(float4 a, float4 b) { return float4(a.x + b.x, a.y + b.y, a.z + b.z, a.w + b.w); }
inline float4 operator*(float4 a, float4 b) { return float4(a.x * b.x, a.y * b.y, a.z * b.z, a.w * b.w); }
inline float4 operator*(float4 a, float b) { return float4(a.x * b, a.y * b, a.z * b, a.w * b); }
inline float4& operator+=(float4& a, float4 b) { a = a + b; return a; }
inline float dot(float4 a, float4 b) { return a.x * b.x + a.y * b.y + a.z * b.z + a.w * b.w; }

} // namespace mlx::core::cu
"""
