"""Self-attention without a mask, straight from the joint q/k/v projection, as FastViTHD's stages 4 and 5 use it.

MLX has no fused attention for heads of 32 channels. On a GPU a thread here keeps QUERIES queries and their running sums
in registers, while a threadgroup brings blocks of keys and values into its memory, which all its threads read in step;
the softmax is the online one (Milakov and Gimelshein, arXiv 1805.02867). Scores are never written and no head is copied.
The other way, for GPUs whose matrix units are far ahead of the rest: zeros widen the heads to what MLX's kernel takes.
"""

from __future__ import annotations

import math

import mlx.core as mx

from mlx_fastvlm.kernels import cpu
from mlx_fastvlm.kernels.fused_op import FusedOp, Launch, random_array
from mlx_fastvlm.kernels.gpu import GpuKernel, vector_loads

_MLX_HEAD_DIM = 64  # the narrowest head for which MLX has a fused kernel

KERNEL = GpuKernel(
    name="self_attention",
    inputs=("qkv", "scale"),
    outputs=("out",),
    source="""
    // qkv (B, N, 3C), scale (1) float, of the scores times log2(e). A threadgroup takes THREADS*QUERIES queries of a head.
    constexpr int FOURS = WIDTH / 4;
    constexpr int STEP = 8;                                  // keys between two updates of the running maximum
    threadgroup vec<float, 4> keys[BLOCK * FOURS];
    threadgroup vec<float, 4> values[BLOCK * FOURS];

    const int N = qkv_shape[1], C = qkv_shape[2] / 3;
    const int head = int(threadgroup_position_in_grid.y), image = int(threadgroup_position_in_grid.z);
    const int thread_index = int(thread_index_in_threadgroup);
    const int first = (int(threadgroup_position_in_grid.x) * THREADS + thread_index) * QUERIES;
    const device T* source = qkv + size_t(image) * N * 3 * C + head * WIDTH;

    float4 query[QUERIES][FOURS], sums[QUERIES][FOURS];
    float top[QUERIES], total[QUERIES];
    #pragma unroll
    for (int q = 0; q < QUERIES; ++q) {
        top[q] = -1e30f;
        total[q] = 0.0f;
        #pragma unroll
        for (int i = 0; i < FOURS; ++i) {
            sums[q][i] = float4(0.0f);
            query[q][i] = float4(0.0f);
            if (first + q < N) {
                query[q][i] = float4(*(const device vec<T, 4>*)(source + size_t(first + q) * 3 * C + 4 * i)) * scale[0];
            }
        }
    }
    for (int start = 0; start < N; start += BLOCK) {
        threadgroup_barrier(mem_flags::mem_threadgroup);
        for (int i = thread_index; i < BLOCK * FOURS; i += THREADS) {
            const int n = start + i / FOURS;
            const device T* row = source + size_t(n) * 3 * C + i % FOURS * 4;
            keys[i] = n < N ? float4(*(const device vec<T, 4>*)(row + C)) : float4(0.0f);
            values[i] = n < N ? float4(*(const device vec<T, 4>*)(row + 2 * C)) : float4(0.0f);
        }
        threadgroup_barrier(mem_flags::mem_threadgroup);
        for (int base = 0; base < BLOCK; base += STEP) {
            float score[QUERIES][STEP];
            #pragma unroll
            for (int j = 0; j < STEP; ++j) {
                float4 parts[QUERIES];
                #pragma unroll
                for (int q = 0; q < QUERIES; ++q) {
                    parts[q] = float4(0.0f);
                }
                #pragma unroll
                for (int i = 0; i < FOURS; ++i) {
                    const float4 key = keys[(base + j) * FOURS + i];
                    #pragma unroll
                    for (int q = 0; q < QUERIES; ++q) {
                        parts[q] += query[q][i] * key;
                    }
                }
                #pragma unroll
                for (int q = 0; q < QUERIES; ++q) {
                    const float sum = parts[q].x + parts[q].y + parts[q].z + parts[q].w;
                    score[q][j] = start + base + j < N ? sum : -1e30f;
                }
            }
            #pragma unroll
            for (int q = 0; q < QUERIES; ++q) {
                float highest = top[q];
                #pragma unroll
                for (int j = 0; j < STEP; ++j) {
                    highest = metal::max(highest, score[q][j]);
                }
                const float shrink = metal::exp2(top[q] - highest);
                top[q] = highest;
                total[q] *= shrink;
                #pragma unroll
                for (int i = 0; i < FOURS; ++i) {
                    sums[q][i] = sums[q][i] * shrink;
                }
                #pragma unroll
                for (int j = 0; j < STEP; ++j) {
                    score[q][j] = start + base + j < N ? metal::exp2(score[q][j] - highest) : 0.0f;
                    total[q] += score[q][j];
                }
            }
            #pragma unroll
            for (int j = 0; j < STEP; ++j) {
                #pragma unroll
                for (int i = 0; i < FOURS; ++i) {
                    const float4 value = values[(base + j) * FOURS + i];
                    #pragma unroll
                    for (int q = 0; q < QUERIES; ++q) {
                        sums[q][i] += value * score[q][j];
                    }
                }
            }
        }
    }
    #pragma unroll
    for (int q = 0; q < QUERIES; ++q) {
        if (first + q < N) {
            const float share = 1.0f / total[q];
            device T* to = out + (size_t(image) * N + first + q) * C + head * WIDTH;
            #pragma unroll
            for (int i = 0; i < FOURS; ++i) {
                *(device vec<T, 4>*)(to + 4 * i) = narrow4<T>(sums[q][i] * share);
            }
        }
    }
""",
)


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
    fused = OP.run(qkv, head_dim=head_dim)
    return self_attention_reference(qkv, head_dim) if fused is None else fused[0]


