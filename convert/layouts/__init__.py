"""Which layout a checkpoint is in, told from its config.json and the names of its tensors, never from their shapes.

Every layout is presented as a LlavaQwen2 checkpoint: the same names, the same config. Nothing is rewritten; a layout is
a view over the checkpoint's own tensors.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from mlx_fastvlm.convert.tensors import Tensors
from mlx_fastvlm.errors import CheckpointError

from . import apple_export, fast_vlm, llava_qwen2, mlx_vlm
from .layout import Layout
from .tower import tower_alone

__all__ = ["LAYOUTS", "KnownLayout", "Layout", "candidates", "recognize", "tower_alone"]


@dataclass(frozen=True)
class KnownLayout:
    """One row of the table of layouts.

    Args:
        name: what people call it, and an example.
        model_types: what config.json may say.
        markers: a tensor's name begins with one of these in this layout and in no other of the same model type.
        present: makes the Layout of (tensors, config.json, folder).
    """

    name: str
    model_types: tuple[str, ...]
    markers: tuple[str, ...]
    present: Callable[[Tensors, dict[str, Any], Path], Layout]


LAYOUTS = (
    KnownLayout(llava_qwen2.NAME, ("llava_qwen2",), llava_qwen2.MARKERS, llava_qwen2.present),
    KnownLayout(fast_vlm.NAME, ("fast_vlm",), fast_vlm.MARKERS, fast_vlm.present),
    KnownLayout(mlx_vlm.NAME, ("llava_qwen2", "fastvlm"), mlx_vlm.MARKERS, mlx_vlm.present),
    KnownLayout(apple_export.NAME, ("llava_qwen2",), apple_export.MARKERS, apple_export.present),
)


def recognize(tensors: Tensors, raw_config: dict[str, Any], folder: Path) -> Layout:
    """Present a checkpoint in any known layout as LlavaQwen2's.

    Args:
        tensors: the checkpoint's own tensors; packed integers of quantized weights as they are stored.
        raw_config: its config.json.
        folder: where it lies, for what stands beside the weights (image processor, Core ML package).

    Raises:
        CheckpointError: no layout fits, or tensors are unknown to the one that does.
        ConfigError: config.json is incomplete, or describes what FastVLM is not.
    """
    names = tensors.names()
    for known in candidates(raw_config):
        if any(name.startswith(known.markers) for name in names):
            return known.present(tensors, raw_config, folder)
    found = ", ".join(sorted(names)[:4]) or "none"
    raise CheckpointError(
        f"The tensors' names (such as {found}) are of no layout known for model_type {raw_config['model_type']!r}; "
        f"{_known_layouts()}"
    )


def candidates(raw_config: dict[str, Any]) -> list[KnownLayout]:
    """The layouts that a config.json may be of, known before any weight is looked at.

    Raises:
        CheckpointError: it is another model's.
    """
    model_type = raw_config.get("model_type")
    found = [known for known in LAYOUTS if model_type in known.model_types]
    if not found:
        raise CheckpointError(
            f"config.json says model_type {model_type!r}, which is no FastVLM checkpoint; {_known_layouts()}"
        )
    return found


def _known_layouts() -> str:
    return "expected a FastVLM checkpoint in one of these layouts: " + "; ".join(known.name for known in LAYOUTS) + "."
