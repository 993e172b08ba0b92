"""Which tensors of a LlavaQwen2 checkpoint become which parameters of the runtime: names as data, nothing guessed.

Every stored tensor is either used by a site or dropped for a stated reason; anything else is an error that names it.
"""

from __future__ import annotations

import re
from collections.abc import Collection

from mlx_fastvlm.config import FastVLMConfig, VisionConfig
from mlx_fastvlm.errors import CheckpointError

from .reparameterize import (
    AnySite,
    Conv,
    ConvBatchNormSite,
    LargeKernelSite,
    MobileOneSite,
    RepCPESite,
    RepMixerSite,
    ScaledLinearSite,
    StackSite,
)
from .tensors import Tensors

TOWER = "model.vision_tower.vision_tower.model"

# Stored, but of no use to an answer.
DROPPED = {
    re.compile(r".*\.num_batches_tracked"): "BatchNorm's training counter",
    re.compile(rf"{re.escape(TOWER)}\.head\.(proj|weight|bias)"): "a head that is not CLIP's",  # which is kept
    re.compile(
        r"model\.layers\.\d+\.self_attn\.rotary_emb\.inv_freq"
    ): "rotary frequencies, recomputed from rope_theta",
}


def sites(config: FastVLMConfig) -> list[AnySite]:
    """All sites of the model, in the order they are computed."""
    return [*tower_sites(config.vision_config), *projector_sites(), *decoder_sites(config)]


def tower_sites(config: VisionConfig) -> list[AnySite]:
    """Sites of FastViTHD; `network.N` counts stages, downsamplings and positional encodings alike."""
    dims = config.embed_dims

    def place(name: str) -> tuple[str, str]:
        return f"{TOWER}.{name}", f"vision_tower.{name}"

    found: list[AnySite] = _stem_sites(place, dims[0])
    index = 0
    for stage, (channels, depth) in enumerate(zip(dims, config.layers, strict=True)):
        if stage > 0:
            found += _downsampling_sites(place, f"network.{index}", dims[stage - 1], channels)
            index += 1
        if stage >= 3:
            source, target = place(f"network.{index}")
            found.append(RepCPESite(source, f"{target}.reparam_conv", _depthwise(channels, 7)))
            index += 1
        block_sites = _attention_block_sites if stage >= 3 else _rep_mixer_block_sites
        for block in range(depth):
            found += block_sites(*place(f"network.{index}.{block}"), channels)
        index += 1
    source, target = place("conv_exp")
    expansion = Conv(dims[-1], config.hidden_size, 3, groups=dims[-1])
    found.append(MobileOneSite(source, f"{target}.reparam_conv", expansion, has_scale=True))
    found += [ScaledLinearSite(f"{source}.se.{name}", f"{target}.se.{name}") for name in ("reduce", "expand")]
    return found


def projector_sites() -> list[AnySite]:
    """Sites of the two Linear layers between tower and decoder."""
    return [ScaledLinearSite(f"model.mm_projector.{i}", f"mm_projector.{i}") for i in (0, 2)]


def decoder_sites(config: FastVLMConfig) -> list[AnySite]:
    """Sites of Qwen2, with q/k/v and gate/up stacked."""
    found: list[AnySite] = [StackSite(("model.embed_tokens.weight",), "language_model.embed_tokens.weight")]
    for layer in range(config.text_config.num_hidden_layers):
        source, target = f"model.layers.{layer}", f"language_model.layers.{layer}"
        for part in ("weight", "bias"):
            qkv = tuple(f"{source}.self_attn.{name}_proj.{part}" for name in "qkv")
            found.append(StackSite(qkv, f"{target}.self_attn.qkv_proj.{part}"))
        gate_up = tuple(f"{source}.mlp.{name}_proj.weight" for name in ("gate", "up"))
        found.append(StackSite(gate_up, f"{target}.mlp.gate_up_proj.weight"))
        for name in ("self_attn.o_proj", "mlp.down_proj", "input_layernorm", "post_attention_layernorm"):
            found.append(StackSite((f"{source}.{name}.weight",), f"{target}.{name}.weight"))
    found.append(StackSite(("model.norm.weight",), "language_model.norm.weight"))
    if not config.text_config.tie_word_embeddings:
        found.append(StackSite(("lm_head.weight",), "language_model.lm_head.weight"))
    return found


