"""CLIP's projection head: what a FastViTHD was trained with before it became FastVLM's tower, where a checkpoint kept it.

It stands in a file of its own beside the weights, so that answering neither reads nor holds it.
"""

from __future__ import annotations

from functools import cached_property
from pathlib import Path

import mlx.core as mx

from mlx_fastvlm.errors import CheckpointError
from mlx_fastvlm.safetensors_file import SafetensorsFile

FILE_NAME = "clip_head.safetensors"  # in a converted folder
WEIGHT = "proj"  # the one tensor in it, (feature width, CLIP's width), named as in the checkpoint


class ClipHead:
    """Tower features, averaged over all positions, as a vector in the space that CLIP compares pictures and words in.

    Args:
        path: the file, read on first use.
    """

    def __init__(self, path: Path):
        self._path = path

    @classmethod
    def in_folder(cls, folder: Path) -> ClipHead | None:
        """That of a converted model; None if its checkpoint has none."""
        path = folder / FILE_NAME
        return cls(path) if path.is_file() else None

    def __call__(self, pooled: mx.array) -> mx.array:
        """(B, feature width) float32 → (B, CLIP's width), as long as they come out.

        Raises:
            CheckpointError: the file is damaged or belongs to another tower.
        """
        if self.weight.shape[0] != pooled.shape[-1]:
            raise CheckpointError(
                f"{self._path} takes features of width {self.weight.shape[0]}, the tower's have {pooled.shape[-1]}; "
                "convert the model again."
            )
        return pooled @ self.weight

    @property
    def width(self) -> int:
        """CLIP's width, read from the file's header. Raises CheckpointError if the file is damaged."""
        return self._file().shape(WEIGHT)[1]

    @cached_property
    def weight(self) -> mx.array:
        """(feature width, CLIP's width) float32. Raises CheckpointError if the file is damaged."""
        return self._file().read(WEIGHT).astype(mx.float32)

    def _file(self) -> SafetensorsFile:
        file = SafetensorsFile(self._path)
        if file.names() != [WEIGHT] or len(file.shape(WEIGHT)) != 2:
            raise CheckpointError(f"{self._path} holds something other than a CLIP head; convert the model again.")
        return file
