"""Linear layers on many rows, compiled by numba: activations in panels, weights as they are stored.

A panel holds PANEL rows, each channel's numbers side by side: (C, PANEL). A product reads panels and writes panels, so
that two layers and what is between them never rearrange anything, nor is a weight rearranged: a BLAS does both for every
product. Of a weight, float32 or the bits of bfloat16, a few rows at a time are copied as float32.

LLVM's vectorizer does not keep a tile of sums in registers, so that `_tile` spells its vectors out; they are portable.
Imported as late as cpu_loops.py.
"""

import numpy as np
from llvmlite import ir
from numba import njit, types
from numba.core import cgutils
from numba.extending import intrinsic

from mlx_fastvlm.kernels.cpu_loops import JIT, gelu_of, silu_of, to_float32

LANES = 8  # numbers of a vector
PANEL = 2 * LANES  # rows
OUTPUTS = 6  # weight rows of a tile: two vectors each, twelve of the sixteen registers that AVX2 has
DEPTH = 256  # channels summed at a time: a tile's part of the weight stays in L1, of the panels in L2

_vector = ir.VectorType(ir.FloatType(), LANES)
_int32, _int64 = ir.IntType(32), ir.IntType(64)


def _load(builder, base, at):
    """The float32 or vector at index `at` of an address, which need not be aligned to a vector."""
    value = builder.load(builder.gep(base, [at]))
    value.align = 4
    return value


def _shuffled(builder, one, other, lanes):
    return builder.shuffle_vector(one, other, ir.Constant(ir.VectorType(_int32, len(lanes)), lanes))


