"""Grouped-query attention of new positions over all positions so far: the decoder's, on its key/value cache."""

from __future__ import annotations

import mlx.core as mx
import numpy as np

from mlx_fastvlm.kernels import cpu


def causal_attention(
    queries: mx.array, keys: mx.array, values: mx.array, scale: float, padding: mx.array | None = None
) -> mx.array:
    """softmax(scale · q kᵀ) v, each position seeing itself and all before it.

    Args:
        queries: (B, heads, L, head_dim); they are the last L positions.
        keys, values: (B, key/value heads, N, head_dim) of all N positions.
        scale: of the scores.
        padding: (B,) int32, how many of a sequence's N positions are none and stand before its first; at most N - L.
            None where all sequences are equally long.

    Returns:
        (B, heads, L, head_dim).
    """
    if cpu.suits(queries, queries.size // queries.shape[-1] * keys.shape[2]):
        return causal_attention_cpu(queries, keys, values, scale, padding)
    return causal_attention_reference(queries, keys, values, scale, padding)


def causal_attention_cpu(
    queries: mx.array, keys: mx.array, values: mx.array, scale: float, padding: mx.array | None = None
) -> mx.array:
    """`causal_attention` by heads and blocks of queries, which skip the keys that none of them sees."""
    batch, heads, length, head_dim = queries.shape
    # Heads side by side in memory: what follows joins them into rows.
    out = cpu.output((batch, length, heads, head_dim), queries, keys, values)
    arrays = (np.asarray(array) for array in (queries, keys, values))
    padding = None if padding is None else np.asarray(padding)
    cpu.attend(*arrays, np.asarray(out).transpose(0, 2, 1, 3), scale, causal=True, padding=padding)
    return out.transpose(0, 2, 1, 3)


def causal_attention_reference(
    queries: mx.array, keys: mx.array, values: mx.array, scale: float, padding: mx.array | None = None
) -> mx.array:
    """`causal_attention` through MLX's own attention."""
    mask = "causal" if queries.shape[2] > 1 else None
    if padding is not None:
        mask = _seen(queries.shape[2], keys.shape[2], padding)
    return mx.fast.scaled_dot_product_attention(queries, keys, values, scale=scale, mask=mask)


def _seen(length: int, positions: int, padding: mx.array) -> mx.array:
    """(B, 1, L, N): whether a query sees a position."""
    columns = mx.arange(positions)
    seen = columns >= padding[:, None, None, None]
    return seen if length == 1 else seen & (columns <= mx.arange(positions - length, positions)[:, None])