def check_names(found: list[AnySite], stored: Collection[str], tensors: Tensors) -> dict[str, str]:
    """Hold what is stored against what is needed.

    Returns:
        Name → reason of each stored tensor that is deliberately dropped.

    Raises:
        CheckpointError: tensors are missing or unknown; the message names them.
    """
    needed = {name for site in found for name in site.sources(tensors)}
    missing = sorted(needed - set(stored))
    dropped, unknown = {}, []
    for name in sorted(set(stored) - needed):
        reason = next((why for pattern, why in DROPPED.items() if pattern.fullmatch(name)), None)
        if reason is None:
            unknown.append(name)
        else:
            dropped[name] = reason
    if missing or unknown:
        problems = [
            f"{kind}: {_name_some(names)}" for kind, names in (("missing", missing), ("unknown", unknown)) if names
        ]
        raise CheckpointError(
            f"The checkpoint's tensors do not fit its config.json ({'; '.join(problems)}). "
            "Expected the layout of apple/FastVLM-0.5B."
        )
    return dropped


def _name_some(names: list[str], most: int = 6) -> str:
    return ", ".join(names[:most]) + (f" and {len(names) - most} more" if len(names) > most else "")


def _depthwise(channels: int, kernel_size: int, stride: int = 1) -> Conv:
    return Conv(channels, channels, kernel_size, stride, groups=channels)


def _stem_sites(place, channels: int) -> list[AnySite]:
    shapes = (
        (Conv(3, channels, 3, stride=2), False),
        (_depthwise(channels, 3, stride=2), False),
        (Conv(channels, channels, 1), True),
    )
    found: list[AnySite] = []
    for i, (conv, as_linear) in enumerate(shapes):
        source, target = place(f"patch_embed.{i}")
        found.append(MobileOneSite(source, f"{target}.reparam_conv", conv, as_linear=as_linear))
    return found


def _downsampling_sites(place, name: str, channels: int, out_channels: int) -> list[AnySite]:
    source, target = place(f"{name}.proj")
    large = Conv(channels, out_channels, 7, stride=2, groups=channels)
    return [
        LargeKernelSite(f"{source}.0", f"{target}.0.lkb_reparam", large),
        MobileOneSite(f"{source}.1", f"{target}.1.reparam_conv", Conv(out_channels, out_channels, 1), as_linear=True),
    ]


def _convffn_sites(source: str, target: str, channels: int, layer_scale: str) -> list[AnySite]:
    return [
        ConvBatchNormSite(f"{source}.convffn", f"{target}.convffn.conv", _depthwise(channels, 7)),
        ScaledLinearSite(f"{source}.convffn.fc1", f"{target}.convffn.fc1"),
        ScaledLinearSite(f"{source}.convffn.fc2", f"{target}.convffn.fc2", f"{source}.{layer_scale}"),
    ]


def _rep_mixer_block_sites(source: str, target: str, channels: int) -> list[AnySite]:
    mixer = RepMixerSite(f"{source}.token_mixer", f"{target}.token_mixer.reparam_conv", _depthwise(channels, 3))
    return [mixer, *_convffn_sites(source, target, channels, "layer_scale")]


def _attention_block_sites(source: str, target: str, channels: int) -> list[AnySite]:
    return [
        *(StackSite((f"{source}.norm.{part}",), f"{target}.norm.{part}") for part in ("weight", "bias")),
        StackSite((f"{source}.token_mixer.qkv.weight",), f"{target}.token_mixer.qkv.weight"),
        ScaledLinearSite(f"{source}.token_mixer.proj", f"{target}.token_mixer.proj", f"{source}.layer_scale_1"),
        *_convffn_sites(source, target, channels, "layer_scale_2"),
    ]
