"""Attention's compiled loop over heads and blocks of queries; the matrix products are OpenBLAS's, called without Python.

Compiled by numba like cpu_loops.py, and imported as late.
"""

import numpy as np
from llvmlite import ir
from numba import njit, types
from numba.extending import intrinsic

from mlx_fastvlm.kernels.cpu_loops import JIT, softmax

QUERIES = 128  # per block: their scores over a thousand keys stay in L2

_ROW_MAJOR, _NO_TRANS, _TRANS = 101, 111, 112  # CBLAS
_int32, _float, _pointer = ir.IntType(32), ir.FloatType(), ir.IntType(8).as_pointer()
_SGEMM = ir.FunctionType(
    ir.VoidType(),
    [_int32] * 6 + [_float, _pointer, _int32, _pointer, _int32, _float, _pointer, _int32],
)


@intrinsic
def _call_sgemm(typing, function, transpose_b, rows, columns, depth, a, a_step, b, b_step, out, out_step):
    """out = a · b, or a · bᵀ, by the cblas_sgemm at address `function`; a, b, out: addresses, and numbers a row."""

    def generate(context, builder, signature, arguments):
        function, *numbers = arguments
        transpose, rows, columns, depth, a, a_step, b, b_step, out, out_step = (
            builder.inttoptr(value, _pointer) if place in (4, 6, 8) else builder.trunc(value, _int32)
            for place, value in enumerate(numbers)
        )
        order, plain = _int32(_ROW_MAJOR), _int32(_NO_TRANS)
        one, zero = _float(1.0), _float(0.0)
        arguments = [order, plain, transpose, rows, columns, depth, one, a, a_step, b, b_step, zero, out, out_step]
        builder.call(builder.inttoptr(function, _SGEMM.as_pointer()), arguments)
        return context.get_dummy_value()

    return types.void(*[types.intp] * 11), generate


@njit(**JIT)
def _sgemm(function, transpose_b, a, b, out):
    """out = a · b or a · bᵀ of matrices whose rows may lie apart, numbers of a row not."""
    size = a.itemsize
    _call_sgemm(
        function, transpose_b, out.shape[0], out.shape[1], a.shape[1], a.ctypes.data, a.strides[0] // size,
        b.ctypes.data, b.strides[0] // size, out.ctypes.data, out.strides[0] // size,
    )  # fmt: skip


_HEADS = types.float32[:, :, :, :]  # of any strides


_PADDING = types.int64[::1]


@njit(types.void(types.intp, *[_HEADS] * 4, types.float32, types.boolean, _PADDING, types.intp, types.intp), **JIT)
def attend(sgemm, queries, keys, values, out, scale, causal, padding, start, stop):
    """Blocks [start, stop) of out = softmax(scale · q kᵀ) v; block i is of head i // (blocks a head).

    queries, out (B, heads, L, D), keys, values (B, key/value heads, N, D), all possibly strided. With `causal` the
    queries are the last L of N positions and see none after their own. No query sees the first padding[b] positions;
    padding (B,) leaves each query at least one.
    sgemm: address of a single-threaded cblas_sgemm.
    """
    heads, length, positions = queries.shape[1], queries.shape[2], keys.shape[2]
    sharing, parts = heads // keys.shape[1], -(-length // QUERIES)
    memory = np.empty(min(QUERIES, length) * positions, np.float32)
    for block in range(start, stop):
        image, head, first = block // parts // heads, block // parts % heads, block % parts * QUERIES
        last = min(length, first + QUERIES)
        begin = padding[image]
        seen = positions - length + first + 1 if causal else positions  # the first query sees those before this one
        end = min(positions, seen + last - first - 1)  # and no query of the block any from this one on
        kept = end - begin
        scores = memory[: (last - first) * kept].reshape(last - first, kept)
        _sgemm(sgemm, _TRANS, queries[image, head, first:last], keys[image, head // sharing, begin:end], scores)
        softmax(scores, scale, seen - begin)
        _sgemm(sgemm, _NO_TRANS, scores, values[image, head // sharing, begin:end], out[image, head, first:last])


@njit(types.void(types.intp, *[_HEADS] * 4, types.float32, _PADDING, types.intp, types.intp), **JIT)
def attend_once(sgemm, queries, keys, values, out, scale, padding, start, stop):
    """`attend` for one query position a head: those that share keys are the rows of one product.

    Block i is of key/value head i % (key/value heads).
    """
    kv_heads, positions = keys.shape[1], keys.shape[2]
    sharing = queries.shape[1] // kv_heads
    memory = np.empty(sharing * positions, np.float32)
    for block in range(start, stop):
        image, kv_head = block // kv_heads, block % kv_heads
        heads, begin = slice(kv_head * sharing, (kv_head + 1) * sharing), padding[image]
        scores = memory[: sharing * (positions - begin)].reshape(sharing, positions - begin)
        _sgemm(sgemm, _TRANS, queries[image, heads, 0], keys[image, kv_head, begin:], scores)
        softmax(scores, scale, positions)
        _sgemm(sgemm, _NO_TRANS, scores, values[image, kv_head, begin:], out[image, heads, 0])
