"""Every tensor that a FastViTHD tower may store, by Apple's name and by timm's (`fastvit_mci3`).

Generated from the VisionConfig, for the training form and the inference form at once. Which of them a checkpoint must
have is key_map's affair.
Sources: ml-fastvlm@592b4ad llava/model/multimodal_encoder/mobileclip/mci.py; timm 1.0 models/fastvit.py.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator

from mlx_fastvlm.config import VisionConfig

Pair = tuple[str, str]  # (Apple's, timm's)

_WEIGHT = ("weight",)
_CONV = ("weight", "bias")
_BATCH_NORM = ("weight", "bias", "running_mean", "running_var", "num_batches_tracked")
_CONV_BATCH_NORM = ("conv.weight", *(f"bn.{part}" for part in _BATCH_NORM))
_MOST_BRANCHES = 4  # convolution branches of a MobileOne block: Apple trains with 1, MobileOne's paper with up to 4
_FIRST_ATTENTION_STAGE = 3


def tower_names(config: VisionConfig) -> dict[str, str]:
    """Apple's name → timm's, both without prefix. `head.weight` and `head.bias` are the classifier's."""
    return dict(_tower(config))


def _tower(config: VisionConfig) -> Iterator[Pair]:
    for i in range(3):
        yield from _mobile_one(f"patch_embed.{i}", f"stem.{i}")
    network = 0  # Apple counts stages, downsamplings and positional encodings in one list
    for stage, depth in enumerate(config.layers):
        if stage > 0:
            yield from _downsampling(f"network.{network}.proj", f"stages.{stage}.downsample.proj")
            network += 1
        if stage >= _FIRST_ATTENTION_STAGE:
            yield from _positional_encoding(f"network.{network}", f"stages.{stage}.pos_emb")
            network += 1
        block = _rep_mixer_block if stage < _FIRST_ATTENTION_STAGE else _attention_block
        for i in range(depth):
            yield from block(f"network.{network}.{i}", f"stages.{stage}.blocks.{i}")
        network += 1
    yield from _mobile_one("conv_exp", "final_conv")
    yield from _parts("conv_exp.se.reduce", "final_conv.se.fc1", _CONV)
    yield from _parts("conv_exp.se.expand", "final_conv.se.fc2", _CONV)
    yield from _parts("head", "head.fc", _CONV)


def _parts(apple: str, timm: str, parts: Iterable[str]) -> Iterator[Pair]:
    for part in parts:
        yield f"{apple}.{part}", f"{timm}.{part}"


def _mobile_one(apple: str, timm: str) -> Iterator[Pair]:
    yield from _parts(f"{apple}.reparam_conv", f"{timm}.reparam_conv", _CONV)
    for branch in range(_MOST_BRANCHES):
        yield from _parts(f"{apple}.rbr_conv.{branch}", f"{timm}.conv_kxk.{branch}", _CONV_BATCH_NORM)
    yield from _parts(f"{apple}.rbr_scale", f"{timm}.conv_scale", _CONV_BATCH_NORM)
    yield from _parts(f"{apple}.rbr_skip", f"{timm}.identity", _BATCH_NORM)


def _downsampling(apple: str, timm: str) -> Iterator[Pair]:
    yield from _parts(f"{apple}.0.lkb_reparam", f"{timm}.0.reparam_conv", _CONV)
    yield from _parts(f"{apple}.0.lkb_origin", f"{timm}.0.large_conv", _CONV_BATCH_NORM)
    yield from _parts(f"{apple}.0.small_conv", f"{timm}.0.small_conv", _CONV_BATCH_NORM)
    yield from _mobile_one(f"{apple}.1", f"{timm}.1")


def _positional_encoding(apple: str, timm: str) -> Iterator[Pair]:
    yield from _parts(f"{apple}.reparam_conv", f"{timm}.reparam_conv", _CONV)
    yield from _parts(f"{apple}.pe", f"{timm}.pos_enc", _CONV)


def _rep_mixer_block(apple: str, timm: str) -> Iterator[Pair]:
    yield from _parts(f"{apple}.token_mixer.reparam_conv", f"{timm}.token_mixer.reparam_conv", _CONV)
    yield from _mobile_one(f"{apple}.token_mixer.mixer", f"{timm}.token_mixer.mixer")
    yield from _mobile_one(f"{apple}.token_mixer.norm", f"{timm}.token_mixer.norm")
    yield f"{apple}.token_mixer.layer_scale", f"{timm}.token_mixer.layer_scale.gamma"
    yield from _conv_ffn(apple, timm)
    yield f"{apple}.layer_scale", f"{timm}.layer_scale.gamma"


def _attention_block(apple: str, timm: str) -> Iterator[Pair]:
    yield from _parts(f"{apple}.norm", f"{timm}.norm", _CONV)
    yield from _parts(f"{apple}.token_mixer.qkv", f"{timm}.token_mixer.qkv", _WEIGHT)
    yield from _parts(f"{apple}.token_mixer.proj", f"{timm}.token_mixer.proj", _CONV)
    yield from _conv_ffn(apple, timm)
    for i in (1, 2):
        yield f"{apple}.layer_scale_{i}", f"{timm}.layer_scale_{i}.gamma"


def _conv_ffn(apple: str, timm: str) -> Iterator[Pair]:
    yield from _parts(f"{apple}.convffn.conv", f"{timm}.mlp.conv", _CONV_BATCH_NORM)
    for linear in ("fc1", "fc2"):
        yield from _parts(f"{apple}.convffn.{linear}", f"{timm}.mlp.{linear}", _CONV)
