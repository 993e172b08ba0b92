"""A Linear layer on a quantized weight: MLX's quantized product, or on a CPU the weight unpacked for many rows."""

from __future__ import annotations

import mlx.core as mx

from mlx_fastvlm.kernels.choice import reference_only
from mlx_fastvlm.kernels.linear import linear

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
    many_rows = x.size > _FEW_ROWS * x.shape[-1]
    if reference_only() or (many_rows and mx.default_device().type == mx.DeviceType.cpu):
        return quantized_linear_reference(x, weight, scales, biases, group_size, bits, mode)
    return mx.quantized_matmul(x, weight, scales, biases, group_size=group_size, bits=bits, mode=mode)


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
