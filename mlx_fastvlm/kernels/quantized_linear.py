"""A Linear layer on a quantized weight: MLX's quantized product, on a CPU compiled loops, or the weight unpacked."""

from __future__ import annotations

import mlx.core as mx
import numpy as np

from mlx_fastvlm.kernels import cpu
from mlx_fastvlm.kernels.choice import reference_only
from mlx_fastvlm.kernels.linear import linear, linear_rows

# On a CPU MLX's quantized product takes about 1 ns a multiplication whatever the rows (9 ms for one row and a weight of
# 8.7 million), unpacking that weight 80 ms and its sgemm next to nothing: measured even at about ten rows.
_FEW_ROWS = 8


def quantized_linear(
    x: mx.array,
    weight: mx.array,
    scales: mx.array,
    biases: mx.array | None,
    group_size: int,
    bits: int,
    mode: str,
) -> mx.array:
    """x @ Wᵀ with W as `mx.quantize` packs it.

    Args:
        x: (..., C).
        weight, scales, biases: (O, C · bits / 32) uint32 and (O, C / group_size) twice; no biases but in affine mode.
        group_size, bits, mode: as `mx.quantize` takes them.

    Returns:
        (..., O) in x's type.
    """
    if mode == "affine" and bits in (2, 4, 8) and cpu.suits(x, scales.size * group_size):
        return quantized_linear_cpu(x, weight, scales, biases, bits)
    many_rows = x.size > _FEW_ROWS * x.shape[-1]
    if reference_only() or (many_rows and mx.default_device().type == mx.DeviceType.cpu):
        return quantized_linear_reference(x, weight, scales, biases, group_size, bits, mode)
    return mx.quantized_matmul(x, weight, scales, biases, group_size=group_size, bits=bits, mode=mode)


def quantized_linear_cpu(x: mx.array, weight: mx.array, scales: mx.array, biases: mx.array, bits: int) -> mx.array:
    """`quantized_linear` in affine mode with 2, 4 or 8 bits: for one row on the packed weight, for more on its numbers."""
    packed = np.asarray(weight).view(np.uint8).reshape(*scales.shape, -1)
    arrays = packed, cpu.view(scales), cpu.view(biases)
    return cpu.filled((*x.shape[:-1], len(packed)), lambda out: _quantized_rows(cpu.rows(x), *arrays, bits, out), x)


def _quantized_rows(
    x: np.ndarray, packed: np.ndarray, scales: np.ndarray, biases: np.ndarray, bits: int, out: np.ndarray
) -> None:
    """x (R, C), packed (O, groups, bytes of a group), scales, biases (O, groups), out (R, O)."""
    if len(x) > 1:
        linear_rows(x, _unpacked(packed, scales, biases, bits), None, out)
        return
    vector = np.ascontiguousarray(x.reshape(-1, 8 // bits).T)
    sums = x.reshape(packed.shape[1], -1).sum(axis=1)

    def block(start: int, stop: int) -> None:
        part = slice(start, stop)
        cpu.quantized_loops().matvec(packed[part], scales[part], biases[part], vector, sums, bits, out[0, part])

    cpu.in_blocks(block, len(packed), len(packed))


def _unpacked(packed: np.ndarray, scales: np.ndarray, biases: np.ndarray, bits: int) -> np.ndarray:
    """The weight as float32: arrays as above → (O, C)."""
    out = np.empty((*packed.shape, 8 // bits), np.float32)

    def block(start: int, stop: int) -> None:
        part = slice(start, stop)
        cpu.quantized_loops().unpack(packed[part], scales[part], biases[part], bits, out[part])

    cpu.in_blocks(block, len(packed), len(packed))
    return out.reshape(len(packed), -1)


def quantized_linear_reference(
    x: mx.array,
    weight: mx.array,
    scales: mx.array,
    biases: mx.array | None,
    group_size: int,
    bits: int,
    mode: str,
) -> mx.array:
    """`quantized_linear` through the unpacked weight, as its definition has it."""
    unpacked = mx.dequantize(weight, scales, biases, group_size=group_size, bits=bits, mode=mode, dtype=x.dtype)
    return linear(x, unpacked)
