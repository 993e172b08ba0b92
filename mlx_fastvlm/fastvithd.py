"""FastViTHD, FastVLM's vision tower, in its folded inference form.

Reads top to bottom: small ops → blocks → stages → tower. Attribute names equal the checkpoint's keys. Everything is NHWC.
What the converter folded away does not exist here: training branches, BatchNorms, layer scales. 1×1 convolutions are
Linear layers. Source of the architecture: Apple's ml-fastvlm@592b4ad llava/model/multimodal_encoder/mobileclip/mci.py.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Iterator
from typing import Literal, overload

import mlx.core as mx
import mlx.nn as nn

from mlx_fastvlm.config import VisionConfig
from mlx_fastvlm.kernels import depthwise_conv, depthwise_pair, feed_forward, gelu, self_attention, squeeze_excite
from mlx_fastvlm.kernels.squeeze_excite import SQUEEZE_RATIO, gated
from mlx_fastvlm.kernels.stem_conv import stem_conv
from mlx_fastvlm.layers import Linear

LAYER_NORM_EPS = 1e-5


class DepthwiseConv(nn.Module):
    """k×k convolution, one group per input channel, 'same' padding, with bias.

    Args:
        in_channels: C.
        kernel_size: k, odd.
        stride: 1 or 2.
        multiplier: outputs per input channel; output channel o reads input channel o // multiplier.
    """

    def __init__(self, in_channels: int, kernel_size: int, stride: int = 1, multiplier: int = 1):
        super().__init__()
        self.weight = mx.zeros((in_channels * multiplier, kernel_size, kernel_size, 1))
        self.bias = mx.zeros((in_channels * multiplier,))
        self._stride = stride

    def __call__(self, x: mx.array, gelu: bool = False) -> mx.array:
        """(B, H, W, C) → (B, H/stride, W/stride, C·multiplier), through GELU if asked."""
        return depthwise_conv(x, self.weight, self.bias, self._stride, gelu)


class StemConv(nn.Module):
    """The one dense convolution: 3×3, stride 2, RGB → width, and the GELU behind it."""

    def __init__(self, out_channels: int):
        super().__init__()
        self.weight = mx.zeros((out_channels, 3, 3, 3))
        self.bias = mx.zeros((out_channels,))

    def __call__(self, x: mx.array) -> mx.array:
        """(B, H, W, 3) → (B, H/2, W/2, C)."""
        return stem_conv(x, self.weight, self.bias)


class MobileOneBlock(nn.Module):
    """A convolution (its branches folded into `reparam_conv`) followed by GELU."""

    def __init__(self, reparam_conv: nn.Module):
        super().__init__()
        self.reparam_conv = reparam_conv

    def __call__(self, x: mx.array) -> mx.array:
        conv = self.reparam_conv
        return conv(x) if isinstance(conv, StemConv) else conv(x, gelu=True)


class ReparamLargeKernelConv(nn.Module):
    """Downsampling convolution: depthwise 7×7, stride 2, two outputs per channel, then GELU."""

    def __init__(self, in_channels: int, out_channels: int):
        super().__init__()
        self.lkb_reparam = DepthwiseConv(in_channels, 7, stride=2, multiplier=out_channels // in_channels)

    def __call__(self, x: mx.array) -> mx.array:
        return self.lkb_reparam(x, gelu=True)


class PatchEmbed(nn.Module):
    """Halves the map and widens it between two stages: (B, H, W, C) → (B, H/2, W/2, C')."""

    def __init__(self, in_channels: int, out_channels: int):
        super().__init__()
        self.proj = [
            ReparamLargeKernelConv(in_channels, out_channels),
            MobileOneBlock(Linear(out_channels, out_channels)),
        ]

    def __call__(self, x: mx.array) -> mx.array:
        for layer in self.proj:
            x = layer(x)
        return x


class RepCPE(nn.Module):
    """Conditional positional encoding: depthwise 7×7 with the skip connection inside the kernel."""

    def __init__(self, channels: int):
        super().__init__()
        self.reparam_conv = DepthwiseConv(channels, 7)

    def __call__(self, x: mx.array) -> mx.array:
        return self.reparam_conv(x)


class RepMixer(nn.Module):
    """Token mixing by one depthwise 3×3; skip, norm and layer scale are inside the kernel."""

    def __init__(self, channels: int):
        super().__init__()
        self.reparam_conv = DepthwiseConv(channels, 3)

    def __call__(self, x: mx.array) -> mx.array:
        return self.reparam_conv(x)


class ConvFFN(nn.Module):
    """x + (depthwise 7×7, BatchNorm inside → Linear → GELU → Linear, layer scale inside)."""

    def __init__(self, channels: int, hidden_channels: int):
        super().__init__()
        self.conv = DepthwiseConv(channels, 7)
        self.fc1 = Linear(channels, hidden_channels)
        self.fc2 = Linear(hidden_channels, channels)

    def __call__(self, x: mx.array) -> mx.array:
        return self.mix_channels(x, self.conv(x))

    def mix_channels(self, x: mx.array, mixed: mx.array) -> mx.array:
        """x + the Linear layers of `mixed`, which is the depthwise convolution of x."""
        if _quantized(self.fc1, self.fc2):
            return x + self.fc2(self.fc1(mixed, gelu=True))
        fc1, fc2 = ((layer.weight, layer.bias) for layer in (self.fc1, self.fc2))
        return feed_forward(mixed, fc1, fc2, residual=x)


class MHSA(nn.Module):
    """Multi-head self-attention over all positions of a map; `proj` holds the layer scale."""

    def __init__(self, channels: int, head_dim: int):
        super().__init__()
        self.qkv = Linear(channels, 3 * channels, bias=False)
        self.proj = Linear(channels, channels)
        self._head_dim = head_dim

    def __call__(self, x: mx.array) -> mx.array:
        """(B, H, W, C) → (B, H, W, C)."""
        batch, height, width, channels = x.shape
        mixed = self_attention(self.qkv(x).reshape(batch, height * width, -1), self._head_dim)
        return self.proj(mixed).reshape(batch, height, width, channels)


class LayerNormChannel(nn.Module):
    """LayerNorm over the channels of each position."""

    def __init__(self, channels: int):
        super().__init__()
        self.weight = mx.ones((channels,))
        self.bias = mx.zeros((channels,))

    def __call__(self, x: mx.array) -> mx.array:
        return mx.fast.layer_norm(x, self.weight, self.bias, LAYER_NORM_EPS)


class RepMixerBlock(nn.Module):
    """Block of stages 1–3."""

    def __init__(self, channels: int, mlp_ratio: int):
        super().__init__()
        self.token_mixer = RepMixer(channels)
        self.convffn = ConvFFN(channels, channels * mlp_ratio)

    def __call__(self, x: mx.array) -> mx.array:
        first, second = self.token_mixer.reparam_conv, self.convffn.conv
        x, mixed = depthwise_pair(x, (first.weight, first.bias), (second.weight, second.bias))
        return self.convffn.mix_channels(x, mixed)


class AttentionBlock(nn.Module):
    """Block of stages 4 and 5."""

    def __init__(self, channels: int, mlp_ratio: int, head_dim: int):
        super().__init__()
        self.norm = LayerNormChannel(channels)
        self.token_mixer = MHSA(channels, head_dim)
        self.convffn = ConvFFN(channels, channels * mlp_ratio)

    def __call__(self, x: mx.array) -> mx.array:
        return self.convffn(x + self.token_mixer(self.norm(x)))


class SEBlock(nn.Module):
    """Squeeze-excite, then GELU: scales each channel by a gate computed from the map's global mean."""

    def __init__(self, channels: int):
        super().__init__()
        squeezed = int(channels * SQUEEZE_RATIO)
        self.reduce = Linear(channels, squeezed)
        self.expand = Linear(squeezed, channels)

    def __call__(self, x: mx.array) -> mx.array:
        if _quantized(self.reduce, self.expand):
            return gelu(gated(x, self.reduce, self.expand))
        return squeeze_excite(x, *((layer.weight, layer.bias) for layer in (self.reduce, self.expand)))


class ConvExp(nn.Module):
    """Last widening: depthwise 3×3 with several outputs per channel → squeeze-excite → GELU."""

    def __init__(self, in_channels: int, out_channels: int):
        super().__init__()
        self.reparam_conv = DepthwiseConv(in_channels, 3, multiplier=out_channels // in_channels)
        self.se = SEBlock(out_channels)

    def __call__(self, x: mx.array) -> mx.array:
        return self.se(self.reparam_conv(x))


class FastViTHD(nn.Module):
    """The whole tower: pixels in [0, 1] → one feature row per 64×64 patch.

    `network` is the flat list of the checkpoint: stage 1, down, stage 2, down, stage 3, down, RepCPE, stage 4, down,
    RepCPE, stage 5, where a stage is a list of blocks.
    """

    def __init__(self, config: VisionConfig):
        super().__init__()
        dims = config.embed_dims
        self.patch_embed = [
            MobileOneBlock(StemConv(dims[0])),
            MobileOneBlock(DepthwiseConv(dims[0], 3, stride=2)),
            MobileOneBlock(Linear(dims[0], dims[0])),
        ]
        self.network: list = []
        for stage, (channels, depth, ratio) in enumerate(zip(dims, config.layers, config.mlp_ratios, strict=True)):
            attends = stage >= 3
            if stage > 0:
                self.network.append(PatchEmbed(dims[stage - 1], channels))
            if attends:
                self.network.append(RepCPE(channels))
                self.network.append([AttentionBlock(channels, ratio, config.head_dim) for _ in range(depth)])
            else:
                self.network.append([RepMixerBlock(channels, ratio) for _ in range(depth)])
        self.conv_exp = ConvExp(dims[-1], config.hidden_size)

    @overload
    def __call__(self, pixel_values: mx.array, return_stages: Literal[False] = False) -> mx.array: ...
    @overload
    def __call__(self, pixel_values: mx.array, return_stages: Literal[True]) -> dict[str, mx.array]: ...
    def __call__(self, pixel_values: mx.array, return_stages: bool = False) -> mx.array | dict[str, mx.array]:
        """Encode images.

        Args:
            pixel_values: (B, H, W, 3) in [0, 1], H and W multiples of 64; of the model's type.
            return_stages: for the maps of every stage instead of the rows, from finest to coarsest.

        Returns:
            (B, H/64 · W/64, hidden_size) feature rows, row-major over (H/64, W/64). With `return_stages` a dictionary,
            named as in timm's FastVit, channels last; the released models' widths are in parentheses:

            - "stem": (B, H/4, W/4, embed_dims[0]) (96)
            - "stages.0": (B, H/4, W/4, embed_dims[0]) (96)
            - "stages.1": (B, H/8, W/8, embed_dims[1]) (192)
            - "stages.2": (B, H/16, W/16, embed_dims[2]) (384)
            - "stages.3": (B, H/32, W/32, embed_dims[3]) (768)
            - "stages.4": (B, H/64, W/64, embed_dims[4]) (1536)
            - "final_conv": (B, H/64, W/64, hidden_size) (3072), which are the rows as a map
        """
        if return_stages:
            return dict(self._maps(pixel_values))
        ((_, x),) = deque(self._maps(pixel_values), maxlen=1)  # the last; the others can be freed
        return x.reshape(x.shape[0], -1, x.shape[-1])

    def _maps(self, pixel_values: mx.array) -> Iterator[tuple[str, mx.array]]:
        """Each map that `return_stages` tells of, by its name there."""
        x = pixel_values
        for block in self.patch_embed:
            x = block(x)
        yield "stem", x
        stage = 0
        for element in self.network:
            if not isinstance(element, list):  # between two stages; timm counts it to the second
                x = element(x)
                continue
            for block in element:
                x = block(x)
            yield f"stages.{stage}", x
            stage += 1
        yield "final_conv", self.conv_exp(x)


def _quantized(*layers: nn.Module) -> bool:
    """Whether any of these is stored quantized, which the fused ops do not read."""
    return not all(isinstance(layer, Linear) for layer in layers)
