"""The decoder's MLP: the stacked gate/up projection, SwiGLU and the projection back."""

from __future__ import annotations

import mlx.core as mx
import numpy as np

from mlx_fastvlm.kernels import cpu
from mlx_fastvlm.kernels.linear import are_few, linear, linear_reference, linear_rows
from mlx_fastvlm.kernels.swiglu import swiglu, swiglu_reference


def swiglu_feed_forward(x: mx.array, gate_up: mx.array, down: mx.array) -> mx.array:
    """The decoder's two Linear layers with SwiGLU between.

    Args:
        x: (..., C).
        gate_up: (2·H, C), the gate's rows first; like `down` in x's type or a narrower one.
        down: (C, H).

    Returns:
        (..., C).
    """
    if cpu.suits(x, max(gate_up.size, x.size // x.shape[-1] * len(gate_up))):
        return swiglu_feed_forward_cpu(x, gate_up, down)
    return linear(swiglu(linear(x, gate_up)), down)


def swiglu_feed_forward_cpu(x: mx.array, gate_up: mx.array, down: mx.array) -> mx.array:
    """`swiglu_feed_forward` by compiled loops: gate and up never exist as a whole."""
    both, last = cpu.weight(gate_up), cpu.weight(down)
    return cpu.filled(x.shape, lambda out: _swiglu_rows(cpu.rows(x), both, last, out), x)


def _swiglu_rows(x: np.ndarray, gate_up: np.ndarray, down: np.ndarray, out: np.ndarray) -> None:
    """The same on matrices: x, out (R, C), weights as `cpu.weight` has them."""
    if are_few(x):
        both, hidden = (np.empty((len(x), width), np.float32) for width in (len(gate_up), down.shape[1]))
        linear_rows(x, gate_up, None, both)
        cpu.loops().silu_mul(both, hidden)
        linear_rows(hidden, down, None, out)
        return
    cpu.in_blocks(
        lambda start, stop: cpu.panels().swiglu_rows(x, gate_up, down, out, start, stop),
        len(x),
        cpu.ROWS,
        cpu.panels().PANEL,
        work=len(x) * (gate_up.size + down.size),
    )


def swiglu_feed_forward_reference(x: mx.array, gate_up: mx.array, down: mx.array) -> mx.array:
    """`swiglu_feed_forward` in plain MLX ops."""
    return linear_reference(swiglu_reference(linear_reference(x, gate_up)), down)
