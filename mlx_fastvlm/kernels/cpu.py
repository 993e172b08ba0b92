"""The Linux CPU's fast path: where it is taken, and how work is spread over cores.

MLX's Linux CPU backend runs elementwise ops on one thread (erf 30-45 ns an element, exp 20) and depthwise convolutions
as a plain loop. Here work is cut into blocks of rows, one thread per core, and compiled loops take a block from the op's
input to its output while it is in cache. Their numbers are float32; matrices may be stored in bfloat16.

Every op evaluates its inputs first and writes its output through a NumPy view of a fresh MLX buffer, without a copy.
So none can be used inside mx.compile or mx.grad, and each op's dispatcher asks `suits` first.
"""

from __future__ import annotations

import ctypes
import functools
import math
import os
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from types import ModuleType

import mlx.core as mx
import numpy as np

from mlx_fastvlm import blas
from mlx_fastvlm.kernels.choice import kernels_allowed

ROWS = 256  # rows per block: enough to read a weight seldom, few enough to stay in L2 and L3
# Below this, starting numba (0.5 s in a new process) costs more than plain ops: small models never load it.
MIN_ELEMENTS = 2**20
_MIN_ELEMENTS_LATER = 2**13  # once it is there, a call costs less than plain ops on so many

_COPIED_ELEMENTS = 2**16  # up to here a copy takes less time than to have MLX make an array
# Multiplications that one core does while another thread wakes and comes by the interpreter's lock, with a margin: so few
# are not shared. Measured on the demo's decode steps of 1 to 32 rows.
_UNSHARED_WORK = 2**22


@functools.cache
def missing() -> str | None:
    """Why the fast path cannot be taken in this process, or None if it can. The first call imports numba."""
    state = blas.use_openblas()
    if state != "openblas":
        return state.removeprefix("off: ")
    try:
        loops()
    except Exception as error:  # numba refuses a NumPy too new, or finds no folder to cache in: each its own type
        return f"numba cannot be used ({' '.join(str(error).split())[:160]})"
    return None


def suits(x: mx.array, elements: int) -> bool:
    """Whether an op on `x` that touches this many elements should run here rather than as plain MLX ops."""
    return (
        elements >= (_MIN_ELEMENTS_LATER if loops.cache_info().currsize else MIN_ELEMENTS)
        and x.dtype == mx.float32
        and mx.default_device().type == mx.DeviceType.cpu
        and kernels_allowed()
        and missing() is None
    )


def is_decode_row(x: mx.array) -> bool:
    """Whether `x` is the one row of a large model's decode step: then MLX's scheduler costs more than a small op."""
    return x.size == x.shape[-1] and bool(loops.cache_info().currsize) and suits(x, MIN_ELEMENTS)


def kept_narrow(x: mx.array, weight: mx.array) -> bool:
    """Whether an op on `x` meets a bfloat16 weight that was kept for the loops here; only large models have such."""
    return x.dtype != weight.dtype == mx.bfloat16 and suits(x, MIN_ELEMENTS)


@functools.cache
def loops() -> ModuleType:
    """The compiled loops. The first call of an installation compiles them, which takes some 10 s; later ones 0.5 s."""
    from mlx_fastvlm.kernels import cpu_loops

    return cpu_loops


@functools.cache
def panels() -> ModuleType:
    """The compiled Linear layers on many rows, likewise."""
    from mlx_fastvlm.kernels import cpu_panels

    return cpu_panels


@functools.cache
def attention_loops() -> ModuleType:
    """The compiled attention, likewise."""
    from mlx_fastvlm.kernels import cpu_attention_loops

    return cpu_attention_loops


@functools.cache
def depthwise_loops() -> ModuleType:
    """The compiled depthwise convolution, likewise."""
    from mlx_fastvlm.kernels import cpu_depthwise_loops

    return cpu_depthwise_loops


@functools.cache
def quantized_loops() -> ModuleType:
    """The compiled loops over quantized weights, likewise."""
    from mlx_fastvlm.kernels import cpu_quantized_loops

    return cpu_quantized_loops


def warm_up(quantized: bool) -> None:
    """Load (or, once per installation, compile) the loops now, so that the first image does not wait for them.

    Args:
        quantized: whether weights are, which takes loops of its own.
    """
    if missing() is not None:
        return
    ones = np.ones((2, 2), np.float32)
    loops().bias_gelu(ones.copy(), ones[0])
    loops().silu_mul(np.ones((2, 4), np.float32), ones.copy())
    attention_loops()
    image = np.ones((2, 2, 2), np.float32)
    depthwise_loops().depthwise_rows(image, image, ones[0], image.copy(), 0, 1, 0, 2, False)
    for matrix in (ones, np.ones((2, 2), np.uint16)):
        loops().matvec(matrix, ones[0], ones[1])
        panels().linear_rows(ones, matrix, ones[0], ones.copy(), 0, 2, True)
        panels().feed_forward_rows(ones, matrix, ones[0], matrix, ones[0], ones, ones.copy(), 0, 2)
        panels().swiglu_rows(ones, np.concatenate([matrix, matrix]), matrix, ones.copy(), 0, 2)
    if quantized:
        packed, group = np.ones((1, 1, 32), np.uint8), np.ones((1, 1), np.float32)
        quantized_loops().matvec(packed, group, group, np.ones((1, 32), np.float32), group[0], 8, group[0].copy())
        quantized_loops().unpack(packed, group, group, 8, np.ones((1, 1, 32, 1), np.float32))