@intrinsic
def _tile(typing, weight, weight_step, x, depth, bias, out, outputs):
    """out[n, r] = bias[n] + Σ weight[n, c] · x[c, r] over c < depth, for n < outputs, a literal integer, and r < PANEL.

    weight, x, bias, out: addresses of float32; without a bias (0) the sum is added to what `out` holds.
    weight_step: numbers from one row of the weight to the next.
    """
    if not isinstance(outputs, types.IntegerLiteral):  # numba asks again with the literal
        return None
    count, halves = outputs.literal_value, PANEL // LANES

    def generate(context, builder, signature, arguments):
        weight, step, x, depth, bias, out, _ = arguments
        has_bias = builder.icmp_signed("!=", bias, _int64(0))
        weight, bias = (builder.inttoptr(address, ir.FloatType().as_pointer()) for address in (weight, bias))
        x, out = (builder.inttoptr(address, _vector.as_pointer()) for address in (x, out))

        def broadcast(scalar):
            vector = builder.insert_element(ir.Constant(_vector, ir.Undefined), scalar, _int32(0))
            return _shuffled(builder, vector, vector, [0] * LANES)

        places = [_int64(i) for i in range(count * halves)]
        # From zero: sums of sums round less than one long sum.
        sums = [cgutils.alloca_once_value(builder, ir.Constant(_vector, [0.0] * LANES)) for _ in places]
        rows = [builder.mul(_int64(n), step) for n in range(count)]
        with cgutils.for_range(builder, depth) as channel:
            first = builder.mul(channel.index, _int64(halves))
            values = [_load(builder, x, builder.add(first, _int64(half))) for half in range(halves)]
            for n, row in enumerate(rows):
                factor = broadcast(_load(builder, weight, builder.add(row, channel.index)))
                for value, total in zip(values, sums[n * halves : (n + 1) * halves], strict=True):
                    product = builder.fmul(factor, value, flags=("contract",))  # one instruction with the addition
                    builder.store(builder.fadd(builder.load(total), product, flags=("contract",)), total)
        with builder.if_else(has_bias) as (then, otherwise):
            with then:
                for i, place in enumerate(places):
                    start = broadcast(_load(builder, bias, _int64(i // halves)))
                    builder.store(builder.fadd(start, builder.load(sums[i])), builder.gep(out, [place])).align = 4
            with otherwise:
                for i, place in enumerate(places):
                    start = _load(builder, out, place)
                    builder.store(builder.fadd(start, builder.load(sums[i])), builder.gep(out, [place])).align = 4
        return context.get_dummy_value()

    return types.void(*[types.intp] * 6, outputs), generate


@intrinsic
def _transpose(typing, source, source_step, target, target_step):
    """target[c, r] = source[r, c] for r, c < LANES: addresses of float32, and numbers from one row to the next."""

    def generate(context, builder, signature, arguments):
        source, source_step, target, target_step = arguments
        source, target = (builder.inttoptr(address, ir.FloatType().as_pointer()) for address in (source, target))

        def row(base, step, r):
            return builder.bitcast(builder.gep(base, [builder.mul(_int64(r), step)]), _vector.as_pointer())

        rows = [_load(builder, row(source, source_step, r), _int64(0)) for r in range(LANES)]
        width = 1
        while width < LANES:  # blocks of width x width change places, then of twice that
            upper = [lane if not lane & width else LANES + lane - width for lane in range(LANES)]
            lower = [lane + width if not lane & width else LANES + lane for lane in range(LANES)]
            for r in range(LANES):
                if not r & width:
                    one, other = rows[r], rows[r + width]
                    rows[r] = _shuffled(builder, one, other, upper)
                    rows[r + width] = _shuffled(builder, one, other, lower)
            width *= 2
        for r, value in enumerate(rows):
            builder.store(value, row(target, target_step, r)).align = 4
        return context.get_dummy_value()

    return types.void(*[types.intp] * 4), generate


@njit(**JIT)
def _to_panels(x, start, stop):
    """Rows [start, stop) of x (R, C) as panels (P, C, PANEL); zeros stand in for the rows that the last one lacks."""
    channels = x.shape[1]
    panels = np.empty((-(-(stop - start) // PANEL), channels, PANEL), np.float32)
    for p in range(panels.shape[0]):
        first = start + p * PANEL
        for r in range(0, PANEL, LANES):
            whole = channels // LANES * LANES if first + r + LANES <= stop else 0
            for c in range(0, whole, LANES):
                _transpose(
                    x[first + r, c:].ctypes.data, channels, panels[p, c, r:].ctypes.data, PANEL,
                )  # fmt: skip
            for row in range(r, r + LANES):
                for c in range(whole, channels):
                    panels[p, c, row] = x[first + row, c] if first + row < stop else np.float32(0)
    return panels


@njit(**JIT)
def _to_rows(panels, out, start, stop):
    """Panels (P, C, PANEL) to rows [start, stop) of out (R, C)."""
    channels = out.shape[1]
    for p in range(panels.shape[0]):
        first = start + p * PANEL
        for r in range(0, PANEL, LANES):
            whole = channels // LANES * LANES if first + r + LANES <= stop else 0
            for c in range(0, whole, LANES):
                _transpose(panels[p, c, r:].ctypes.data, PANEL, out[first + r, c:].ctypes.data, channels)
            for row in range(r, min(r + LANES, stop - first)):
                for c in range(whole, channels):
                    out[first + row, c] = panels[p, c, row]


@njit(**JIT)
def _product(weight, row, column, x, bias, out):
    """out[p, n] = bias[n] + Σ weight[row + n, column + c] · x[p, c] over c; with an empty bias added to `out`.

    x (P, C, PANEL), bias (O,), out (P, O, PANEL).
    """
    wide = np.empty((OUTPUTS, DEPTH), np.float32)
    for start in range(0, x.shape[1], DEPTH):
        depth = min(DEPTH, x.shape[1] - start)
        for first in range(0, out.shape[1], OUTPUTS):
            count = min(OUTPUTS, out.shape[1] - first)
            for n in range(count):
                stored = weight[row + first + n, column + start :]
                for c in range(depth):
                    wide[n, c] = to_float32(stored[c])
            offsets = bias[first:].ctypes.data if start == 0 and bias.size else 0
            for p in range(x.shape[0]):
                source, target = x[p, start].ctypes.data, out[p, first].ctypes.data
                if count == OUTPUTS:
                    _tile(wide.ctypes.data, DEPTH, source, depth, offsets, target, OUTPUTS)
                else:
                    for n in range(count):
                        offset = offsets + n * bias.itemsize if offsets else 0
                        _tile(wide[n].ctypes.data, DEPTH, source, depth, offset, target + n * out.strides[1], 1)


@njit(**JIT)
def _gelu_all(panels):
    flat = panels.reshape(-1)
    for i in range(flat.size):
        flat[i] = gelu_of(flat[i])


@njit(**JIT)
def linear_rows(x, weight, bias, out, start, stop, gelu):
    """Rows [start, stop) of out = x · weightᵀ + bias, through GELU if asked.

    x (R, C), bias (O,), out (R, O); weight (O, C) float32 or bits of bfloat16.
    """
    source = _to_panels(x, start, stop)
    target = np.empty((source.shape[0], out.shape[1], PANEL), np.float32)
    _product(weight, 0, 0, source, bias, target)
    if gelu:
        _gelu_all(target)
    _to_rows(target, out, start, stop)


@njit(**JIT)
def feed_forward_rows(x, weight1, bias1, weight2, bias2, residual, out, start, stop):
    """Rows [start, stop) of out = residual + gelu(x · weight1ᵀ + bias1) · weight2ᵀ + bias2.

    x, residual, out (R, C); weight1 (H, C), weight2 (C, H), float32 or bits of bfloat16; bias1 (H,), bias2 (C,).
    """
    source, target = _to_panels(x, start, stop), _to_panels(residual, start, stop)
    for p in range(target.shape[0]):
        for c in range(target.shape[1]):
            for r in range(PANEL):
                target[p, c, r] += bias2[c]
    panels, width = source.shape[0], weight1.shape[0]
    memory = np.empty(panels * DEPTH * PANEL, np.float32)
    for first in range(0, width, DEPTH):
        depth = min(DEPTH, width - first)
        hidden = memory[: panels * depth * PANEL].reshape(panels, depth, PANEL)
        _product(weight1, first, 0, source, bias1[first : first + depth], hidden)
        _gelu_all(hidden)
        _product(weight2, 0, first, hidden, bias2[:0], target)
    _to_rows(target, out, start, stop)


@njit(**JIT)
def swiglu_rows(x, gate_up, down, out, start, stop):
    """Rows [start, stop) of out = (silu(x · gateᵀ) · (x · upᵀ)) · downᵀ.

    x, out (R, C); gate_up (2 · H, C), the gate's rows first, and down (C, H), float32 or bits of bfloat16.
    """
    source = _to_panels(x, start, stop)
    target = np.zeros((source.shape[0], out.shape[1], PANEL), np.float32)
    panels, width = source.shape[0], down.shape[1]
    zeros = np.zeros(DEPTH, np.float32)
    memory = np.empty((2, panels * DEPTH * PANEL), np.float32)
    for first in range(0, width, DEPTH):
        depth = min(DEPTH, width - first)
        gates, ups = memory[0, : panels * depth * PANEL], memory[1, : panels * depth * PANEL]
        gate, up = gates.reshape(panels, depth, PANEL), ups.reshape(panels, depth, PANEL)
        _product(gate_up, first, 0, source, zeros, gate)
        _product(gate_up, width + first, 0, source, zeros, up)
        for i in range(gates.size):
            gates[i] = silu_of(gates[i]) * ups[i]
        _product(down, 0, first, gate, zeros[:0], target)
    _to_rows(target, out, start, stop)
