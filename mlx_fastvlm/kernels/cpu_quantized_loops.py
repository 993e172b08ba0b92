"""Loops over weights as `mx.quantize` packs them in affine mode with 2, 4 or 8 bits, compiled like cpu_loops.py.

A packed weight comes as bytes (O, groups, bytes of a group). Byte i of a group holds its numbers i · P to i · P + P - 1,
P = 8 / bits, the first in the lowest bits; number q stands for scale · q + bias of its group.
"""

import numpy as np
from llvmlite import ir
from numba import njit, types
from numba.core import cgutils
from numba.extending import intrinsic

from mlx_fastvlm.kernels.cpu_loops import JIT

LANES = 8  # numbers of a vector, and bytes read at a time

f32, i32 = np.float32, np.int32
_floats, _integers = ir.VectorType(ir.FloatType(), LANES), ir.VectorType(ir.IntType(32), LANES)
_bytes, _int32, _int64 = ir.VectorType(ir.IntType(8), LANES), ir.IntType(32), ir.IntType(64)


@intrinsic
def _scaled_dot(typing, packed, scales, groups, group_bytes, vector, part_step, bits):
    """Σ scale[g] · Σ q · vector over the groups g of a row, where q are the packed numbers.

    packed, scales, vector: addresses of bytes and float32; part_step: numbers from vector[p] to vector[p + 1]; bits: a
    literal integer. The sums stay in vectors to the end: LLVM's vectorizer would add their lanes up for each group.
    """
    if not isinstance(bits, types.IntegerLiteral):  # numba asks again with the literal
        return None
    width = bits.literal_value

    def generate(context, builder, signature, arguments):
        packed, scales, groups, group_bytes, vector, part_step, _ = arguments
        packed, scales, vector = (
            builder.inttoptr(address, kind.as_pointer())
            for address, kind in ((packed, ir.IntType(8)), (scales, ir.FloatType()), (vector, ir.FloatType()))
        )

        def load(base, at, kind):
            value = builder.load(builder.bitcast(builder.gep(base, [at]), kind.as_pointer()))
            value.align = 1 if kind is _bytes else 4
            return value

        def splat(scalar, kind):
            first = builder.insert_element(ir.Constant(kind, ir.Undefined), scalar, _int32(0))
            return builder.shuffle_vector(first, first, ir.Constant(_integers, [0] * LANES))

        def add_product(total, a, b):
            product = builder.fmul(a, b, flags=("contract",))  # one instruction with the addition
            builder.store(builder.fadd(builder.load(total), product, flags=("contract",)), total)

        zero = ir.Constant(_floats, [0.0] * LANES)
        total, dot = cgutils.alloca_once_value(builder, zero), cgutils.alloca_once(builder, _floats)
        with cgutils.for_range(builder, groups) as group:
            first = builder.mul(group.index, group_bytes)
            builder.store(zero, dot)
            with cgutils.for_range(builder, builder.udiv(group_bytes, _int64(LANES))) as step:
                at = builder.add(first, builder.mul(step.index, _int64(LANES)))
                eight = builder.zext(load(packed, at, _bytes), _integers)
                for part in range(8 // width):
                    number = builder.lshr(eight, ir.Constant(_integers, [part * width] * LANES))
                    number = builder.and_(number, ir.Constant(_integers, [2**width - 1] * LANES))
                    factor = load(vector, builder.add(builder.mul(_int64(part), part_step), at), _floats)
                    add_product(dot, builder.sitofp(number, _floats), factor)
            scale = builder.load(builder.gep(scales, [group.index]))
            add_product(total, builder.load(dot), splat(scale, _floats))
        lanes = builder.load(total)
        sums = [builder.extract_element(lanes, _int32(lane)) for lane in range(LANES)]
        while len(sums) > 1:
            sums = [builder.fadd(*pair) for pair in zip(sums[::2], sums[1::2], strict=True)]
        return sums[0]

    return types.float32(*[types.intp] * 6, bits), generate


@njit(**JIT)
def matvec(packed, scales, biases, vector, sums, bits, out):
    """out = weight @ vector, without unpacking it in memory.

    scales, biases (O, groups). vector (P, groups · bytes of a group): number p of each byte's P in vector[p]; sums
    (groups,): of each group's part of it. A group has a multiple of LANES bytes.
    """
    groups, size, x, step = packed.shape[1], packed.shape[2], vector.ctypes.data, vector.shape[1]
    for r in range(packed.shape[0]):
        row, row_scales = packed[r].ctypes.data, scales[r].ctypes.data
        if bits == 2:
            total = _scaled_dot(row, row_scales, groups, size, x, step, 2)
        elif bits == 4:
            total = _scaled_dot(row, row_scales, groups, size, x, step, 4)
        else:
            total = _scaled_dot(row, row_scales, groups, size, x, step, 8)
        for g in range(biases.shape[1]):
            total += biases[r, g] * sums[g]
        out[r] = total


@njit(**JIT)
def unpack(packed, scales, biases, bits, out):
    """The weight's numbers: out (O, groups, bytes of a group, P)."""
    mask = i32((1 << bits) - 1)
    for r in range(packed.shape[0]):
        for g in range(packed.shape[1]):
            scale, bias = scales[r, g], biases[r, g]
            for i in range(packed.shape[2]):
                byte = i32(packed[r, g, i])
                for p in range(out.shape[3]):
                    out[r, g, i, p] = f32(i32((byte >> i32(p * bits)) & mask)) * scale + bias
