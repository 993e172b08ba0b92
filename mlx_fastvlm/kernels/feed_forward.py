"""The two Linear layers of FastViTHD's ConvFFN with GELU between and the skip connection around."""

from __future__ import annotations

import mlx.core as mx

from mlx_fastvlm.kernels import cpu
from mlx_fastvlm.kernels.gelu import gelu_reference
from mlx_fastvlm.kernels.linear import linear_reference
from mlx_fastvlm.kernels.linear_epilogue import linear_add, linear_gelu

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
    return linear_add(linear_gelu(x, *fc1), *fc2, residual)


def feed_forward_cpu(x: mx.array, fc1: Linear, fc2: Linear, residual: mx.array) -> mx.array:
    """`feed_forward` block by block: the hidden layer, four times the map, never exists as a whole."""
    out = cpu.output(x.shape, x, residual)
    source, skipped, target = cpu.rows(x), cpu.rows(residual), cpu.rows(out)
    layers = [array for weight, bias in (fc1, fc2) for array in (cpu.weight(weight), cpu.view(bias))]
    cpu.in_blocks(
        lambda start, stop: cpu.panels().feed_forward_rows(source, *layers, skipped, target, start, stop),
        len(source),
        cpu.ROWS,
        cpu.panels().PANEL,
        work=len(source) * (fc1[0].size + fc2[0].size),
    )
    return out


def feed_forward_reference(x: mx.array, fc1: Linear, fc2: Linear, residual: mx.array) -> mx.array:
    """`feed_forward` in plain MLX ops."""
    return residual + linear_reference(gelu_reference(linear_reference(x, *fc1)), *fc2)
