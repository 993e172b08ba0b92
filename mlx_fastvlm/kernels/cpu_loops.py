"""The float32 loops that MLX's CPU backend is slow at, compiled by numba on first use and kept in its disk cache.

Each runs on the calling thread without the GIL; cpu.py spreads them over threads. Importing this imports numba (about
0.3 s), so cpu.py does it only when a large model needs it. Arrays are NumPy views of MLX buffers.
"""

import numpy as np
from numba import njit

# Not the whole of fastmath: infinities and NaN must survive, so that a broken checkpoint still shows itself.
_JIT = {"nogil": True, "cache": True, "error_model": "numpy", "fastmath": {"contract", "reassoc", "nsz", "arcp"}}
f32 = np.float32


@njit(inline="always", **_JIT)
def _gelu(x):
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


@njit(inline="always", **_JIT)
def _exp_parts(x):
    """Splits exp(x), x <= 0, into 2**f (a degree-6 polynomial) and the bits of the float 2**k: no libm, so it vectorizes."""
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
    return p, (np.int32(k) + np.int32(127)) << np.int32(23)


@njit(**_JIT)
def bias_gelu(x, bias):
    """x[r] = gelu(x[r] + bias), in place. x (rows, C), bias (C,)."""
    for r in range(x.shape[0]):
        for c in range(x.shape[1]):
            x[r, c] = _gelu(x[r, c] + bias[c])


@njit(**_JIT)
def add_bias(x, bias, out):
    """out[r] = x[r] + bias. x, out (rows, C), may be the same array; bias (C,)."""
    for r in range(x.shape[0]):
        for c in range(x.shape[1]):
            out[r, c] = x[r, c] + bias[c]


@njit(**_JIT)
def silu_mul(gate_up, out):
    """out = silu(gate) * up. gate_up (rows, 2C): gate in the first half of a row, up in the second; out (rows, C)."""
    n = out.shape[1]
    bits = np.empty(n, np.int32)
    pow2 = bits.view(np.float32)
    for r in range(out.shape[0]):
        for c in range(n):
            out[r, c], bits[c] = _exp_parts(-abs(gate_up[r, c]))
        for c in range(n):
            g = gate_up[r, c]
            e = out[r, c] * pow2[c]
            s = f32(1) / (f32(1) + e)
            out[r, c] = g * (s if g >= f32(0) else e * s) * gate_up[r, n + c]


@njit(**_JIT)
def softmax(x, scale):
    """Each row becomes softmax(scale * row), in place. x (rows, keys)."""
    n = x.shape[1]
    bits = np.empty(n, np.int32)
    pow2 = bits.view(np.float32)
    for r in range(x.shape[0]):
        row = x[r]
        top = row[0]
        for c in range(n):
            top = max(top, row[c])
        for c in range(n):
            row[c], bits[c] = _exp_parts((row[c] - top) * scale)
        total = f32(0)
        for c in range(n):
            row[c] *= pow2[c]
            total += row[c]
        inverse = f32(1) / total
        for c in range(n):
            row[c] *= inverse


@njit(**_JIT)
def depthwise_rows(x, weight, bias, out, stride, start, stop, gelu):
    """Output rows [start, stop) of a depthwise convolution with zero padding K // 2.

    x (H, W, C), weight (K, K, C), bias (C,), out (H', W', C), which may be a strided view.
    """
    height, width, channels = x.shape
    kernel = weight.shape[0]
    # A whole output row is summed tap by tap: the innermost loop is over contiguous channels, which is what vectorizes.
    row = np.empty((out.shape[1], channels), np.float32)
    for h in range(start, stop):
        for o in range(row.shape[0]):
            row[o] = bias
        for i in range(kernel):
            y = h * stride + i - kernel // 2
            if y < 0 or y >= height:
                continue
            for o in range(row.shape[0]):
                acc = row[o]
                left = o * stride - kernel // 2
                for j in range(max(0, -left), min(kernel, width - left)):
                    src = x[y, left + j]
                    tap = weight[i, j]
                    for c in range(channels):
                        acc[c] += src[c] * tap[c]
        for o in range(row.shape[0]):
            for c in range(channels):
                out[h, o, c] = _gelu(row[o, c]) if gelu else row[o, c]
