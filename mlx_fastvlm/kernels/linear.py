"""A Linear layer that is fast for one row too, which is what decoding needs, and on weights kept in bfloat16.

A CPU computes in float32, but a bfloat16 checkpoint's weights hold no more than bfloat16, and loading keeps them so: half
the bytes are read for a token. A bfloat16 is the upper half of a float32, so that the products are the same.
"""

from __future__ import annotations

import mlx.core as mx
import numpy as np

from mlx_fastvlm.kernels import cpu

_ONE_ROW = 8  # times the time of a multiplication: with one row a product waits for the weight to come from memory


def linear(x: mx.array, weight: mx.array, bias: mx.array | None = None) -> mx.array:
    """x @ weightᵀ + bias: x (..., C), weight (O, C) in x's type or a narrower one, bias (O,) → (..., O) in x's type."""
    if cpu.suits(x, max(weight.size, x.size // x.shape[-1] * len(weight))) or cpu.kept_narrow(x, weight):
        return linear_cpu(x, weight, bias)
    return linear_reference(x, weight, bias)


def linear_cpu(x: mx.array, weight: mx.array, bias: mx.array | None = None, gelu: bool = False) -> mx.array:
    """`linear` by compiled loops, through exact GELU if asked; weight float32 or bfloat16."""
    matrix, offsets = cpu.weight(weight), None if bias is None else cpu.view(bias)
    return cpu.filled((*x.shape[:-1], len(matrix)), lambda out: linear_rows(cpu.rows(x), matrix, offsets, out, gelu), x)


def linear_rows(
    x: np.ndarray, matrix: np.ndarray, bias: np.ndarray | None, out: np.ndarray, gelu: bool = False
) -> None:
    """out = x @ matrixᵀ + bias, through GELU if asked: x (R, C), out (R, O), matrix (O, C) as `cpu.weight` has it."""
    if len(x) == 1 and not gelu:
        matvec(matrix, x[0], out[0])
        if bias is not None:
            out += bias
        return
    offsets = np.zeros(len(matrix), np.float32) if bias is None else bias
    work = len(x) * matrix.size
    if are_few(x):
        cpu.in_blocks(
            lambda start, stop: _outputs(x, matrix[start:stop], offsets[start:stop], out[:, start:stop], gelu),
            len(matrix),
            len(matrix),
            cpu.panels().OUTPUTS,
            work=work,
        )
        return
    cpu.in_blocks(
        lambda start, stop: cpu.panels().linear_rows(x, matrix, offsets, out, start, stop, gelu),
        len(x),
        cpu.ROWS,
        cpu.panels().PANEL,
        work=work,
    )


def are_few(x: np.ndarray) -> bool:
    """Whether the rows are one panel: then each core takes a share of the outputs, as rows cannot be shared.

    A step of a batch has so many, or a second question about a picture.
    """
    return len(x) <= cpu.panels().PANEL


def _outputs(x: np.ndarray, matrix: np.ndarray, bias: np.ndarray, out: np.ndarray, gelu: bool) -> None:
    """`linear_rows` on one core, where the rows of `out` need not lie side by side."""
    rows = np.empty(out.shape, np.float32)
    cpu.panels().linear_rows(x, matrix, bias, rows, 0, len(x), gelu)
    out[:] = rows


def matvec(matrix: np.ndarray, vector: np.ndarray, out: np.ndarray) -> None:
    """out = matrix @ vector, a share of the rows on each core: (O, C) as `cpu.weight` has it, (C,), (O,)."""
    cpu.in_blocks(
        lambda start, stop: cpu.loops().matvec(matrix[start:stop], vector, out[start:stop]),
        len(matrix),
        len(matrix),
        work=_ONE_ROW * matrix.size,
    )


def linear_reference(x: mx.array, weight: mx.array, bias: mx.array | None = None) -> mx.array:
    """`linear` in plain MLX ops."""
    weight = weight.astype(x.dtype)
    return x @ weight.T if bias is None else mx.addmm(bias, x, weight.T)
