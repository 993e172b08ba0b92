"""Exact (erf) GELU, alone and behind a Linear layer."""

from __future__ import annotations

import functools
import math
from collections.abc import Callable

import mlx.core as mx
import numpy as np

from mlx_fastvlm.kernels import cpu


def gelu(x: mx.array) -> mx.array:
    """x · Φ(x), elementwise: (..., C) → (..., C)."""
    if cpu.suits(x, x.size):
        return gelu_cpu(x)
    return _gelu_fused()(x)


def linear_gelu(x: mx.array, weight: mx.array, bias: mx.array) -> mx.array:
    """GELU of a Linear layer: x (..., C), weight (O, C), bias (O,) → (..., O)."""
    if cpu.suits(x, x.size // weight.shape[1] * weight.shape[0]):
        return linear_gelu_cpu(x, weight, bias)
    return _gelu_fused()(mx.addmm(bias, x, weight.T))


def gelu_cpu(x: mx.array) -> mx.array:
    """`gelu` by a compiled loop, on all cores."""
    out = cpu.output(x.shape, x)
    source, target = cpu.rows(x), cpu.rows(out)
    no_bias = np.zeros(x.shape[-1], np.float32)

    def block(start: int, stop: int) -> None:
        target[start:stop] = source[start:stop]
        cpu.loops().bias_gelu(target[start:stop], no_bias)

    cpu.in_blocks(block, len(source), 4 * cpu.ROWS)
    return out


def linear_gelu_cpu(x: mx.array, weight: mx.array, bias: mx.array) -> mx.array:
    """`linear_gelu` block by block, the GELU while a block is in cache."""
    out = cpu.output((*x.shape[:-1], weight.shape[0]), x)
    source, target, matrix, offsets = cpu.rows(x), cpu.rows(out), cpu.view(weight), cpu.view(bias)

    def block(start: int, stop: int) -> None:
        cpu.matmul_t(source[start:stop], matrix, target[start:stop])
        cpu.loops().bias_gelu(target[start:stop], offsets)

    cpu.in_blocks(block, len(source), cpu.ROWS)
    return out


def gelu_reference(x: mx.array) -> mx.array:
    """`gelu` in plain MLX ops (Hendrycks and Gimpel, arXiv 1606.08415)."""
    return x * (1 + mx.erf(x / math.sqrt(2))) * 0.5


def _gelu_fused() -> Callable[[mx.array], mx.array]:
    """One fused kernel on a GPU. On a CPU MLX would call a C++ compiler for that, seconds per kernel: plain ops there."""
    return gelu_reference if mx.default_device().type == mx.DeviceType.cpu else _compiled()


@functools.cache
def _compiled() -> Callable[[mx.array], mx.array]:
    return mx.compile(gelu_reference, shapeless=True)
