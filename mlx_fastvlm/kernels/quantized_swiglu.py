"""Qwen2's stacked gate/up projection, quantized, with SwiGLU in the same kernel, for the few rows of a decode step.

A simdgroup computes the gate and the up product of OUTPUTS channels and stores only silu(gate) · up. MLX's own product is
hard to beat, so this runs only where `mlx-fastvlm tune` has found it faster than the product followed by SwiGLU.
"""

from __future__ import annotations

import mlx.core as mx

from mlx_fastvlm.kernels.fused_op import FusedOp, Launch, random_array
from mlx_fastvlm.kernels.gpu import GpuKernel, as_rows, vector_loads
from mlx_fastvlm.kernels.quantized_linear import quantized_linear, quantized_linear_reference
from mlx_fastvlm.kernels.swiglu import swiglu, swiglu_reference

_BITS = (4, 8)
_MOST_ROWS = 4

KERNEL = GpuKernel(
    name="quantized_swiglu",
    inputs=("x", "weight", "scales", "biases"),
    outputs=("out",),
    source="""
    // x (R, C), weight (2H, C * BITS / 32) uint32, scales and biases (2H, C / GROUP): gate rows first, then up rows.
    // A lane takes 16 neighboring inputs at a time: one group, 16 * BITS / 32 words of a row.
    constexpr int WORDS = 16 * BITS / 32, PER_WORD = 32 / BITS;
    constexpr uint MASK = (1u << BITS) - 1u;
    const int C = x_shape[1], H = weight_shape[0] / 2;
    const int lane = int(thread_index_in_simdgroup);
    const int row = int(threadgroup_position_in_grid.y);
    const int first = (int(threadgroup_position_in_grid.x) * GROUPS + int(simdgroup_index_in_threadgroup)) * OUTPUTS;

    float sums[2][OUTPUTS];
    #pragma unroll
    for (int o = 0; o < OUTPUTS; ++o) {
        sums[0][o] = 0.0f;
        sums[1][o] = 0.0f;
    }
    for (int c = lane * 16; c < C; c += 512) {
        float inputs[16];
        float total = 0.0f;
        #pragma unroll
        for (int i = 0; i < 4; ++i) {
            const float4 v = float4(*(const device vec<T, 4>*)(x + size_t(row) * C + c + 4 * i));
            inputs[4 * i] = v.x;
            inputs[4 * i + 1] = v.y;
            inputs[4 * i + 2] = v.z;
            inputs[4 * i + 3] = v.w;
            total += v.x + v.y + v.z + v.w;
        }
        #pragma unroll
        for (int half_of = 0; half_of < 2; ++half_of) {
            #pragma unroll
            for (int o = 0; o < OUTPUTS; ++o) {
                if (first + o < H) {
                    const size_t line = size_t(half_of * H + first + o);
                    float sum = 0.0f;
                    #pragma unroll
                    for (int w = 0; w < WORDS; ++w) {
                        const uint word = weight[line * (C * BITS / 32) + c * BITS / 32 + w];
                        #pragma unroll
                        for (int i = 0; i < PER_WORD; ++i) {
                            sum += inputs[w * PER_WORD + i] * float((word >> (i * BITS)) & MASK);
                        }
                    }
                    const size_t group = line * (C / GROUP) + c / GROUP;
                    sums[half_of][o] += float(scales[group]) * sum + float(biases[group]) * total;
                }
            }
        }
    }
    #pragma unroll
    for (int o = 0; o < OUTPUTS; ++o) {
        const float gate = simd_sum(sums[0][o]), up = simd_sum(sums[1][o]);
        if (lane == 0 && first + o < H) {
            out[size_t(row) * H + first + o] = T(gate / (1.0f + metal::exp(-gate)) * up);
        }
    }
""",
)


def quantized_swiglu(
    x: mx.array, weight: mx.array, scales: mx.array, biases: mx.array | None, group_size: int, bits: int, mode: str
) -> mx.array:
    """silu(gate) · up of a quantized gate/up projection.

    Args:
        x: (..., C).
        weight, scales, biases, group_size, bits, mode: of (2·H, C), gate first, as in `quantized_linear`.

    Returns:
        (..., H) in x's type.
    """
    if mode == "affine":
        fused = OP.run(as_rows(x), weight, scales, biases, group_size=group_size, bits=bits)
        if fused is not None:
            return fused[0].reshape(*x.shape[:-1], -1)
    return swiglu(quantized_linear(x, weight, scales, biases, group_size, bits, mode))


def quantized_swiglu_metal(
    x: mx.array, weight: mx.array, scales: mx.array, biases: mx.array, launch: Launch, group_size: int, bits: int
) -> tuple[mx.array]:
    """`quantized_swiglu` of (R, C) as one Metal kernel; `launch` from `launches`."""
    return _launch(KERNEL.metal, x, weight, scales, biases, launch, group_size, bits)


def quantized_swiglu_cuda(
    x: mx.array, weight: mx.array, scales: mx.array, biases: mx.array, launch: Launch, group_size: int, bits: int
) -> tuple[mx.array]:
    """`quantized_swiglu` of (R, C) as one CUDA kernel; `launch` from `launches`."""
    return _launch(KERNEL.cuda, x, weight, scales, biases, launch, group_size, bits)


def quantized_swiglu_reference(
    x: mx.array, weight: mx.array, scales: mx.array, biases: mx.array, group_size: int, bits: int
) -> tuple[mx.array]:
    """`quantized_swiglu` of (R, C) in plain MLX ops."""
    return (swiglu_reference(quantized_linear_reference(x, weight, scales, biases, group_size, bits, "affine")),)


def launches(
    x: mx.array, weight: mx.array, scales: mx.array, biases: mx.array, group_size: int, bits: int
) -> list[Launch]:
    """Launch shapes: simdgroups a threadgroup, channels of the result a simdgroup."""
    fits = x.shape[0] <= _MOST_ROWS and x.shape[1] % group_size == 0 and bits in _BITS
    if not fits or not vector_loads(x) or scales.dtype != x.dtype or biases.dtype != x.dtype:
        return []
    return [{"groups": groups, "outputs": outputs} for groups, outputs in ((2, 4), (4, 2), (2, 2), (8, 1), (4, 4))]


def _sample(x: mx.array, *_: mx.array, group_size: int, bits: int) -> tuple[mx.array, ...]:
    width = 9 * group_size
    packed = mx.quantize(random_array((2 * 37, width), x.dtype, 1), group_size=group_size, bits=bits)
    return (random_array((min(x.shape[0], 2), width), x.dtype, 0), *packed)


def _launch(run, x, weight, scales, biases, launch: Launch, group_size: int, bits: int) -> tuple[mx.array]:
    outputs = weight.shape[0] // 2
    per_group = launch["groups"] * launch["outputs"]
    (out,) = run(
        [x, weight, scales, biases],
        template={
            "T": x.dtype, "BITS": bits, "GROUP": group_size, "GROUPS": launch["groups"], "OUTPUTS": launch["outputs"],
        },
        groups=(-(-outputs // per_group), x.shape[0], 1),
        threadgroup=(32 * launch["groups"], 1, 1),
        output_shapes=[(x.shape[0], outputs)],
        output_dtypes=[x.dtype],
    )  # fmt: skip
    return (out,)


OP = FusedOp(
    "quantized_swiglu",
    quantized_swiglu_metal,
    quantized_swiglu_cuda,
    quantized_swiglu_reference,
    launches,
    _sample,
    tuned_only=True,
)
