"""Depthwise convolution on a CPU: blocks of output rows and channels on all cores."""

from __future__ import annotations

import mlx.core as mx
import numpy as np

from mlx_fastvlm.kernels import cpu

_COPY_BYTES = 400_000  # of the input rows of a block, a few channels at a time: they stay in L2


def depthwise_conv_cpu(x: mx.array, weight: mx.array, bias: mx.array, stride: int = 1, gelu: bool = False) -> mx.array:
    """`depthwise_conv` by compiled loops."""
    batch, height, width, channels = x.shape
    kernel, multiplier = weight.shape[1], weight.shape[0] // channels
    out = cpu.output((batch, -(-height // stride), -(-width // stride), weight.shape[0]), x)
    source, target = cpu.view(x), cpu.view(out)
    taps = cpu.view(weight).reshape(channels, multiplier, kernel, kernel).transpose(1, 2, 3, 0)
    taps, offsets = np.ascontiguousarray(taps), np.ascontiguousarray(cpu.view(bias).reshape(channels, multiplier).T)
    pixel_bytes = cpu.depthwise_loops().CHANNELS * source.itemsize
    rows = max(4, (_COPY_BYTES // (width * pixel_bytes) - kernel) // stride)
    for image in range(batch):
        for nth in range(multiplier):
            arguments = source[image], taps[nth], offsets[nth], target[image], nth, stride
            cpu.in_blocks(
                lambda start, stop, arguments=arguments: cpu.depthwise_loops().depthwise_rows(
                    *arguments, start, stop, gelu
                ),
                out.shape[1],
                rows,
            )
    return out
