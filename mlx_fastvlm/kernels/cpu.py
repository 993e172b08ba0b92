"""The Linux CPU's fast path: where it is taken, and how work is spread over cores.

MLX's Linux CPU backend runs elementwise ops on one thread (erf 30-45 ns an element, exp 20) and depthwise convolutions
as a plain loop. Here work is cut into blocks of rows, one thread per core; a block's matrix products go to OpenBLAS
(single-threaded: the blocks are the parallelism) and what follows is done while the block is in cache.

Every op evaluates its inputs first and writes its output through a NumPy view of a fresh MLX buffer, without a copy.
So none can be used inside mx.compile or mx.grad, and each op's dispatcher asks `suits` first.
"""

from __future__ import annotations

import functools
import os
import threading
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from types import ModuleType

import mlx.core as mx
import numpy as np

from mlx_fastvlm import blas
from mlx_fastvlm.kernels.choice import reference_only

ROWS = 256  # rows per block: large enough for OpenBLAS to pack the weight cheaply, small enough to stay in L2/L3
# Below this, starting numba (0.5 s in a new process) costs more than plain ops: small models never load it.
MIN_ELEMENTS = 2**20

_ROW_MAJOR, _NO_TRANS, _TRANS = 101, 111, 112  # CBLAS
_one_op_at_a_time = threading.Lock()  # OpenBLAS's number of threads is the process's: see `in_blocks`


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
        elements >= MIN_ELEMENTS
        and x.dtype == mx.float32
        and mx.default_device().type == mx.DeviceType.cpu
        and not reference_only()
        and missing() is None
    )


@functools.cache
def loops() -> ModuleType:
    """The compiled loops. The first call of an installation compiles them, which takes some 10 s; later ones 0.5 s."""
    from mlx_fastvlm.kernels import cpu_loops

    return cpu_loops


def warm_up() -> None:
    """Load (or, once per installation, compile) all loops now, so that the first image does not wait for them."""
    if missing() is not None:
        return
    ones = np.ones((2, 2), np.float32)
    loops().bias_gelu(ones.copy(), ones[0])
    loops().add_bias(ones, ones[0], ones.copy())
    loops().silu_mul(np.ones((2, 4), np.float32), ones.copy())
    loops().softmax(ones.copy(), np.float32(1))
    image = np.ones((1, 3, 3, 2), np.float32)
    for out in (np.empty((3, 3, 2), np.float32), np.empty((3, 3, 4), np.float32)[:, :, ::2]):
        loops().depthwise_rows(image[0], image[0, :, :, :], ones[0], out, 1, 0, 3, True)


def in_blocks(block: Callable[[int, int], None], total: int, step: int) -> None:
    """Call block(start, stop) over range(total) on all cores: steps of `step`, shorter where cores would stand idle."""
    step = max(1, min(step, -(-total // _cores())))
    with _one_op_at_a_time, blas.one_thread():
        # list() waits for all, and raises what a block raised.
        list(_pool().map(lambda start: block(start, min(total, start + step)), range(0, total, step)))


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


def matmul(a: np.ndarray, b: np.ndarray, out: np.ndarray) -> None:
    """out = a @ b. Rows may lie apart in memory, elements of a row not; the same holds below."""
    _sgemm(_NO_TRANS, a, b, out, 0.0)


def matmul_t(a: np.ndarray, b: np.ndarray, out: np.ndarray, add: bool = False) -> None:
    """out = a @ b.T, or out += a @ b.T with `add`."""
    _sgemm(_TRANS, a, b, out, 1.0 if add else 0.0)


def matvec(matrix: np.ndarray, vector: np.ndarray, out: np.ndarray) -> None:
    """out = matrix @ vector, reading the matrix once (sgemm would pack all of it first)."""
    blas.openblas().scipy_cblas_sgemv(
        _ROW_MAJOR, _NO_TRANS, *matrix.shape, 1.0, matrix.ctypes.data, matrix.shape[1],
        vector.ctypes.data, 1, 0.0, out.ctypes.data, 1,
    )  # fmt: skip


def _sgemm(transpose_b: int, a: np.ndarray, b: np.ndarray, out: np.ndarray, beta: float) -> None:
    lda, ldb, ldc = (matrix.strides[0] // matrix.itemsize for matrix in (a, b, out))
    blas.openblas().scipy_cblas_sgemm(
        _ROW_MAJOR, _NO_TRANS, transpose_b, *out.shape, a.shape[1],
        1.0, a.ctypes.data, lda, b.ctypes.data, ldb, beta, out.ctypes.data, ldc,
    )  # fmt: skip


@functools.cache
def _pool() -> ThreadPoolExecutor:
    return ThreadPoolExecutor(_cores(), thread_name_prefix="mlx_fastvlm")


def _cores() -> int:
    return len(os.sched_getaffinity(0))
