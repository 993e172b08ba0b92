"""Residual addition and the RMSNorm that follows it, in one pass over the rows."""

from __future__ import annotations

import mlx.core as mx
import numpy as np

from mlx_fastvlm.kernels import cpu
from mlx_fastvlm.kernels.fused_op import FusedOp, Launch, random_array
from mlx_fastvlm.kernels.gpu import GpuKernel, as_rows, vector_loads

KERNEL = GpuKernel(
    name="add_rms_norm",
    inputs=("x", "residual", "weight", "eps"),
    outputs=("total", "normed"),
    source="""
    // x, residual (R, C), eps (1) float; one threadgroup of GROUPS simdgroups a row, PER fours of channels a thread.
    constexpr int THREADS = GROUPS * 32;
    threadgroup float partial[GROUPS];
    const int C = x_shape[1];
    const size_t row = size_t(threadgroup_position_in_grid.x) * C;
    float4 kept[PER];
    float sum = 0.0f;
    #pragma unroll
    for (int i = 0; i < PER; ++i) {
        const int c = (i * THREADS + int(thread_index_in_threadgroup)) * 4;
        if (c < C) {
            const float4 a = float4(*(const device vec<T, 4>*)(x + row + c));
            const float4 b = float4(*(const device vec<T, 4>*)(residual + row + c));
            const vec<T, 4> rounded = narrow4<T>(a + b);
            *(device vec<T, 4>*)(total + row + c) = rounded;
            kept[i] = float4(rounded);
            sum += dot(kept[i], kept[i]);
        }
    }
    sum = simd_sum(sum);
    if (thread_index_in_simdgroup == 0) {
        partial[simdgroup_index_in_threadgroup] = sum;
    }
    threadgroup_barrier(mem_flags::mem_threadgroup);
    float all = 0.0f;
    for (int g = 0; g < GROUPS; ++g) {
        all += partial[g];
    }
    const float scale = metal::rsqrt(all / C + eps[0]);
    #pragma unroll
    for (int i = 0; i < PER; ++i) {
        const int c = (i * THREADS + int(thread_index_in_threadgroup)) * 4;
        if (c < C) {
            const float4 w = float4(*(const device vec<T, 4>*)(weight + c));
            *(device vec<T, 4>*)(normed + row + c) = narrow4<T>(kept[i] * scale * w);
        }
    }
""",
)


def add_rms_norm(x: mx.array, residual: mx.array, weight: mx.array, eps: float) -> tuple[mx.array, mx.array]:
    """x + residual, and its RMSNorm.

    Args:
        x, residual: (..., C).
        weight: (C,).
        eps: added to the mean square.

    Returns:
        The sum and the sum normalized, each (..., C).
    """
    fused = OP.run(as_rows(x), as_rows(residual), weight, eps=eps)
    if fused is not None:
        return fused[0].reshape(x.shape), fused[1].reshape(x.shape)
    if cpu.is_decode_row(x):
        return add_rms_norm_cpu(x, residual, weight, eps)
    return add_rms_norm_reference(x, residual, weight, eps)


def add_rms_norm_metal(
    x: mx.array, residual: mx.array, weight: mx.array, launch: Launch, eps: float
) -> tuple[mx.array, mx.array]:
    """`add_rms_norm` of (R, C) as one Metal kernel; `launch` from `launches`."""
    return _launch(KERNEL.metal, x, residual, weight, launch, eps)


def add_rms_norm_cuda(
    x: mx.array, residual: mx.array, weight: mx.array, launch: Launch, eps: float
) -> tuple[mx.array, mx.array]:
    """`add_rms_norm` of (R, C) as one CUDA kernel; `launch` from `launches`."""
    return _launch(KERNEL.cuda, x, residual, weight, launch, eps)


def add_rms_norm_cpu(x: mx.array, residual: mx.array, weight: mx.array, eps: float) -> tuple[mx.array, mx.array]:
    """`add_rms_norm` of one row, at once."""
    mx.eval(x, residual, weight)
    total = cpu.view(x) + cpu.view(residual)
    mean_square = np.square(total).mean()
    return mx.array(total), mx.array(total * (1 / np.sqrt(mean_square + np.float32(eps))) * cpu.view(weight))


def add_rms_norm_reference(x: mx.array, residual: mx.array, weight: mx.array, eps: float) -> tuple[mx.array, mx.array]:
    """`add_rms_norm` in plain MLX ops (Zhang and Sennrich, arXiv 1910.07467)."""
    total = x + residual
    return total, mx.fast.rms_norm(total, weight, eps)


def launches(x: mx.array, residual: mx.array, weight: mx.array, eps: float) -> list[Launch]:
    """Launch shapes: simdgroups a row. A thread keeps up to eight fours of channels in registers."""
    if not vector_loads(x, residual, weight):
        return []
    return [{"groups": groups} for groups in (8, 4, 16, 2, 32) if x.shape[1] <= groups * 32 * 4 * 8]


def _sample(x: mx.array, residual: mx.array, weight: mx.array, eps: float) -> tuple[mx.array, ...]:
    shapes = ((3, x.shape[1]), (3, x.shape[1]), weight.shape)
    return tuple(random_array(shape, x.dtype, seed) for seed, shape in enumerate(shapes))


def _launch(run, x, residual, weight, launch: Launch, eps: float) -> tuple[mx.array, mx.array]:
    rows, channels = x.shape
    threads = 32 * launch["groups"]
    total, normed = run(
        [x, residual, weight, mx.array([eps], mx.float32)],
        template={"T": x.dtype, "GROUPS": launch["groups"], "PER": -(-channels // (4 * threads))},
        groups=(rows, 1, 1),
        threadgroup=(threads, 1, 1),
        output_shapes=[x.shape, x.shape],
        output_dtypes=[x.dtype, x.dtype],
    )
    return total, normed


OP = FusedOp("add_rms_norm", add_rms_norm_metal, add_rms_norm_cuda, add_rms_norm_reference, launches, _sample)
