"""CLIP's projection head on its way through the conversion: found, checked, written into a file of its own."""

from __future__ import annotations

from pathlib import Path

import mlx.core as mx

from mlx_fastvlm.clip_head import FILE_NAME, WEIGHT
from mlx_fastvlm.config import VisionConfig
from mlx_fastvlm.errors import CheckpointError

from .checkpoint import Checkpoint
from .key_map import TOWER
from .tensors import Renamed, Stored, Tensors
from .writer import SafetensorsWriter

CLIP_HEAD = f"{TOWER}.head.proj"  # (feature width, CLIP's width)
# timm keeps the head where other networks have their classifier: transposed, with a bias of zeros.
_CLASSIFIER, _CLASSIFIER_BIAS = f"{TOWER}.head.weight", f"{TOWER}.head.bias"


def clip_head_names(tensors: Tensors) -> set[str]:
    """The stored tensors that make CLIP's head. None of them does, where it is a classifier (it has a bias) or zeros,
    which stand for a head in layouts that must have one."""
    if CLIP_HEAD in tensors:
        return {CLIP_HEAD} if mx.any(tensors[CLIP_HEAD]).item() else set()
    if _CLASSIFIER not in tensors:
        return set()
    if _CLASSIFIER_BIAS not in tensors:
        return {_CLASSIFIER}
    return set() if mx.any(tensors[_CLASSIFIER_BIAS]).item() else {_CLASSIFIER, _CLASSIFIER_BIAS}


def read_clip_head(tensors: Tensors, config: VisionConfig) -> mx.array | None:
    """CLIP's head, (feature width, CLIP's width) float32; None if there is none.

    Raises:
        CheckpointError: it does not fit the tower, or holds NaN or infinity.
    """
    names = clip_head_names(tensors)
    if not names:
        return None
    head = tensors[CLIP_HEAD] if CLIP_HEAD in names else tensors[_CLASSIFIER].T
    if head.ndim != 2 or head.shape[0] != config.hidden_size:
        raise CheckpointError(
            f"{min(names)} has the shape {list(tensors.shape(min(names)))}, which does not fit a tower of "
            f"{config.hidden_size} features."
        )
    if not mx.all(mx.isfinite(head)).item():
        raise CheckpointError(f"{min(names)} holds NaN or infinity; the checkpoint is damaged.")
    return head


def write_clip_head(folder: Path, head: mx.array, dtype: mx.Dtype) -> None:
    """Write what `read_clip_head` gave into a converted folder. Raises CheckpointError if it does not fit float16."""
    with SafetensorsWriter(folder / FILE_NAME, {WEIGHT: (tuple(head.shape), dtype)}, {"format": "mlx"}) as writer:
        writer.write(WEIGHT, head)


def kept_clip_head(folder: Path) -> Tensors | None:
    """The head of a converted folder, under LlavaQwen2's name; None if it has none. Raises CheckpointError if damaged."""
    path = folder / FILE_NAME
    return Renamed(Checkpoint.from_file(path), {CLIP_HEAD: Stored(WEIGHT)}) if path.is_file() else None
