"""Exact (erf) GELU, alone and behind a Linear layer."""

import math

import mlx.core as mx


def gelu(x: mx.array) -> mx.array:
    return x * (1 + mx.erf(x / math.sqrt(2))) * 0.5


def linear_gelu(x: mx.array, weight: mx.array, bias: mx.array) -> mx.array:
    return gelu(mx.addmm(bias, x, weight.T))
