"""Squeeze-excite with GELU behind it: every channel scaled by a gate that the whole map's mean decides.

On a GPU three launches instead of nine: the mean of each channel; the narrow Linear with ReLU, a simdgroup an output;
the wide Linear with sigmoid for 32 channels a threadgroup, which at once scales their positions and applies GELU.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial

import mlx.core as mx

from mlx_fastvlm.kernels.fused_op import FusedOp, Launch, random_array
from mlx_fastvlm.kernels.gelu import gelu, gelu_reference
from mlx_fastvlm.kernels.gpu import GpuKernel, vector_loads
from mlx_fastvlm.kernels.linear import linear, linear_reference

_CHANNELS = 32  # of the map, a threadgroup of the mean and of the gate
SQUEEZE_RATIO = 0.0625  # squeeze-excite narrows to 1/16 of the channels

MEAN = GpuKernel(
    name="channel_mean",
    inputs=("x",),
    outputs=("mean",),
    source="""
    // x (B, N, C); threads (8, ROWS): eight lanes of four channels, positions shared among ROWS rows of threads.
    threadgroup vec<float, 4> partial[ROWS * 8];
    const int N = x_shape[1], C = x_shape[2];
    const int lane = int(thread_position_in_threadgroup.x), row = int(thread_position_in_threadgroup.y);
    const int channel = int(threadgroup_position_in_grid.x) * 32 + lane * 4;
    const int image = int(threadgroup_position_in_grid.y);
    float4 sum = float4(0.0f);
    if (channel < C) {
        for (int n = row; n < N; n += ROWS) {
            sum += float4(*(const device vec<T, 4>*)(x + (size_t(image) * N + n) * C + channel));
        }
    }
    partial[row * 8 + lane] = sum;
    threadgroup_barrier(mem_flags::mem_threadgroup);
    if (row == 0 && channel < C) {
        float4 total = float4(0.0f);
        for (int r = 0; r < ROWS; ++r) {
            total += partial[r * 8 + lane];
        }
        *(device float4*)(mean + size_t(image) * C + channel) = total * (1.0f / N);
    }
""",
)

SQUEEZE = GpuKernel(
    name="squeeze",
    inputs=("mean", "weight", "bias"),
    outputs=("hidden",),
    source="""
    // mean (B, C) float, weight (S, C); a simdgroup computes one of S outputs.
    const int C = weight_shape[1], S = weight_shape[0];
    const int output = int(threadgroup_position_in_grid.x) * GROUPS + int(simdgroup_index_in_threadgroup);
    const int image = int(threadgroup_position_in_grid.y);
    float sum = 0.0f;
    if (output < S) {
        for (int c = int(thread_index_in_simdgroup) * 4; c < C; c += 128) {
            const float4 m = *(const device float4*)(mean + size_t(image) * C + c);
            sum += dot(m, float4(*(const device vec<T, 4>*)(weight + size_t(output) * C + c)));
        }
    }
    sum = simd_sum(sum);
    if (output < S && thread_index_in_simdgroup == 0) {
        hidden[size_t(image) * S + output] = metal::max(sum + float(bias[output]), 0.0f);
    }
""",
)

EXCITE = GpuKernel(
    name="excite",
    inputs=("x", "hidden", "weight", "bias"),
    outputs=("out",),
    source="""
    // x (B, N, C), hidden (B, S) float, weight (C, S); a threadgroup gates 32 channels of a share of the positions.
    threadgroup float gate[32];
    const int N = x_shape[1], C = x_shape[2], S = weight_shape[1];
    const int first = int(threadgroup_position_in_grid.x) * 32;
    const int image = int(threadgroup_position_in_grid.z);
    for (int i = int(simdgroup_index_in_threadgroup); i < 32; i += GROUPS) {
        float sum = 0.0f;
        if (first + i < C) {
            for (int s = int(thread_index_in_simdgroup); s < S; s += 32) {
                sum += hidden[size_t(image) * S + s] * float(weight[size_t(first + i) * S + s]);
            }
        }
        sum = simd_sum(sum);
        if (first + i < C && thread_index_in_simdgroup == 0) {
            gate[i] = 1.0f / (1.0f + metal::exp(-(sum + float(bias[first + i]))));
        }
    }
    threadgroup_barrier(mem_flags::mem_threadgroup);
    const int lane = int(thread_index_in_threadgroup) % 8, channel = first + lane * 4;
    const int step = GROUPS * 4, start = int(threadgroup_position_in_grid.y) * SHARE;
    if (channel < C) {
        const float4 scale = float4(gate[lane * 4], gate[lane * 4 + 1], gate[lane * 4 + 2], gate[lane * 4 + 3]);
        for (int n = int(thread_index_in_threadgroup) / 8; n < SHARE; n += step) {
            if (start + n < N) {
                const size_t at = (size_t(image) * N + start + n) * C + channel;
                const float4 scaled = float4(*(const device vec<T, 4>*)(x + at)) * scale;
                *(device vec<T, 4>*)(out + at) = narrow4<T>(exact_gelu4(scaled));
            }
        }
    }
