"""Fused operations, one per file: `<op>` chooses, `<op>_reference` is plain MLX ops, the others are fast versions.

Kernels know shapes, not configs. MLX_FASTVLM_KERNELS=reference gives the plain result everywhere.
"""

from mlx_fastvlm.kernels.add_rms_norm import add_rms_norm
from mlx_fastvlm.kernels.causal_attention import causal_attention
from mlx_fastvlm.kernels.choice import kernel_mode, plain_ops, reference_only
from mlx_fastvlm.kernels.depthwise_conv import depthwise_conv
from mlx_fastvlm.kernels.depthwise_pair import depthwise_pair
from mlx_fastvlm.kernels.feed_forward import feed_forward
from mlx_fastvlm.kernels.gelu import gelu
from mlx_fastvlm.kernels.linear import linear
from mlx_fastvlm.kernels.linear_epilogue import linear_gelu
from mlx_fastvlm.kernels.quantized_attention import quantized_attention
from mlx_fastvlm.kernels.quantized_linear import quantized_linear
from mlx_fastvlm.kernels.quantized_swiglu import quantized_swiglu
from mlx_fastvlm.kernels.rotary_heads import rotary_heads
from mlx_fastvlm.kernels.self_attention import self_attention
from mlx_fastvlm.kernels.squeeze_excite import squeeze_excite
from mlx_fastvlm.kernels.stem_conv import stem_conv
from mlx_fastvlm.kernels.swiglu import swiglu
from mlx_fastvlm.kernels.swiglu_feed_forward import swiglu_feed_forward

__all__ = [
    "add_rms_norm",
    "causal_attention",
    "depthwise_conv",
    "depthwise_pair",
    "feed_forward",
    "gelu",
    "kernel_mode",
    "linear",
    "linear_gelu",
    "plain_ops",
    "quantized_attention",
    "quantized_linear",
    "quantized_swiglu",
    "reference_only",
    "rotary_heads",
    "self_attention",
    "squeeze_excite",
    "stem_conv",
    "swiglu",
    "swiglu_feed_forward",
]
