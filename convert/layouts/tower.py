"""A FastViTHD tower without a language model: timm's fastvit_mci3, or MobileCLIP, whose text encoder is left out.

Sources of the names: timm 1.0 models/fastvit.py; ml-mobileclip mobileclip/clip.py and mobileclip2 (open_clip's names).
"""

from __future__ import annotations

from mlx_fastvlm.config import VisionConfig
from mlx_fastvlm.convert.key_map import DROPPED, TOWER, tower_sites
from mlx_fastvlm.convert.tensors import Renamed, Stored, Tensors
from mlx_fastvlm.errors import CheckpointError

from .timm_names import tower_names

# What stands before a tower's names, the longer first: MobileCLIP's own code, open_clip, transformers' wrapper, timm.
_PREFIXES = ("image_encoder.model.", "visual.trunk.", "visual.", "trunk.", "timm_model.", "model.", "")
_PARALLEL = "module."  # torch's data-parallel training puts it before everything
_FIRST_BLOCKS = ("patch_embed.0.", "stem.0.")  # Apple's names, timm's
# CLIP's other half, which no image feature depends on.
_TEXT_ENCODER = ("text_encoder.", "text.", "logit_scale", "logit_bias")


def tower_alone(tensors: Tensors, config: VisionConfig) -> Tensors:
    """A tower's tensors under LlavaQwen2's names, in whichever form they are stored.

    Args:
        tensors: a checkpoint that holds a FastViTHD tower in Apple's or timm's names, alone or as the image half of
            CLIP.
        config: the tower of the model that it goes into.

    Returns:
        Names under key_map.TOWER only; classifier or projection head and BatchNorm's counters are among them for
        `check_names` to drop, the text encoder is not.

    Raises:
        CheckpointError: there is no such tower, or tensors are missing or unknown; the message names them.
    """
    prefix = _prefix(tensors)
    known = _known_names(config)
    stored, unknown = {}, []
    for name in tensors.names():
        if name.startswith(prefix) and name.removeprefix(prefix) in known:
            stored[f"{TOWER}.{known[name.removeprefix(prefix)]}"] = Stored(name)
        elif not name.removeprefix(_PARALLEL).startswith(_TEXT_ENCODER):
            unknown.append(name)
    view = Renamed(tensors, stored)
    needed = {name for site in tower_sites(config) for name in site.sources(view)}
    unneeded = (name for name in stored if name not in needed and not _is_dropped(name))
    unknown += [stored[name].name for name in unneeded]
    missing = [name.removeprefix(f"{TOWER}.") for name in needed - set(stored)]
    if missing or unknown:
        problems = [f"{kind}: {_some(names)}" for kind, names in (("missing", missing), ("unknown", unknown)) if names]
        raise CheckpointError(
            f"The vision tower does not fit the model ({'; '.join(problems)}). Expected FastViTHD of the same size, "
            "which timm calls fastvit_mci3 and MobileCLIP calls S3."
        )
    return view


def _is_dropped(name: str) -> bool:
    return any(pattern.fullmatch(name) for pattern in DROPPED)


def _known_names(config: VisionConfig) -> dict[str, str]:
    """Stored name, Apple's or timm's → Apple's."""
    both = tower_names(config)
    return {apple: apple for apple in both} | {timm: apple for apple, timm in both.items()} | {"head.proj": "head.proj"}


def _prefix(tensors: Tensors) -> str:
    names = tensors.names()
    for parallel in (_PARALLEL, ""):
        for prefix in _PREFIXES:
            first_blocks = tuple(parallel + prefix + block for block in _FIRST_BLOCKS)
            if any(name.startswith(first_blocks) for name in names):
                return parallel + prefix
    raise CheckpointError(
        f"There is no FastViTHD tower among these tensors (such as {_some(names, 4) or 'none'}); expected timm's "
        "fastvit_mci3 or a MobileCLIP checkpoint with that image encoder."
    )


def _some(names: list[str], most: int = 6) -> str:
    return ", ".join(sorted(names)[:most]) + (f" and {len(names) - most} more" if len(names) > most else "")
