"""Causal attention over keys and values that are stored quantized."""

from __future__ import annotations

import mlx.core as mx

from mlx_fastvlm.kernels.choice import reference_only

Quantized = tuple[mx.array, mx.array, mx.array]  # packed values, scales, biases, as mx.quantize returns them


def quantized_attention(
    queries: mx.array, keys: Quantized, values: Quantized, scale: float, group_size: int, bits: int
) -> mx.array:
    """softmax(scale · q kᵀ) v, position by position.

    Args:
        queries: (B, heads, L, head_dim); they are the last L positions.
        keys, values: of all N positions, each array (B, key/value heads, N, …).
        scale: of the scores.
        group_size, bits: how keys and values are quantized along head_dim.

    Returns:
        (B, heads, L, head_dim).
    """
    if queries.shape[2] > 1 or reference_only():
        return quantized_attention_reference(queries, keys, values, scale, group_size, bits)
    batch, heads, _, head_dim = queries.shape
    kv_heads = keys[0].shape[1]
    # One query position: the heads that share keys become its rows, and nothing is unpacked.
    rows = queries.reshape(batch, kv_heads, heads // kv_heads, head_dim) * scale
    scores = mx.quantized_matmul(rows, *keys, transpose=True, group_size=group_size, bits=bits)
    weights = mx.softmax(scores, axis=-1, precise=True)
    out = mx.quantized_matmul(weights, *values, transpose=False, group_size=group_size, bits=bits)
    return out.reshape(batch, heads, 1, head_dim)


def quantized_attention_reference(
    queries: mx.array, keys: Quantized, values: Quantized, scale: float, group_size: int, bits: int
) -> mx.array:
    """`quantized_attention` on unpacked keys and values."""
    k, v = (mx.dequantize(*array, group_size=group_size, bits=bits) for array in (keys, values))
    mask = "causal" if queries.shape[2] > 1 else None
    return mx.fast.scaled_dot_product_attention(queries, k, v, scale=scale, mask=mask)
