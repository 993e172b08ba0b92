// MLX's complex_t, reduced to what its preamble needs: MLX's own has a method for each address space, which C++ has not.
#pragma once

template <class T>
struct complex_t {
  T real, imag;
  constexpr complex_t() : real(0), imag(0) {}
  constexpr complex_t(T r, T i = T(0)) : real(r), imag(i) {}
};
typedef complex_t<float> complex64_t;
