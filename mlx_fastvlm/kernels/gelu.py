"""Exact (erf) GELU, elementwise."""

from __future__ import annotations

import math

import mlx.core as mx
import numpy as np

from mlx_fastvlm.kernels import cpu
from mlx_fastvlm.kernels.choice import fused_on_gpu


def gelu(x: mx.array) -> mx.array:
    """x · Φ(x), elementwise: (..., C) → (..., C)."""
    if cpu.suits(x, x.size):
        return gelu_cpu(x)
    return fused_gelu(x)


def gelu_cpu(x: mx.array) -> mx.array:
    """`gelu` by a compiled loop, on all cores."""
    out = cpu.output(x.shape, x)
    source, target = cpu.rows(x), cpu.rows(out)
    no_bias = np.zeros(x.shape[-1], np.float32)

    def block(start: int, stop: int) -> None:
        target[start:stop] = source[start:stop]
        cpu.loops().bias_gelu(target[start:stop], no_bias)

    cpu.in_blocks(block, len(source), cpu.ROWS)
    return out


def gelu_reference(x: mx.array) -> mx.array:
    """`gelu` in plain MLX ops (Hendrycks and Gimpel, arXiv 1606.08415), computed in float32 as PyTorch does."""
    y = x.astype(mx.float32)
    return (y * (1 + mx.erf(y / math.sqrt(2))) * 0.5).astype(x.dtype)


def fused_gelu(x: mx.array) -> mx.array:
    """`gelu_reference` as one kernel where MLX can fuse it."""
    return fused_on_gpu(gelu_reference, _gelu_compiled)(x)


_gelu_compiled = mx.compile(gelu_reference, shapeless=True)