def in_blocks(block: Callable[[int, int], None], total: int, step: int, unit: int = 1, work: float = math.inf) -> None:
    """Call block(start, stop) over range(total) on all cores: in steps of at most `step`, in whole units, as many a core.

    Args:
        block: does a part.
        total, step, unit: see above.
        work: of all parts, in multiplications of a matrix product; little is done here, in one part.
    """
    if work < _UNSHARED_WORK:
        block(0, total)
        return
    rounds = -(-total // (_cores() * step))
    step = -(-total // (_cores() * rounds * unit)) * unit
    starts = iter(range(0, total, step))

    def work() -> None:
        for start in starts:  # one iterator for all threads: who is free takes the next block
            block(start, min(total, start + step))

    helpers = [_pool().submit(work) for _ in range(min(_cores(), -(-total // step)) - 1)]
    work()  # here too, rather than wait for another thread to wake
    for helper in helpers:
        helper.result()


def filled(shape: tuple[int, ...], write: Callable[[np.ndarray], None], *inputs: mx.array) -> mx.array:
    """A float32 array that `write` fills, given it as a matrix (rows, C), once `inputs` are evaluated."""
    if math.prod(shape) > _COPIED_ELEMENTS:
        out = output(shape, *inputs)
        write(rows(out))
        return out
    mx.eval(*inputs)
    matrix = np.empty((math.prod(shape[:-1]), shape[-1]), np.float32)
    write(matrix)
    return mx.array(matrix.reshape(shape))


def output(shape: tuple[int, ...], *inputs: mx.array) -> mx.array:
    """An uninitialized float32 array to write through `view`, once `inputs` are evaluated."""
    out = mx.empty(shape, dtype=mx.float32)
    mx.eval(out, *inputs)
    return out


def view(x: mx.array) -> np.ndarray:
    """An evaluated float32 array's own memory; a copy only where it is not contiguous."""
    return np.ascontiguousarray(np.asarray(x))


def rows(x: mx.array) -> np.ndarray:
    """`view` as a matrix: (..., C) → (rows, C)."""
    return view(x).reshape(-1, x.shape[-1])


def weight(stored: mx.array) -> np.ndarray:
    """A weight in memory, float32 or, for lack of a NumPy bfloat16, the bits of bfloat16 as uint16; without a copy."""
    if stored.dtype != mx.bfloat16:
        return view(stored)
    return np.frombuffer(memoryview(stored), np.uint16).reshape(stored.shape)


def attend(
    queries: np.ndarray,
    keys: np.ndarray,
    values: np.ndarray,
    out: np.ndarray,
    scale: float,
    causal: bool,
    padding: np.ndarray | None = None,
) -> None:
    """out = softmax(scale · q kᵀ) v on all cores: queries, out (B, heads, L, D), keys, values (B, its heads, N, D).

    Numbers of a row lie side by side. With `causal` the queries are the last L of N positions and see none after them.
    `padding` (B,): how many of the first positions are none; at least one more stands before the first query's end.
    """
    padding = np.zeros(len(queries), np.int64) if padding is None else padding.astype(np.int64)
    sgemm = ctypes.cast(blas.openblas().scipy_cblas_sgemm, ctypes.c_void_p).value
    batch, heads, length, head_dim = queries.shape
    work = 2 * batch * heads * length * keys.shape[2] * head_dim
    arrays = sgemm, queries, keys, values, out, np.float32(scale)
    loops = attention_loops()
    with blas.one_thread():
        if length == 1:
            blocks = batch * keys.shape[1]
            in_blocks(lambda start, stop: loops.attend_once(*arrays, padding, start, stop), blocks, blocks, work=work)
        else:
            blocks = batch * heads * -(-length // loops.QUERIES)
            in_blocks(
                lambda start, stop: loops.attend(*arrays, causal, padding, start, stop), blocks, blocks, work=work
            )


@functools.cache
def _pool() -> ThreadPoolExecutor:
    return ThreadPoolExecutor(max(1, _cores() - 1), thread_name_prefix="mlx_fastvlm")


def _cores() -> int:
    return len(os.sched_getaffinity(0))
