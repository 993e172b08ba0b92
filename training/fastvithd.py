"""FastViTHD in its training form: parallel branches, BatchNorms and layer scales still apart.

Module names are those of Apple's checkpoints (apple/ml-fastvlm, llava/model/multimodal_encoder/mobileclip/mci.py),
so that `state_dict()` under the right prefix is a LlavaQwen2 vision tower. Layout is NCHW. Folding the branches into
single convolutions is the converter's business, not done here.
"""

import torch
from torch import nn
from torch.nn import functional as F

BN_MOMENTUM = 0.05
STAGE_3_END = 5


def conv_bn(in_channels: int, out_channels: int, kernel_size: int, stride: int = 1, groups: int = 1) -> nn.Sequential:
    """A bias-free "same"-padded convolution and its BatchNorm, as children `conv` and `bn`."""
    block = nn.Sequential()
    block.add_module(
        "conv",
        nn.Conv2d(in_channels, out_channels, kernel_size, stride, kernel_size // 2, groups=groups, bias=False),
    )
    block.add_module("bn", nn.BatchNorm2d(out_channels, momentum=BN_MOMENTUM))
    return block


class SEBlock(nn.Module):
    """Squeeze-and-excitation: scale each channel by a gate computed from its global mean."""

    def __init__(self, channels: int, rd_ratio: float = 0.0625):
        super().__init__()
        reduced = int(channels * rd_ratio)
        self.reduce = nn.Conv2d(channels, reduced, 1)
        self.expand = nn.Conv2d(reduced, channels, 1)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        gate = self.expand(F.relu(self.reduce(x.mean((2, 3), keepdim=True))))
        return x * torch.sigmoid(gate)


class MobileOneBlock(nn.Module):
    """Sum of a k×k conv, a 1×1 conv and the identity, each through its own BatchNorm; then SE and GELU if asked for.

    The identity branch exists when the block keeps width and resolution, the 1×1 branch when k > 1.
    """

    def __init__(
        self,
        in_channels: int,
        out_channels: int,
        kernel_size: int,
        stride: int = 1,
        groups: int = 1,
        use_conv_branch: bool = True,
        use_scale_branch: bool = True,
        use_se: bool = False,
        use_act: bool = True,
    ):
        super().__init__()
        keeps_shape = in_channels == out_channels and stride == 1
        self.rbr_skip = nn.BatchNorm2d(in_channels, momentum=BN_MOMENTUM) if keeps_shape else None
        self.rbr_conv = None
        if use_conv_branch:
            self.rbr_conv = nn.ModuleList([conv_bn(in_channels, out_channels, kernel_size, stride, groups)])
        self.rbr_scale = None
        if use_scale_branch and kernel_size > 1:
            self.rbr_scale = conv_bn(in_channels, out_channels, 1, stride, groups)
        self.se = SEBlock(out_channels) if use_se else nn.Identity()
        self.activation = nn.GELU() if use_act else nn.Identity()

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        branches = list(self.rbr_conv or [])
        branches += [branch for branch in (self.rbr_scale, self.rbr_skip) if branch is not None]
        return self.activation(self.se(sum(branch(x) for branch in branches)))


class ReparamLargeKernelConv(nn.Module):
    """Depthwise 7×7 plus padded 3×3, both stride 2 with BatchNorm; out_channels / in_channels filters per input."""

    def __init__(self, in_channels: int, out_channels: int, kernel_size: int = 7, stride: int = 2):
        super().__init__()
        self.lkb_origin = conv_bn(in_channels, out_channels, kernel_size, stride, groups=in_channels)
        self.small_conv = conv_bn(in_channels, out_channels, 3, stride, groups=in_channels)
        self.activation = nn.GELU()

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.activation(self.lkb_origin(x) + self.small_conv(x))


class PatchEmbed(nn.Module):
    """Halve the resolution and change the width: large-kernel depthwise, then 1×1."""

    def __init__(self, in_channels: int, embed_dim: int):
        super().__init__()
        self.proj = nn.Sequential(
            ReparamLargeKernelConv(in_channels, embed_dim), MobileOneBlock(embed_dim, embed_dim, kernel_size=1)
        )

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.proj(x)


class RepMixer(nn.Module):
    """Convolutional token mixer: x + layer_scale * (mixer(x) - norm(x))."""

    def __init__(self, dim: int, layer_scale_init: float):
        super().__init__()
        self.norm = MobileOneBlock(
            dim, dim, 3, groups=dim, use_conv_branch=False, use_scale_branch=False, use_act=False
        )
        self.mixer = MobileOneBlock(dim, dim, 3, groups=dim, use_act=False)
        self.layer_scale = nn.Parameter(torch.full((dim, 1, 1), layer_scale_init))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x + self.layer_scale * (self.mixer(x) - self.norm(x))


class ConvFFN(nn.Module):
    """Depthwise 7×7 with BatchNorm, then a two-layer MLP as 1×1 convolutions."""

    def __init__(self, dim: int, hidden: int):
        super().__init__()
        self.conv = conv_bn(dim, dim, 7, groups=dim)
        self.fc1 = nn.Conv2d(dim, hidden, 1)
        self.act = nn.GELU()
        self.fc2 = nn.Conv2d(hidden, dim, 1)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.fc2(self.act(self.fc1(self.conv(x))))


class RepMixerBlock(nn.Module):
    """Block of stages 1 to 3: RepMixer, then a scaled residual ConvFFN."""

    def __init__(self, dim: int, mlp_ratio: float, layer_scale_init: float):
        super().__init__()
        self.token_mixer = RepMixer(dim, layer_scale_init)
        self.convffn = ConvFFN(dim, int(dim * mlp_ratio))
        self.layer_scale = nn.Parameter(torch.full((dim, 1, 1), layer_scale_init))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = self.token_mixer(x)
        return x + self.layer_scale * self.convffn(x)


class LayerNormChannel(nn.Module):
    """LayerNorm over the channels of an NCHW map."""

    def __init__(self, dim: int, eps: float = 1e-5):
        super().__init__()
        self.weight = nn.Parameter(torch.ones(dim))
        self.bias = nn.Parameter(torch.zeros(dim))
        self.eps = eps

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = F.layer_norm(x.permute(0, 2, 3, 1), self.weight.shape, self.weight, self.bias, self.eps)
        return x.permute(0, 3, 1, 2)


class MHSA(nn.Module):
    """Self-attention over all positions of an NCHW map."""

    def __init__(self, dim: int, head_dim: int):
        super().__init__()
        self.num_heads, self.head_dim = dim // head_dim, head_dim
        self.qkv = nn.Linear(dim, dim * 3, bias=False)
        self.proj = nn.Linear(dim, dim)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        b, c, h, w = x.shape
        tokens = x.flatten(2).transpose(1, 2)
        qkv = self.qkv(tokens).view(b, h * w, 3, self.num_heads, self.head_dim)
        q, k, v = qkv.permute(2, 0, 3, 1, 4)
        mixed = F.scaled_dot_product_attention(q, k, v).transpose(1, 2).reshape(b, h * w, c)
        return self.proj(mixed).transpose(1, 2).reshape(b, c, h, w)


class AttentionBlock(nn.Module):
    """Block of stages 4 and 5: pre-norm attention, then ConvFFN, both scaled residuals."""

    def __init__(self, dim: int, mlp_ratio: float, head_dim: int, layer_scale_init: float):
        super().__init__()
        self.norm = LayerNormChannel(dim)
        self.token_mixer = MHSA(dim, head_dim)
        self.convffn = ConvFFN(dim, int(dim * mlp_ratio))
        self.layer_scale_1 = nn.Parameter(torch.full((dim, 1, 1), layer_scale_init))
        self.layer_scale_2 = nn.Parameter(torch.full((dim, 1, 1), layer_scale_init))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = x + self.layer_scale_1 * self.token_mixer(self.norm(x))
        return x + self.layer_scale_2 * self.convffn(x)


class RepCPE(nn.Module):
    """Conditional position encoding: depthwise 7×7 with bias, plus the identity."""

    def __init__(self, dim: int):
        super().__init__()
        self.pe = nn.Conv2d(dim, dim, 7, padding=3, groups=dim)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.pe(x) + x


def convolutional_stem(width: int) -> nn.Sequential:
    """3 → width channels at a quarter of the resolution; no 1×1 scale branches."""
    return nn.Sequential(
        MobileOneBlock(3, width, 3, stride=2, use_scale_branch=False),
        MobileOneBlock(width, width, 3, stride=2, groups=width, use_scale_branch=False),
        MobileOneBlock(width, width, 1, use_scale_branch=False),
    )


class FastViTHD(nn.Module):
    """The five-stage tower: (B, 3, R, R) in [0, 1] → (B, cls_ratio * width, R/64, R/64).

    Args:
        vision_config: dict with embed_dims, layers, mlp_ratios (five each), cls_ratio and head_dim.
        layer_scale_init: start value of every layer scale.
    """

    def __init__(self, vision_config: dict, layer_scale_init: float = 0.5):
        super().__init__()
        dims, depths = vision_config["embed_dims"], vision_config["layers"]
        self.patch_embed = convolutional_stem(dims[0])
        network = []
        for stage, (dim, depth, ratio) in enumerate(zip(dims, depths, vision_config["mlp_ratios"], strict=True)):
            if stage < 3:
                blocks = [RepMixerBlock(dim, ratio, layer_scale_init) for _ in range(depth)]
            else:
                network.append(RepCPE(dim))
                head_dim = vision_config["head_dim"]
                blocks = [AttentionBlock(dim, ratio, head_dim, layer_scale_init) for _ in range(depth)]
            network.append(nn.Sequential(*blocks))
            if stage < 4:
                network.append(PatchEmbed(dim, dims[stage + 1]))
        self.network = nn.ModuleList(network)
        width = int(dims[-1] * vision_config["cls_ratio"])
        self.conv_exp = MobileOneBlock(dims[-1], width, 3, groups=dims[-1], use_se=True)

    def forward_maps(self, pixel_values: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """The map after stage 3, (B, embed_dims[2], R/16, R/16), and the image feature map."""
        x = self.patch_embed(pixel_values)
        for block in self.network[:STAGE_3_END]:
            x = block(x)
        middle = x
        for block in self.network[STAGE_3_END:]:
            x = block(x)
        return middle, self.conv_exp(x)

    def forward(self, pixel_values: torch.Tensor) -> torch.Tensor:
        return self.forward_maps(pixel_values)[1]
