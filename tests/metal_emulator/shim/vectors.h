// MSL's vectors: clang's ext_vector_type has the same layout, swizzles and element-wise operators. What it lacks are
// constructors, so translate.py turns float4(a, b2, c) into msl_make_vec<float, 4>(a, b2, c).
#pragma once

namespace metal {
template <class T, int N>
using vec = T __attribute__((ext_vector_type(N)));
}

#define MSL_VECTORS(T)            \
  typedef metal::vec<T, 2> T##2;  \
  typedef metal::vec<T, 3> T##3;  \
  typedef metal::vec<T, 4> T##4;
MSL_VECTORS(half)
MSL_VECTORS(bfloat)
MSL_VECTORS(float)
MSL_VECTORS(char)
MSL_VECTORS(uchar)
MSL_VECTORS(short)
MSL_VECTORS(ushort)
MSL_VECTORS(int)
MSL_VECTORS(uint)
MSL_VECTORS(long)
MSL_VECTORS(ulong)
MSL_VECTORS(bool)
#undef MSL_VECTORS

namespace msl {
// The element type and number of elements of a vector; a scalar has 0.
template <class T>
struct Shape {
  using element = T;
  static constexpr int size = 0;
};
template <class T, int N>
struct Shape<T __attribute__((ext_vector_type(N)))> {
  using element = T;
  static constexpr int size = N;
};

template <class T, int N, int I>
inline void fill(metal::vec<T, N>&) {
  static_assert(I == N, "a vector constructor with the wrong number of components");
}
template <class T, int N, int I, class V, class... More>
inline void fill(metal::vec<T, N>& result, const V& value, const More&... more) {
  constexpr int size = Shape<V>::size;
  static_assert(I + (size ? size : 1) <= N, "a vector constructor with too many components");
  if constexpr (size == 0) {
    result[I] = (T)value;
  } else {
    for (int i = 0; i < size; ++i) result[I + i] = (T)value[i];
  }
  fill<T, N, I + (size ? size : 1)>(result, more...);
}

}  // namespace msl

namespace metal {
template <class T, int N>
inline vec<T, N> msl_make_vec() {
  return vec<T, N>((T)0);
}
template <class T, int N, class V, class... More>
inline vec<T, N> msl_make_vec(V value, More... more) {
  vec<T, N> result;
  if constexpr (sizeof...(More) == 0 && msl::Shape<V>::size == 0) {
    result = (T)value;
  } else {
    msl::fill<T, N, 0>(result, value, more...);
  }
  return result;
}
// For a type with a name of its own, which may be a vector: using F4 = vec<float, 4>; F4(x).
template <class V, class... Parts>
inline V msl_make(Parts... parts) {
  if constexpr (msl::Shape<V>::size == 0) {
    return V(parts...);
  } else {
    return msl_make_vec<typename msl::Shape<V>::element, msl::Shape<V>::size>(parts...);
  }
}
}  // namespace metal
