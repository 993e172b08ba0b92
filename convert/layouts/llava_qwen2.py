"""LlavaQwen2: the hub's checkpoints and Apple's zip files as they are, and fine-tunes whose tower has timm's names."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from mlx_fastvlm.config import FastVLMConfig
from mlx_fastvlm.convert.key_map import TOWER
from mlx_fastvlm.convert.tensors import Tensors

from .layout import Canonical, Layout, refuse_unknown, renamed, tower_table
from .timm_names import tower_names

NAME = "LlavaQwen2 (apple/FastVLM-0.5B)"
MARKERS = (f"{TOWER}.", "model.layers.", "model.mm_projector.")

_TIMM_MARKERS = (f"{TOWER}.stem.", f"{TOWER}.stages.")


def present(tensors: Tensors, raw_config: dict[str, Any], folder: Path) -> Layout:
    """The checkpoint itself; only a tower in timm's names is presented in Apple's."""
    if not any(name.startswith(_TIMM_MARKERS) for name in tensors.names()):
        return Layout(NAME, raw_config, tensors)
    layout = "LlavaQwen2 with timm's names in the vision tower"
    names = {timm: apple for apple, timm in tower_names(FastVLMConfig.from_dict(raw_config).vision_config).items()}
    table = tower_table(names, f"{TOWER}.")
    in_tower = [name for name in tensors.names() if name.startswith(f"{TOWER}.")]
    refuse_unknown((name for name in in_tower if name not in table), layout)
    # Outside the tower everything is LlavaQwen2's already; what is unknown there is found when names are checked.
    table |= {name: Canonical(name) for name in tensors.names() if name not in table}
    return Layout(layout, raw_config, renamed(tensors, table, layout))
