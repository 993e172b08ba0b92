"""The float32 loops that MLX's CPU backend is slow at, compiled by numba on first use and kept in its disk cache.

Each runs on the calling thread without the GIL; cpu.py spreads them over threads. Importing this imports numba (about
0.3 s), so cpu.py does it only when a large model needs it. Arrays are NumPy views of MLX buffers.
"""

import numpy as np
from numba import njit, types
from numba.extending import overload

# Not the whole of fastmath: infinities and NaN must survive, so that a broken checkpoint still shows itself.
JIT = {"nogil": True, "cache": True, "error_model": "numpy", "fastmath": {"contract", "reassoc", "nsz", "arcp"}}
f32 = np.float32


@njit(inline="always", **JIT)
def gelu_of(x):
    """x * (1 + erf(x / sqrt 2)) / 2; erf as the rational minimax of Eigen's `generic_fast_erf_float`, 5e-7 absolute."""
    z = min(max(x * f32(0.7071067811865476), f32(-3.832506856900711)), f32(3.832506856900711))
    t = z * z
    p = f32(0.00022905065861350646)
    p = p * t + f32(0.0034082910107109506)
    p = p * t + f32(0.050955695062380861)
    p = p * t + f32(0.18520832239976145)
    p = p * t + f32(1.128379143519084)
    q = f32(-1.1791602954361697e-7)
    q = q * t + f32(0.000023547966471313185)
    q = q * t + f32(0.0010179625278914885)
    q = q * t + f32(0.014070470171167667)
    q = q * t + f32(0.11098505178285362)
    q = q * t + f32(0.49746925110067538)
    q = q * t + f32(1.0)
    half = f32(0.5) * x
    return half + half * (z * p / q)


@njit(inline="always", **JIT)
def exp_of(x):
    """exp(x) for x <= 0: 2**f, a degree-6 polynomial, times the float 2**k made of its bits. No libm: it vectorizes."""
    t = max(x * f32(1.4426950408889634), f32(-126))
    k = np.floor(t + f32(0.5))
    f = t - k
    p = f32(1.5403530393381608e-4)
    p = p * f + f32(1.3333558146428443e-3)
    p = p * f + f32(9.618129107628477e-3)
    p = p * f + f32(5.550410866482158e-2)
    p = p * f + f32(2.402265069591007e-1)
    p = p * f + f32(6.931471805599453e-1)
    p = p * f + f32(1)
    return p * np.int32((np.int32(k) + np.int32(127)) << np.int32(23)).view(np.float32)


@njit(inline="always", **JIT)
def silu_of(x):
    """x / (1 + exp(-x)), which must not overflow."""
    e = exp_of(-abs(x))
    s = f32(1) / (f32(1) + e)
    return x * (s if x >= f32(0) else e * s)


def to_float32(stored):
    """A stored weight as float32: itself, or from the bits of a bfloat16, which are a float32's upper half."""
    raise NotImplementedError("compiled code only")


@overload(to_float32, inline="always")
def _to_float32(stored):
    if stored == types.float32:
        return lambda stored: stored
    return lambda stored: np.uint32(np.uint32(stored) << np.uint32(16)).view(np.float32)


@njit(**JIT)
def bias_gelu(x, bias):
    """x[r] = gelu(x[r] + bias), in place. x (rows, C), bias (C,)."""
    for r in range(x.shape[0]):
        for c in range(x.shape[1]):
            x[r, c] = gelu_of(x[r, c] + bias[c])


@njit(**JIT)
def silu_mul(gate_up, out):
    """out = silu(gate) * up. gate_up (rows, 2C): gate in the first half of a row, up in the second; out (rows, C)."""
    n = out.shape[1]
    for r in range(out.shape[0]):
        for c in range(n):
            out[r, c] = silu_of(gate_up[r, c]) * gate_up[r, n + c]


@njit(**JIT)
def softmax(x, scale, seen):
    """Each row becomes softmax(scale * row), in place. x (rows, keys).

    Row r sees the first `seen` + r keys, or all if there are not as many; the others get zero.
    """
    for r in range(x.shape[0]):
        n = min(x.shape[1], seen + r)
        x[r, n:] = f32(0)
        row = x[r, :n]
        top = row[0]
        for c in range(n):
            top = max(top, row[c])
        total = f32(0)
        for c in range(n):
            row[c] = exp_of((row[c] - top) * scale)
            total += row[c]
        inverse = f32(1) / total
        for c in range(n):
            row[c] *= inverse


@njit(**JIT)
def matvec(matrix, vector, out):
    """out = matrix @ vector. matrix (rows, C), float32 or bits of bfloat16."""
    for r in range(matrix.shape[0]):
        total = f32(0)
        for c in range(matrix.shape[1]):
            total += to_float32(matrix[r, c]) * vector[c]
        out[r] = total
