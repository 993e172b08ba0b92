// Metal's standard library for kernels that run on the CPU: the part that compute kernels use, for clang (C++17).
// Precompiled together with MLX's own preamble. MSL_STATIC_CHECK=1 gives the address spaces their own types, for a build
// that is only type-checked; otherwise they are empty.
//
// No C or C++ library header with functions is included, so a function that MSL lacks (erf, memcpy, printf) is an
// undeclared name here as it is there.
#pragma once
#include <stddef.h>
#include <stdint.h>

#include <limits>
#include <type_traits>

#include "../runtime/interface.h"
#include "language.h"
#include "vectors.h"
#include "synchronization.h"
#include "simdgroup.h"
#include "math.h"
#include "integers.h"
#include "atomics.h"
#include "simdgroup_matrix.h"
#include "logging.h"
#include "complex.h"

using namespace metal;
