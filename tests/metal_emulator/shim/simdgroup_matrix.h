// simdgroup_matrix: 8×8, two neighboring elements of a row per lane, in the layout that MLX's kernels rely on.
#pragma once

namespace msl {
constexpr int kMatrix = 8;
constexpr int kElementsPerLane = 2;

inline int matrix_row(int lane) { return (lane / 4 & 4) + lane / 2 % 4; }
inline int matrix_column(int lane) { return (lane / 4 & 2) * 2 + lane % 2 * 2; }
}  // namespace msl

namespace metal {
template <class T, int Rows, int Columns>
struct simdgroup_matrix {
  static_assert(Rows == msl::kMatrix && Columns == msl::kMatrix, "simdgroup_matrix is 8 by 8");
  vec<T, msl::kElementsPerLane> elements;

  simdgroup_matrix() = default;
  explicit simdgroup_matrix(T diagonal) {
    for (int i = 0; i < msl::kElementsPerLane; ++i)
      elements[i] = msl::matrix_row(msl_lane()) == msl::matrix_column(msl_lane()) + i ? diagonal : (T)0;
  }
  thread vec<T, msl::kElementsPerLane>& thread_elements() { return elements; }
};
typedef simdgroup_matrix<float, 8, 8> simdgroup_float8x8;
typedef simdgroup_matrix<half, 8, 8> simdgroup_half8x8;
typedef simdgroup_matrix<bfloat, 8, 8> simdgroup_bfloat8x8;

template <class T, int Rows, int Columns>
inline simdgroup_matrix<T, Rows, Columns> make_filled_simdgroup_matrix(T value) {
  simdgroup_matrix<T, Rows, Columns> matrix;
  matrix.elements = value;
  return matrix;
}
}  // namespace metal

namespace msl {
// Where this lane's element i of a matrix at `origin` (column, row) lies.
inline ulong element_offset(int i, ulong per_row, metal::vec<ulong, 2> origin, bool transposed) {
  ulong row = matrix_row(msl_lane()), column = matrix_column(msl_lane()) + i;
  if (transposed) return (origin.x + column) * per_row + origin.y + row;
  return (origin.y + row) * per_row + origin.x + column;
}

MSL_UNWATCHED_BEGIN
namespace uncounted {
template <class T, class A, class B, class C>
MSL_UNCOUNTED void multiply_accumulate(metal::vec<T, 2>& result, metal::vec<A, 2> a, metal::vec<B, 2> b,
                                       metal::vec<C, 2> c, MslSite site) {
  struct Operands {
    metal::vec<A, 2> a;
    metal::vec<B, 2> b;
  };
  Values<Operands> values = publish(Operands{a, b}, site, __builtin_return_address(0));
  float left[kMatrix][kMatrix], right[kMatrix][kMatrix];
  for (int lane = 0; lane < kLanes; ++lane) {
    if (!values.has(lane)) msl_inactive_lane(lane, site);
    Operands theirs = values[lane];
    for (int i = 0; i < kElementsPerLane; ++i) {
      left[matrix_row(lane)][matrix_column(lane) + i] = (float)theirs.a[i];
      right[matrix_row(lane)][matrix_column(lane) + i] = (float)theirs.b[i];
    }
  }
  for (int i = 0; i < kElementsPerLane; ++i) {
    float sum = (float)c[i];
    for (int k = 0; k < kMatrix; ++k)
      sum += left[matrix_row(msl_lane())][k] * right[k][matrix_column(msl_lane()) + i];
    result[i] = (T)sum;
  }
  msl_count(2 * kMatrix * kElementsPerLane, 0);
}
}  // namespace uncounted
MSL_UNWATCHED_END
}  // namespace msl

namespace metal {
#define MSL_MATRIX_LOAD(SPACE)                                                                                       \
  template <class T>                                                                                                 \
  inline void simdgroup_load(thread simdgroup_matrix<T, 8, 8>& matrix, const SPACE T* source, ulong per_row = 8,     \
                             ulong2 origin = (ulong2)(0ul), bool transposed = false) {                               \
    for (int i = 0; i < msl::kElementsPerLane; ++i)                                                                  \
      matrix.elements[i] = source[msl::element_offset(i, per_row, origin, transposed)];                              \
  }
#define MSL_MATRIX_STORE(SPACE)                                                                                      \
  template <class T>                                                                                                 \
  inline void simdgroup_store(simdgroup_matrix<T, 8, 8> matrix, SPACE T* target, ulong per_row = 8,                  \
                              ulong2 origin = (ulong2)(0ul), bool transposed = false) {                              \
    for (int i = 0; i < msl::kElementsPerLane; ++i)                                                                  \
      target[msl::element_offset(i, per_row, origin, transposed)] = matrix.elements[i];                              \
  }
#if MSL_STATIC_CHECK
MSL_MATRIX_LOAD(device)
MSL_MATRIX_LOAD(threadgroup)
MSL_MATRIX_STORE(device)
MSL_MATRIX_STORE(threadgroup)
#else
MSL_MATRIX_LOAD()
MSL_MATRIX_STORE()
#endif
#undef MSL_MATRIX_LOAD
#undef MSL_MATRIX_STORE

template <class T, class A, class B, class C>
inline void simdgroup_multiply_accumulate(thread simdgroup_matrix<T, 8, 8>& result, simdgroup_matrix<A, 8, 8> a,
                                          simdgroup_matrix<B, 8, 8> b, simdgroup_matrix<C, 8, 8> c,
                                          MslSite site = MSL_HERE) {
  msl::uncounted::multiply_accumulate(result.elements, a.elements, b.elements, c.elements, site);
}
template <class T, class A, class B>
inline void simdgroup_multiply(thread simdgroup_matrix<T, 8, 8>& result, simdgroup_matrix<A, 8, 8> a,
                               simdgroup_matrix<B, 8, 8> b, MslSite site = MSL_HERE) {
  msl::uncounted::multiply_accumulate(result.elements, a.elements, b.elements, (vec<T, 2>)(T)0, site);
}
}  // namespace metal
