"""Depthwise convolution, NHWC, with bias and an optional exact GELU behind it."""

from __future__ import annotations

import mlx.core as mx
import numpy as np

from mlx_fastvlm.kernels import cpu
from mlx_fastvlm.kernels.gelu import fused_gelu, gelu_reference

_ROWS_PER_BLOCK = 8  # output rows; their input rows stay in L2


def depthwise_conv(x: mx.array, weight: mx.array, bias: mx.array, stride: int = 1, gelu: bool = False) -> mx.array:
    """One k×k filter per output channel, zero padding k // 2; output channel o reads input channel o // multiplier.

    Args:
        x: (B, H, W, C).
        weight: (C · multiplier, k, k, 1), k odd.
        bias: (C · multiplier,).
        stride: 1 or 2.
        gelu: apply exact GELU to the result.

    Returns:
        (B, ceil(H / stride), ceil(W / stride), C · multiplier).
    """
    # Eight taps of MLX's loop take as long as one of the elementwise functions that `suits` counts.
    if cpu.suits(x, x.size * weight.shape[1] ** 2 // 8):
        return depthwise_conv_cpu(x, weight, bias, stride, gelu)
    y = depthwise_conv_reference(x, weight, bias, stride)
    return fused_gelu(y) if gelu else y


def depthwise_conv_cpu(x: mx.array, weight: mx.array, bias: mx.array, stride: int = 1, gelu: bool = False) -> mx.array:
    """`depthwise_conv` by compiled loops over output rows, on all cores."""
    batch, height, width, channels = x.shape
    kernel, multiplier = weight.shape[1], weight.shape[0] // channels
    out = cpu.output((batch, -(-height // stride), -(-width // stride), weight.shape[0]), x)
    source, target = cpu.view(x), np.asarray(out)
    taps = cpu.view(weight).reshape(-1, kernel, kernel).transpose(1, 2, 0)
    offsets = cpu.view(bias)
    for image in range(batch):
        for m in range(multiplier):
            # For a fixed m the outputs m, m + multiplier, ... read the inputs 0, 1, ...: a plain depthwise convolution.
            part_taps, part_offsets = (np.ascontiguousarray(part[..., m::multiplier]) for part in (taps, offsets))
            part_target = target[image, :, :, m::multiplier]

            def block(
                start: int, stop: int, image=image, taps=part_taps, offsets=part_offsets, target=part_target
            ) -> None:
                cpu.loops().depthwise_rows(source[image], taps, offsets, target, stride, start, stop, gelu)

            cpu.in_blocks(block, target.shape[1], _ROWS_PER_BLOCK)
    return out


def depthwise_conv_reference(
    x: mx.array, weight: mx.array, bias: mx.array, stride: int = 1, gelu: bool = False
) -> mx.array:
    """`depthwise_conv` in plain MLX ops."""
    y = mx.conv2d(x, weight, stride=stride, padding=weight.shape[1] // 2, groups=x.shape[-1]) + bias
    return gelu_reference(y) if gelu else y
