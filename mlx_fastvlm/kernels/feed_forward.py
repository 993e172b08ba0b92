"""The two Linear layers of FastViTHD's ConvFFN with GELU between and the skip connection around."""

from __future__ import annotations

import mlx.core as mx
import numpy as np

from mlx_fastvlm.kernels import cpu
from mlx_fastvlm.kernels.gelu import linear_gelu

Linear = tuple[mx.array, mx.array]  # weight (O, C), bias (O,)


def feed_forward(x: mx.array, fc1: Linear, fc2: Linear, residual: mx.array) -> mx.array:
    """residual + fc2(gelu(fc1(x))).

    Args:
        x, residual: (..., C).
        fc1: weight (H, C), bias (H,).
        fc2: weight (C, H), bias (C,).

    Returns:
        (..., C).
    """
    if cpu.suits(x, x.size // fc1[0].shape[1] * fc1[0].shape[0]):
        return feed_forward_cpu(x, fc1, fc2, residual)
    return feed_forward_reference(x, fc1, fc2, residual)


def feed_forward_cpu(x: mx.array, fc1: Linear, fc2: Linear, residual: mx.array) -> mx.array:
    """`feed_forward` block by block: the hidden layer, four times the map, never exists as a whole."""
    out = cpu.output(x.shape, x, residual)
    source, skipped, target = cpu.rows(x), cpu.rows(residual), cpu.rows(out)
    (weight1, bias1), (weight2, bias2) = ((cpu.view(weight), cpu.view(bias)) for weight, bias in (fc1, fc2))

    def block(start: int, stop: int) -> None:
        hidden = np.empty((stop - start, len(weight1)), np.float32)
        cpu.matmul_t(source[start:stop], weight1, hidden)
        cpu.loops().bias_gelu(hidden, bias1)
        cpu.loops().add_bias(skipped[start:stop], bias2, target[start:stop])
        cpu.matmul_t(hidden, weight2, target[start:stop], add=True)

    cpu.in_blocks(block, len(source), cpu.ROWS)
    return out


def feed_forward_reference(x: mx.array, fc1: Linear, fc2: Linear, residual: mx.array) -> mx.array:
    """`feed_forward` in plain MLX ops (and `linear_gelu`)."""
    weight, bias = fc2
    return residual + mx.addmm(bias, linear_gelu(x, *fc1), weight.T)
