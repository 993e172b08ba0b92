"""SwiGLU on Qwen2's stacked gate/up projection."""

from __future__ import annotations

import mlx.core as mx
import numpy as np

from mlx_fastvlm.kernels import cpu
from mlx_fastvlm.kernels.choice import fused_on_gpu
from mlx_fastvlm.kernels.fused_op import FusedOp, Launch, random_array
from mlx_fastvlm.kernels.gpu import MOST_GROUPS, GpuKernel, as_rows, vector_loads

_ROWS_PER_BLOCK = 64

KERNEL = GpuKernel(
    name="swiglu",
    inputs=("gate_up",),
    outputs=("out",),
    source="""
    // gate_up (R, 2C); a thread takes four channels of a row.
    const int C = gate_up_shape[1] / 2;
    const int c = int(thread_position_in_grid.x) * 4;
    const size_t row = threadgroup_position_in_grid.y;
    if (c < C) {
        const float4 g = float4(*(const device vec<T, 4>*)(gate_up + row * 2 * C + c));
        const float4 u = float4(*(const device vec<T, 4>*)(gate_up + row * 2 * C + C + c));
        const float4 s = float4(
            1.0f / (1.0f + metal::exp(-g.x)), 1.0f / (1.0f + metal::exp(-g.y)),
            1.0f / (1.0f + metal::exp(-g.z)), 1.0f / (1.0f + metal::exp(-g.w)));
        *(device vec<T, 4>*)(out + row * C + c) = narrow4<T>(g * s * u);
    }
""",
)


def swiglu(gate_up: mx.array) -> mx.array:
    """silu(gate) · up: (..., 2·C) with the gate first → (..., C)."""
    if cpu.suits(gate_up, gate_up.size):
        return swiglu_cpu(gate_up)
    fused = OP.run(as_rows(gate_up))
    if fused is not None:
        return fused[0].reshape(*gate_up.shape[:-1], -1)
    return fused_on_gpu(swiglu_reference, _swiglu_compiled)(gate_up)


def swiglu_metal(gate_up: mx.array, launch: Launch) -> tuple[mx.array]:
    """`swiglu` of (R, 2·C) as one Metal kernel; `launch` from `launches`."""
    return _launch(KERNEL.metal, gate_up, launch)


def swiglu_cuda(gate_up: mx.array, launch: Launch) -> tuple[mx.array]:
    """`swiglu` of (R, 2·C) as one CUDA kernel; `launch` from `launches`."""
    return _launch(KERNEL.cuda, gate_up, launch)


def swiglu_cpu(gate_up: mx.array) -> mx.array:
    """`swiglu` by a compiled loop, on all cores."""

    def write(out: np.ndarray) -> None:
        source = cpu.rows(gate_up)
        cpu.in_blocks(
            lambda start, stop: cpu.loops().silu_mul(source[start:stop], out[start:stop]), len(source), _ROWS_PER_BLOCK
        )

    return cpu.filled((*gate_up.shape[:-1], gate_up.shape[-1] // 2), write, gate_up)


def swiglu_reference(gate_up: mx.array) -> mx.array:
    """`swiglu` in plain MLX ops (Shazeer, arXiv 2002.05202)."""
    gate, up = mx.split(gate_up, 2, axis=-1)
    return gate * mx.sigmoid(gate) * up


_swiglu_compiled = mx.compile(swiglu_reference)


def launches(gate_up: mx.array) -> list[Launch]:
    """Launch shapes: threads a threadgroup, all in one row."""
    if not vector_loads(gate_up) or gate_up.shape[1] % 8 or gate_up.shape[0] > MOST_GROUPS:
        return []
    return [{"threads": threads} for threads in (256, 128, 512, 64)]


def _sample(gate_up: mx.array) -> tuple[mx.array, ...]:
    return (random_array((3, min(gate_up.shape[-1], 2056)), gate_up.dtype, 0),)


def _launch(run, gate_up: mx.array, launch: Launch) -> tuple[mx.array]:
    rows, channels = gate_up.shape[0], gate_up.shape[1] // 2
    (out,) = run(
        [gate_up],
        template={"T": gate_up.dtype},
        groups=(-(-channels // (4 * launch["threads"])), rows, 1),
        threadgroup=(launch["threads"], 1, 1),
        output_shapes=[(rows, channels)],
        output_dtypes=[gate_up.dtype],
    )
    return (out,)


OP = FusedOp("swiglu", swiglu_metal, swiglu_cuda, lambda gate_up: (swiglu_reference(gate_up),), launches, _sample)