""",
)

Linear = tuple[mx.array, mx.array]  # weight (O, C), bias (O,)
Layer = Callable[[mx.array], mx.array]


def squeeze_excite(x: mx.array, reduce: Linear, expand: Linear) -> mx.array:
    """gelu(x · sigmoid(expand(relu(reduce(mean of x over positions))))).

    Args:
        x: (B, H, W, C).
        reduce: weight (S, C), bias (S,).
        expand: weight (C, S), bias (C,).

    Returns:
        (B, H, W, C).
    """
    fused = OP.run(x.flatten(1, 2), *reduce, *expand)
    if fused is not None:
        return fused[0].reshape(x.shape)
    return gelu(gated(x, *(partial(linear, weight=weight, bias=bias) for weight, bias in (reduce, expand))))


def gated(x: mx.array, reduce: Layer, expand: Layer) -> mx.array:
    """x · sigmoid(expand(relu(reduce(mean of x over positions)))): x (B, …, C), for layers stored in any way."""
    positions = tuple(range(1, x.ndim - 1))
    # The mean runs over hundreds of positions: in float16 its sum would lose digits.
    mean = x.astype(mx.float32).mean(axis=positions, keepdims=True).astype(x.dtype)
    return x * mx.sigmoid(expand(mx.maximum(reduce(mean), 0)))


def squeeze_excite_metal(
    x: mx.array, weight1: mx.array, bias1: mx.array, weight2: mx.array, bias2: mx.array, launch: Launch
) -> tuple[mx.array]:
    """`squeeze_excite` on (B, N, C) as three Metal kernels; `launch` from `launches`."""
    return _launch([kernel.metal for kernel in (MEAN, SQUEEZE, EXCITE)], x, weight1, bias1, weight2, bias2, launch)


def squeeze_excite_cuda(
    x: mx.array, weight1: mx.array, bias1: mx.array, weight2: mx.array, bias2: mx.array, launch: Launch
) -> tuple[mx.array]:
    """`squeeze_excite` on (B, N, C) as three CUDA kernels; `launch` from `launches`."""
    return _launch([kernel.cuda for kernel in (MEAN, SQUEEZE, EXCITE)], x, weight1, bias1, weight2, bias2, launch)


def squeeze_excite_reference(
    x: mx.array, weight1: mx.array, bias1: mx.array, weight2: mx.array, bias2: mx.array
) -> tuple[mx.array]:
    """`squeeze_excite` on (B, N, C) in plain MLX ops."""
    reduce, expand = (partial(linear_reference, weight=w, bias=b) for w, b in ((weight1, bias1), (weight2, bias2)))
    return (gelu_reference(gated(x, reduce, expand)),)


def launches(x: mx.array, weight1: mx.array, bias1: mx.array, weight2: mx.array, bias2: mx.array) -> list[Launch]:
    """Launch shapes: simdgroups a threadgroup, positions that a threadgroup of the gate scales."""
    if not vector_loads(x, weight1, bias2) or weight2.dtype != x.dtype or bias1.dtype != x.dtype:
        return []
    return [{"groups": groups, "share": share} for groups, share in ((8, 64), (8, 128), (8, 256), (16, 64), (4, 32))]


def _sample(x: mx.array, weight1: mx.array, *others: mx.array) -> tuple[mx.array, ...]:
    channels, squeezed = min(x.shape[2], 72), min(weight1.shape[0], 36)
    shapes = ((1, 70, channels), (squeezed, channels), (squeezed,), (channels, squeezed), (channels,))
    return tuple(random_array(shape, x.dtype, seed) for seed, shape in enumerate(shapes))


def _launch(kernels, x, weight1, bias1, weight2, bias2, launch: Launch) -> tuple[mx.array]:
    mean, squeeze, excite = kernels
    batch, positions, channels = x.shape
    squeezed, groups = weight1.shape[0], launch["groups"]
    blocks = -(-channels // _CHANNELS)
    (means,) = mean(
        [x],
        template={"T": x.dtype, "ROWS": 4 * groups},
        groups=(blocks, batch, 1),
        threadgroup=(8, 4 * groups, 1),
        output_shapes=[(batch, channels)],
        output_dtypes=[mx.float32],
    )
    (hidden,) = squeeze(
        [means, weight1, bias1],
        template={"T": x.dtype, "GROUPS": groups},
        groups=(-(-squeezed // groups), batch, 1),
        threadgroup=(32 * groups, 1, 1),
        output_shapes=[(batch, squeezed)],
        output_dtypes=[mx.float32],
    )
    (out,) = excite(
        [x, hidden, weight2, bias2],
        template={"T": x.dtype, "GROUPS": groups, "SHARE": launch["share"]},
        groups=(blocks, -(-positions // launch["share"]), batch),
        threadgroup=(32 * groups, 1, 1),
        output_shapes=[x.shape],
        output_dtypes=[x.dtype],
    )
    return (out,)


OP = FusedOp("squeeze_excite", squeeze_excite_metal, squeeze_excite_cuda, squeeze_excite_reference, launches, _sample)
