"""Fused operations: each file has the op, its plain reference and the choice between them. Kernels know shapes only."""

from mlx_fastvlm.kernels.depthwise_conv import depthwise_conv
from mlx_fastvlm.kernels.gelu import gelu, linear_gelu

__all__ = ["depthwise_conv", "gelu", "linear_gelu"]
