"""Self-attention without a mask, straight from the joint q/k/v projection, as FastViTHD's stages 4 and 5 use it."""

from __future__ import annotations

import mlx.core as mx
import numpy as np

from mlx_fastvlm.kernels import cpu


def self_attention(qkv: mx.array, head_dim: int) -> mx.array:
    """softmax(q kᵀ / √head_dim) v for every head.

    Args:
        qkv: (B, N, 3·C): all queries, all keys, all values, each C = heads · head_dim wide.
        head_dim: width of a head.

    Returns:
        (B, N, C).
    """
    batch, tokens, width = qkv.shape
    if cpu.suits(qkv, batch * tokens**2 * (width // 3 // head_dim)):
        return self_attention_cpu(qkv, head_dim)
    return self_attention_reference(qkv, head_dim)


def self_attention_cpu(qkv: mx.array, head_dim: int) -> mx.array:
    """`self_attention` by blocks of queries; heads are read in place."""
    batch, tokens, width = qkv.shape
    channels = width // 3
    out = cpu.output((batch, tokens, channels), qkv)
    source, target = cpu.view(qkv), cpu.view(out)
    parts = -(-tokens // cpu.ROWS)
    grid = (batch, channels // head_dim, parts)

    def block(start: int, stop: int) -> None:
        for index in range(start, stop):
            image, head, part = np.unravel_index(index, grid)
            rows = slice(part * cpu.ROWS, min(tokens, (part + 1) * cpu.ROWS))
            columns = slice(head * head_dim, (head + 1) * head_dim)
            q, k, v = (source[image, :, i * channels : (i + 1) * channels][:, columns] for i in range(3))
            scores = np.empty((rows.stop - rows.start, tokens), np.float32)
            cpu.matmul_t(q[rows], k, scores)
            cpu.loops().softmax(scores, np.float32(head_dim**-0.5))
            cpu.matmul(scores, v, target[image, rows, columns])

    cpu.in_blocks(block, int(np.prod(grid)), 1)
    return out


def self_attention_reference(qkv: mx.array, head_dim: int) -> mx.array:
    """`self_attention` through MLX's own attention."""
    batch, tokens, width = qkv.shape
    q, k, v = qkv.reshape(batch, tokens, 3, -1, head_dim).transpose(2, 0, 3, 1, 4)
    out = mx.fast.scaled_dot_product_attention(q, k, v, scale=head_dim**-0.5)
    return out.transpose(0, 2, 1, 3).reshape(batch, tokens, width // 3)
