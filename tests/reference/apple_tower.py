"""FastViTHD in inference form as a torch module with Apple's module names, for what depends on them: a Core ML export.

Names and arithmetic as in ml-fastvlm@592b4ad (llava/model/multimodal_encoder/mobileclip/mci.py and mobileclip_encoder.py).
"""

from pathlib import Path

import torch
from torch import nn

from .presets import TowerSize, tower_size
from .torch_reference import read_tensors


class MobileOneBlock(nn.Module):
    def __init__(self, channels: int, outputs: int, kernel: int, stride: int = 1, groups: int = 1, squeeze: int = 0):
        super().__init__()
        self.reparam_conv = nn.Conv2d(channels, outputs, kernel, stride, kernel // 2, groups=groups)
        self.se = SEBlock(outputs, squeeze) if squeeze else nn.Identity()
        self.activation = nn.GELU()

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.activation(self.se(self.reparam_conv(x)))


class SEBlock(nn.Module):
    def __init__(self, channels: int, squeeze: int):
        super().__init__()
        self.reduce = nn.Conv2d(channels, squeeze, 1)
        self.expand = nn.Conv2d(squeeze, channels, 1)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        pooled = nn.functional.avg_pool2d(x, kernel_size=list(x.shape[2:]))
        return x * torch.sigmoid(self.expand(torch.relu(self.reduce(pooled)))).view(-1, x.shape[1], 1, 1)


class LargeKernel(nn.Module):
    def __init__(self, channels: int, outputs: int):
        super().__init__()
        self.lkb_reparam = nn.Conv2d(channels, outputs, 7, 2, 3, groups=channels)
        self.activation = nn.GELU()

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.activation(self.lkb_reparam(x))


class PatchEmbed(nn.Module):
    def __init__(self, channels: int, outputs: int):
        super().__init__()
        self.proj = nn.Sequential(LargeKernel(channels, outputs), MobileOneBlock(outputs, outputs, 1))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.proj(x)


class Depthwise(nn.Module):
    """RepMixer and RepCPE alike."""

    def __init__(self, channels: int, kernel: int):
        super().__init__()
        self.reparam_conv = nn.Conv2d(channels, channels, kernel, 1, kernel // 2, groups=channels)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.reparam_conv(x)


class ConvFFN(nn.Module):
    def __init__(self, channels: int, hidden: int):
        super().__init__()
        self.conv = nn.Sequential()
        self.conv.add_module("conv", nn.Conv2d(channels, channels, 7, 1, 3, groups=channels, bias=False))
        self.conv.add_module("bn", nn.BatchNorm2d(channels))
        self.fc1 = nn.Conv2d(channels, hidden, 1)
        self.act = nn.GELU()
        self.fc2 = nn.Conv2d(hidden, channels, 1)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.fc2(self.act(self.fc1(self.conv(x))))


class RepMixerBlock(nn.Module):
    def __init__(self, channels: int, hidden: int):
        super().__init__()
        self.token_mixer = Depthwise(channels, 3)
        self.convffn = ConvFFN(channels, hidden)
        self.layer_scale = nn.Parameter(torch.ones(channels, 1, 1))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = self.token_mixer(x)
        return x + self.layer_scale * self.convffn(x)


class LayerNormChannel(nn.Module):
    def __init__(self, channels: int):
        super().__init__()
        self.weight = nn.Parameter(torch.ones(channels))
        self.bias = nn.Parameter(torch.zeros(channels))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        mean = x.mean(1, keepdim=True)
        variance = (x - mean).pow(2).mean(1, keepdim=True)
        x = (x - mean) / torch.sqrt(variance + 1e-5)
        return self.weight.unsqueeze(-1).unsqueeze(-1) * x + self.bias.unsqueeze(-1).unsqueeze(-1)


class MHSA(nn.Module):
    def __init__(self, channels: int, head_dim: int):
        super().__init__()
        self.head_dim = head_dim
        self.qkv = nn.Linear(channels, 3 * channels, bias=False)
        self.proj = nn.Linear(channels, channels)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        batch, channels, height, width = x.shape
        tokens = torch.flatten(x, start_dim=2).transpose(-2, -1)
        qkv = self.qkv(tokens).reshape(batch, height * width, 3, channels // self.head_dim, self.head_dim)
        q, k, v = qkv.permute(2, 0, 3, 1, 4).unbind(0)
        attention = ((q * self.head_dim**-0.5) @ k.transpose(-2, -1)).softmax(dim=-1)
        mixed = (attention @ v).transpose(1, 2).reshape(batch, height * width, channels)
        return self.proj(mixed).transpose(-2, -1).reshape(batch, channels, height, width)


class AttentionBlock(nn.Module):
    def __init__(self, channels: int, hidden: int, head_dim: int):
        super().__init__()
        self.norm = LayerNormChannel(channels)
        self.token_mixer = MHSA(channels, head_dim)
        self.convffn = ConvFFN(channels, hidden)
        self.layer_scale_1 = nn.Parameter(torch.ones(channels, 1, 1))
        self.layer_scale_2 = nn.Parameter(torch.ones(channels, 1, 1))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = x + self.layer_scale_1 * self.token_mixer(self.norm(x))
        return x + self.layer_scale_2 * self.convffn(x)


class FastViT(nn.Module):
    def __init__(self, size: TowerSize):
        super().__init__()
        width = size.embed_dims[0]
        self.patch_embed = nn.Sequential(
            MobileOneBlock(3, width, 3, 2), MobileOneBlock(width, width, 3, 2, width), MobileOneBlock(width, width, 1)
        )
        network: list[nn.Module] = []
        for stage, width in enumerate(size.embed_dims):
            if stage > 0:
                network.append(PatchEmbed(size.embed_dims[stage - 1], width))
            hidden = int(width * size.mlp_ratios[stage])
            if stage < 3:
                blocks = [RepMixerBlock(width, hidden) for _ in range(size.layers[stage])]
            else:
                network.append(Depthwise(width, 7))
                blocks = [AttentionBlock(width, hidden, size.head_dim) for _ in range(size.layers[stage])]
            network.append(nn.Sequential(*blocks))
        self.network = nn.ModuleList(network)
        last = size.embed_dims[-1]
        self.conv_exp = MobileOneBlock(last, size.feature_dim, 3, groups=last, squeeze=size.squeeze_dim)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = self.patch_embed(x)
        for block in self.network:
            x = block(x)
        return self.conv_exp(x)


class VisionTower(nn.Module):
    """What Apple's export script traces: (1, 3, R, R) → (1, N, C)."""

    def __init__(self, size: TowerSize):
        super().__init__()
        self.vision_tower = nn.Module()
        self.vision_tower.model = FastViT(size)

    def forward(self, images: torch.Tensor) -> torch.Tensor:
        return self.vision_tower.model(images).flatten(2).transpose(1, 2)


def load_apple_tower(folder: Path, config: dict) -> VisionTower:
    """The tower of a hub folder in inference form; every tensor but CLIP's head is used."""
    prefix = "model.vision_tower."
    state = {
        name.removeprefix(prefix): t.float() for name, t in read_tensors(folder).items() if name.startswith(prefix)
    }
    state.pop("vision_tower.model.head.proj")
    tower = VisionTower(tower_size(config))
    tower.load_state_dict(state, strict=True)
    return tower.eval()
