"""The tower's first convolution, the only dense one: 3×3, stride 2, with bias and GELU."""

from __future__ import annotations

import mlx.core as mx
import numpy as np

from mlx_fastvlm.kernels import cpu
from mlx_fastvlm.kernels.gelu import fused_gelu, gelu_reference

_ROWS = 8  # output rows of a block


def stem_conv(x: mx.array, weight: mx.array, bias: mx.array) -> mx.array:
    """GELU of a 3×3 convolution with stride 2 and padding 1.

    Args:
        x: (B, H, W, C), H and W even.
        weight: (O, 3, 3, C).
        bias: (O,).

    Returns:
        (B, H/2, W/2, O).
    """
    if cpu.suits(x, x.size // x.shape[-1] // 4 * len(weight)):
        return stem_conv_cpu(x, weight, bias)
    return fused_gelu(_conv(x, weight, bias))


def stem_conv_cpu(x: mx.array, weight: mx.array, bias: mx.array) -> mx.array:
    """`stem_conv` as a matrix product over the 3×3 patches, block by block."""
    batch, height, width, channels = x.shape
    out = cpu.output((batch, height // 2, width // 2, len(weight)), x)
    source, target, offsets = cpu.view(x), cpu.view(out), cpu.view(bias)
    matrix = cpu.view(weight).reshape(len(weight), -1)

    def block(start: int, stop: int) -> None:
        for image in range(batch):
            patches = _patches(source[image], start, stop)
            rows = target[image, start:stop].reshape(-1, len(matrix))
            cpu.panels().linear_rows(patches, matrix, offsets, rows, 0, len(rows), True)

    cpu.in_blocks(block, height // 2, _ROWS)
    return out


def stem_conv_reference(x: mx.array, weight: mx.array, bias: mx.array) -> mx.array:
    """`stem_conv` in plain MLX ops."""
    return gelu_reference(_conv(x, weight, bias))


def _conv(x: mx.array, weight: mx.array, bias: mx.array) -> mx.array:
    return mx.conv2d(x, weight, stride=2, padding=1) + bias


def _patches(x: np.ndarray, start: int, stop: int) -> np.ndarray:
    """What output rows [start, stop) see of x (H, W, C): (rows · W/2, 9 · C)."""
    height, width, channels = x.shape
    padded = np.zeros((2 * (stop - start) + 1, width + 1, channels), x.dtype)  # with the row above and column before
    first = max(0, 2 * start - 1)
    padded[first - (2 * start - 1) :, 1:] = x[first : 2 * stop]
    row, column, channel = padded.strides
    shape = (stop - start, width // 2, 3, 3 * channels)  # three pixels of a row lie side by side
    patches = np.lib.stride_tricks.as_strided(padded, shape, (2 * row, 2 * column, row, channel))
    return patches.reshape(-1, 9 * channels)
