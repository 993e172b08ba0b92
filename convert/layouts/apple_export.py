"""Apple's exports for its app (apple/FastVLM-0.5B-fp16, -1.5B-int8, -7B-int4): projector and decoder as mlx-vlm stored
them, quantized or not; the vision tower is a Core ML package beside them.

Source: ml-fastvlm@592b4ad model_export (fastvlm_mlx-vlm.patch, export_vision_encoder.py).
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

from mlx_fastvlm.config import FastVLMConfig
from mlx_fastvlm.convert.tensors import Combined, Tensors
from mlx_fastvlm.errors import CheckpointError

from .layout import Canonical, Layout, decoder_table, projector_table, renamed
from .mlx_vlm import plain_config
from .quantized import dequantized

NAME = "Apple's export for Core ML and MLX (apple/FastVLM-0.5B-fp16)"
MARKERS = ("multi_modal_projector.linear_0.",)

_CHECKPOINT_OF_WIDTH = {896: "apple/FastVLM-0.5B", 1536: "apple/FastVLM-1.5B", 3584: "apple/FastVLM-7B"}


def exported_checkpoint(hidden_size: int) -> str:
    """The hub id of the checkpoint that an export of this decoder width was made of, or words that say so."""
    return _CHECKPOINT_OF_WIDTH.get(hidden_size, "the checkpoint it was exported from")


def present(tensors: Tensors, raw_config: dict[str, Any], folder: Path) -> Layout:
    """Raises CheckpointError for unknown tensors, or when the Core ML package cannot be read."""
    raw = plain_config(raw_config)
    config = FastVLMConfig.from_dict(raw)
    plain, notices = dequantized(tensors, raw_config)
    language_model = renamed(plain, _table(config), NAME)
    tower = _read_tower(folder, config, raw)
    return Layout(NAME, raw, Combined(language_model, tower), notices)


def _table(config: FastVLMConfig) -> dict[str, Canonical]:
    projector = projector_table("multi_modal_projector.linear_0", "multi_modal_projector.linear_2")
    return projector | decoder_table(config, "language_model.model.", "language_model.lm_head.weight")


def _read_tower(folder: Path, config: FastVLMConfig, raw: dict[str, Any]) -> Tensors:
    packages = sorted(folder.glob("*.mlpackage"))
    if len(packages) != 1:
        found = f"{len(packages)} Core ML packages" if packages else "no Core ML package (fastvithd.mlpackage)"
        instead = exported_checkpoint(config.text_config.hidden_size)
        raise CheckpointError(
            f"{folder} is Apple's export: its vision tower is a Core ML package, but there is {found} in it. "
            f"Convert {instead} instead, which has all weights in one place and unquantized."
        )
    from mlx_fastvlm.convert.coreml import read_tower  # needs coremltools, which only this layout does

    return read_tower(packages[0], raw)
