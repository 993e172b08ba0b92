"""The depthwise convolution's compiled loops: tiles of outputs are summed in registers.

The channels and rows that a tile needs are first copied side by side, with the zeros around the map: then no tile has an
edge. LLVM's vectorizer does not keep a tile in registers, so that `_sum_taps` spells the vectors out; they are portable.
Compiled by numba like cpu_loops.py, and imported as late.
"""

import numpy as np
from llvmlite import ir
from numba import njit, types
from numba.core import cgutils
from numba.extending import intrinsic

from mlx_fastvlm.kernels.cpu_loops import JIT, gelu_of

LANES = 8  # channels of a vector
TILE = 8  # outputs along the row that are summed together
CHANNELS = 2 * LANES  # copied together: a cache line

_vector = ir.VectorType(ir.FloatType(), LANES)


@intrinsic
def _sum_taps(typing, x, row_step, pixel_step, taps, kernel, bias, sums):
    """sums[t] = bias + Σ x[i, t · stride + j] · taps[i, j] over a kernel, for t < TILE and LANES channels.

    x, taps, bias, sums: addresses of float32, CHANNELS a pixel. x: the tile's first input; row_step, pixel_step: pixels
    from one row to the next and from one output's input to the next. taps (kernel, kernel), sums (TILE,) pixels.
    """

    def generate(context, builder, signature, arguments):
        x, row_step, pixel_step, taps, kernel, bias, sums = arguments
        x, taps, bias, sums = (builder.inttoptr(address, _vector.as_pointer()) for address in (x, taps, bias, sums))

        vectors = context.get_constant(types.intp, CHANNELS // LANES)

        def at(base, index):
            return builder.gep(base, [builder.mul(index, vectors)])

        def load(base, index):
            value = builder.load(at(base, index))
            value.align = 4
            return value

        outputs = [context.get_constant(types.intp, t) for t in range(TILE)]
        totals = [cgutils.alloca_once_value(builder, load(bias, outputs[0])) for _ in outputs]
        with cgutils.for_range(builder, kernel) as row, cgutils.for_range(builder, kernel) as column:
            tap = load(taps, builder.add(builder.mul(row.index, kernel), column.index))
            first = builder.add(builder.mul(row.index, row_step), column.index)
            for t, total in zip(outputs, totals, strict=True):
                value = load(x, builder.add(first, builder.mul(t, pixel_step)))
                product = builder.fmul(value, tap, flags=("contract",))  # may become one instruction with the addition
                builder.store(builder.fadd(builder.load(total), product, flags=("contract",)), total)
        for t, total in zip(outputs, totals, strict=True):
            builder.store(builder.load(total), at(sums, t)).align = 4
        return context.get_dummy_value()

    return types.void(*[types.intp] * 7), generate


@intrinsic
def _copy_pixel(typing, source, target):
    """Copies CHANNELS float32 from one address to another."""

    def generate(context, builder, signature, arguments):
        pixel = ir.VectorType(ir.FloatType(), CHANNELS).as_pointer()
        source, target = (builder.inttoptr(address, pixel) for address in arguments)
        value = builder.load(source)
        value.align = 4
        builder.store(value, target).align = 4
        return context.get_dummy_value()

    return types.void(types.intp, types.intp), generate


@njit(**JIT)
def depthwise_rows(x, weight, bias, out, nth, stride, start, stop, gelu):
    """Output rows [start, stop) of a depthwise convolution with zero padding K // 2.

    x (H, W, C), weight (K, K, C), bias (C,). out (H', W', C · multiplier): channel c becomes c · multiplier + nth.
    """
    channels, kernel, width = x.shape[2], weight.shape[0], out.shape[1]
    tiled_width = -(-width // TILE) * TILE  # whole tiles are computed, also where `out` ends within one
    copied = np.zeros(((stop - start - 1) * stride + kernel, (tiled_width - 1) * stride + kernel, CHANNELS), np.float32)
    taps = np.zeros((kernel, kernel, CHANNELS), np.float32)
    offsets = np.zeros(CHANNELS, np.float32)
    sums = np.empty(tiled_width * CHANNELS, np.float32)
    row_bytes, pixel_bytes, vector_bytes = copied.strides[0], copied.strides[1], LANES * copied.strides[2]
    for first in range(0, channels, CHANNELS):
        count = min(CHANNELS, channels - first)
        for c in range(count):  # not as slices, whose error messages take numba seconds to compile
            offsets[c] = bias[first + c]
            for i in range(kernel):
                for j in range(kernel):
                    taps[i, j, c] = weight[i, j, first + c]
        _copy_channels(x, first, count, copied, start * stride - kernel // 2, kernel // 2)
        for h in range(stop - start):
            for o in range(0, width, TILE):
                for lane in range(0, count * copied.strides[2], vector_bytes):
                    _sum_taps(
                        copied.ctypes.data + h * stride * row_bytes + o * stride * pixel_bytes + lane,
                        copied.shape[1], stride, taps.ctypes.data + lane, kernel,
                        offsets.ctypes.data + lane, sums.ctypes.data + o * pixel_bytes + lane,
                    )  # fmt: skip
            if gelu:
                for i in range(sums.size):
                    sums[i] = gelu_of(sums[i])
            _place_channels(sums, out[start + h], first, count, nth, out.shape[2] // channels)


@njit(**JIT)
def _copy_channels(x, first, count, copied, top, left):
    """Rows of x (H, W, C) from `top` on into `copied`, `left` pixels in; rows outside x become zero."""
    for i in range(copied.shape[0]):
        if top + i < 0 or top + i >= x.shape[0]:
            copied[i] = np.float32(0)
            continue
        for w in range(min(x.shape[1], copied.shape[1] - left)):
            if count == CHANNELS:
                source = x.ctypes.data + (top + i) * x.strides[0] + w * x.strides[1] + first * x.strides[2]
                _copy_pixel(source, copied.ctypes.data + i * copied.strides[0] + (left + w) * copied.strides[1])
            else:
                for c in range(count):
                    copied[i, left + w, c] = x[top + i, w, first + c]


@njit(**JIT)
def _place_channels(sums, out, first, count, nth, multiplier):
    """Sums (W',) pixels to their places in a row of outputs (W', C · multiplier)."""
    for w in range(out.shape[0]):
        if count == CHANNELS and multiplier == 1:
            target = out.ctypes.data + w * out.strides[0] + first * out.strides[1]
            _copy_pixel(sums.ctypes.data + w * CHANNELS * out.strides[1], target)
        else:
            for c in range(count):
                out[w, (first + c) * multiplier + nth] = sums[w * CHANNELS + c]
