"""A Linear layer that is fast for one row too, which is what decoding needs."""

from __future__ import annotations

import mlx.core as mx

from mlx_fastvlm.kernels import cpu


def linear(x: mx.array, weight: mx.array, bias: mx.array | None = None) -> mx.array:
    """x @ weightᵀ + bias: x (..., C), weight (O, C), bias (O,) → (..., O)."""
    if x.size == x.shape[-1] and cpu.suits(x, weight.size):
        return linear_cpu(x, weight, bias)
    return linear_reference(x, weight, bias)


def linear_cpu(x: mx.array, weight: mx.array, bias: mx.array | None = None) -> mx.array:
    """`linear` for one row in all: the weight is read once, a share of its rows on each core."""
    out = cpu.output((*x.shape[:-1], weight.shape[0]), x)
    matrix, vector, target = cpu.view(weight), cpu.rows(x)[0], cpu.rows(out)[0]

    def block(start: int, stop: int) -> None:
        cpu.matvec(matrix[start:stop], vector, target[start:stop])

    cpu.in_blocks(block, len(matrix), len(matrix))
    return out if bias is None else out + bias


def linear_reference(x: mx.array, weight: mx.array, bias: mx.array | None = None) -> mx.array:
    """`linear` in plain MLX ops."""
    return x @ weight.T if bias is None else mx.addmm(bias, x, weight.T)
