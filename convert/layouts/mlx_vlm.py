"""mlx-vlm's folders (mlx-community/FastVLM-…): Apple's tower names, convolutions and layer scales in MLX's order of axes.

Only the inference form exists there, and weights may be quantized.
Source: mlx-vlm 0.7 models/fastvlm (`sanitize` of fastvlm.py and vision.py).
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import mlx.core as mx

from mlx_fastvlm.config import MODEL_TYPE, FastVLMConfig, VisionConfig
from mlx_fastvlm.convert.key_map import TOWER
from mlx_fastvlm.convert.tensors import Tensors

from .layout import Canonical, Layout, Transform, decoder_table, projector_table, renamed, spelled_out_tower
from .quantized import QUANTIZATION_KEYS, dequantized
from .timm_names import tower_names

NAME = "mlx-vlm's (mlx-community/FastVLM-0.5B-bf16)"
MARKERS = ("vision_tower.vision_model.",)

_TOWER = "vision_tower.vision_model."
# Endings of the tower's convolution kernels; qkv and proj are Linear layers.
_KERNELS = tuple(
    f".{name}.weight" for name in ("reparam_conv", "lkb_reparam", "conv", "fc1", "fc2", "reduce", "expand")
)


def present(tensors: Tensors, raw_config: dict[str, Any], folder: Path) -> Layout:
    """Raises CheckpointError for unknown tensors, ConfigError for a config that is not FastVLM's."""
    config = plain_config(raw_config)
    plain, notices = dequantized(tensors, raw_config)
    return Layout(NAME, config, renamed(plain, _table(FastVLMConfig.from_dict(config)), NAME), notices)


def plain_config(raw: dict[str, Any]) -> dict[str, Any]:
    """The hub's config.json without what mlx-vlm writes into it.

    mlx-vlm keeps the hub's own fields at the top and repeats some of them in text_config and vision_config.
    """
    dropped = {*QUANTIZATION_KEYS, "text_config", "vision_config"}
    config = {name: value for name, value in raw.items() if name not in dropped} | {"model_type": MODEL_TYPE}
    tower = spelled_out_tower(raw.get("vision_config"))
    return config if tower is None else config | {"vision_config": tower}


def _table(config: FastVLMConfig) -> dict[str, Canonical]:
    table = _tower_table(config.vision_config)
    for projector in ("mm_projector", "mm_projector.layers"):  # the second in folders of early versions
        table |= projector_table(f"{projector}.0", f"{projector}.2")
    return table | decoder_table(config, "language_model.model.", "language_model.lm_head.weight")


def _tower_table(config: VisionConfig) -> dict[str, Canonical]:
    stored = {apple: apple.replace("patch_embed.", "patch_embed.blocks.", 1) for apple in tower_names(config)}
    stored["head.proj"] = "head.proj"
    return {_TOWER + name: Canonical(f"{TOWER}.{apple}", _transform(apple)) for apple, name in stored.items()}


def _transform(apple: str) -> Transform | None:
    if apple.endswith(_KERNELS):
        return _ohwi_to_oihw
    return _last_axis_first if apple.rpartition(".")[2].startswith("layer_scale") else None


def _ohwi_to_oihw(kernel: mx.array) -> mx.array:
    return kernel.transpose(0, 3, 1, 2)


def _last_axis_first(scale: mx.array) -> mx.array:
    """(1, 1, C) → (C, 1, 1)."""
    return scale.transpose(2, 0, 1)
