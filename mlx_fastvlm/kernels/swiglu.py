"""SwiGLU on Qwen2's stacked gate/up projection."""

from __future__ import annotations

import mlx.core as mx

from mlx_fastvlm.kernels import cpu
from mlx_fastvlm.kernels.choice import fused_on_gpu

_ROWS_PER_BLOCK = 64


def swiglu(gate_up: mx.array) -> mx.array:
    """silu(gate) · up: (..., 2·C) with the gate first → (..., C)."""
    if cpu.suits(gate_up, gate_up.size):
        return swiglu_cpu(gate_up)
    return fused_on_gpu(swiglu_reference, _swiglu_compiled)(gate_up)


def swiglu_cpu(gate_up: mx.array) -> mx.array:
    """`swiglu` by a compiled loop, on all cores."""
    out = cpu.output((*gate_up.shape[:-1], gate_up.shape[-1] // 2), gate_up)
    source, target = cpu.rows(gate_up), cpu.rows(out)
    cpu.in_blocks(
        lambda start, stop: cpu.loops().silu_mul(source[start:stop], target[start:stop]), len(source), _ROWS_PER_BLOCK
    )
    return out


def swiglu_reference(gate_up: mx.array) -> mx.array:
    """`swiglu` in plain MLX ops (Shazeer, arXiv 2002.05202)."""
    gate, up = mx.split(gate_up, 2, axis=-1)
    return gate * mx.sigmoid(gate) * up


_swiglu_compiled = mx.compile(swiglu_reference)