def self_attention_metal(qkv: mx.array, launch: Launch, head_dim: int) -> tuple[mx.array]:
    """`self_attention` as one Metal kernel; `launch` from `launches`."""
    return _launch(KERNEL.metal, qkv, launch, head_dim)


def self_attention_cuda(qkv: mx.array, launch: Launch, head_dim: int) -> tuple[mx.array]:
    """`self_attention` as one CUDA kernel; `launch` from `launches`."""
    return _launch(KERNEL.cuda, qkv, launch, head_dim)


def self_attention_cpu(qkv: mx.array, head_dim: int) -> mx.array:
    """`self_attention` by heads and blocks of queries; heads are read in place."""
    batch, tokens, width = qkv.shape
    out = cpu.output((batch, tokens, width // 3), qkv)
    q, k, v = cpu.view(qkv).reshape(batch, tokens, 3, -1, head_dim).transpose(2, 0, 3, 1, 4)
    target = cpu.view(out).reshape(batch, tokens, -1, head_dim).transpose(0, 2, 1, 3)
    cpu.attend(q, k, v, target, head_dim**-0.5, causal=False)
    return out


def self_attention_reference(qkv: mx.array, head_dim: int) -> mx.array:
    """`self_attention` through MLX's own attention."""
    return _by_mlx(qkv, head_dim, padding=0)


def _by_mlx(qkv: mx.array, head_dim: int, padding: int) -> mx.array:
    """MLX's attention on heads that `padding` zeros widen: scores and sums stay what they are."""
    batch, tokens, width = qkv.shape
    heads = qkv.reshape(batch, tokens, 3, -1, head_dim).transpose(2, 0, 3, 1, 4)
    if padding:
        heads = mx.pad(heads, [(0, 0)] * 4 + [(0, padding)])
    out = mx.fast.scaled_dot_product_attention(*heads, scale=head_dim**-0.5)[..., :head_dim]
    return out.transpose(0, 2, 1, 3).reshape(batch, tokens, width // 3)


def launches(qkv: mx.array, head_dim: int) -> list[Launch]:
    """Launch shapes: threads a threadgroup, queries a thread, keys a block; or the width of heads for MLX's kernel."""
    if not vector_loads(qkv) or head_dim % 4 or head_dim > 64:
        return []
    shapes = ((64, 2, 32), (128, 1, 32), (64, 1, 32), (128, 2, 32), (32, 2, 32), (64, 2, 64), (128, 1, 64))
    own = [
        {"threads": threads, "queries": queries, "block": block}
        for threads, queries, block in shapes
        if queries * head_dim <= 64
    ]
    return own if head_dim == _MLX_HEAD_DIM else [*own, {"padded_to": _MLX_HEAD_DIM}]


def _sample(qkv: mx.array, head_dim: int) -> tuple[mx.array, ...]:
    return (random_array((1, min(qkv.shape[1], 77), 6 * head_dim), qkv.dtype, 0),)


def _launch(run, qkv: mx.array, launch: Launch, head_dim: int) -> tuple[mx.array]:
    if "padded_to" in launch:
        return (_by_mlx(qkv, head_dim, launch["padded_to"] - head_dim),)
    batch, tokens, width = qkv.shape
    threads, queries = launch["threads"], launch["queries"]
    (out,) = run(
        [qkv, mx.array([math.log2(math.e) * head_dim**-0.5], mx.float32)],
        template={"T": qkv.dtype, "WIDTH": head_dim, "THREADS": threads, "QUERIES": queries, "BLOCK": launch["block"]},
        groups=(-(-tokens // (threads * queries)), width // 3 // head_dim, batch),
        threadgroup=(threads, 1, 1),
        output_shapes=[(batch, tokens, width // 3)],
        output_dtypes=[qkv.dtype],
    )
    return (out,)


OP = FusedOp(
    "self_attention",
    self_attention_metal,
    self_attention_cuda,
    lambda qkv, head_dim: (self_attention_reference(qkv, head_dim),),
    launches,
    _sample,
)
