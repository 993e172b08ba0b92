"""Image rows by content: the same picture is encoded once, in this process and, with a folder, in later ones."""

from __future__ import annotations

import hashlib
import os
import warnings
from collections import OrderedDict
from collections.abc import Sequence
from contextlib import suppress
from pathlib import Path

import mlx.core as mx
import numpy as np
from mlx.utils import tree_flatten

from mlx_fastvlm.answer import StageClock
from mlx_fastvlm.errors import FastVLMWarning
from mlx_fastvlm.image_content import ImageContent
from mlx_fastvlm.image_features import image_features
from mlx_fastvlm.image_processing import ImageProcessor
from mlx_fastvlm.model import FastVLM

_NAME_BYTES = 8
_PREPARATION = 1  # raise it when the same file comes to give other rows: those in folders are made again


class FeatureCache:
    """Encodes images, and remembers what came of it; the least recently used goes first.

    Args:
        model: encodes.
        max_bytes: of rows in memory.
        folder: where rows are kept for other processes too, below a folder for this model's weights; None for nowhere.
        max_folder_bytes: of the files of this model there.
    """

    def __init__(
        self,
        model: FastVLM,
        max_bytes: int,
        folder: str | os.PathLike[str] | None = None,
        max_folder_bytes: int = 2**30,
    ):
        self._model = model
        self._max_bytes = max_bytes
        self._rows: OrderedDict[str, mx.array] = OrderedDict()
        self._bytes = 0  # of them
        self._files = None if folder is None else _RowFiles(Path(os.path.expanduser(folder)), model, max_folder_bytes)

    @property
    def nbytes(self) -> int:
        """Bytes of rows in memory."""
        return self._bytes

    def rows(self, image: ImageContent, image_processor: ImageProcessor, clock: StageClock) -> mx.array:
        """An image's rows, (N, hidden); the stages that are needed are booked on `clock`. Raises ImageError."""
        name = rows_name(image, image_processor)
        rows = self._rows.get(name)
        if rows is None and self._files is not None:
            rows = self._files.read(name)
            clock.lap("recognize")
        if rows is None:
            rows = image_features(self._model, image_processor, image.open(), clock)
            if self._files is not None:
                self._files.write(name, rows)
        self._keep(name, rows)
        return rows

    def has(self, image: ImageContent, image_processor: ImageProcessor) -> bool:
        """Whether an image's rows are in memory."""
        return rows_name(image, image_processor) in self._rows

    def encode_together(self, images: Sequence[tuple[ImageContent, ImageProcessor]]) -> None:
        """Encode images that come to one size for the model, and hold their rows in memory. Raises ImageError.

        Args:
            images: each with how it is prepared; together they take less time than one by one.
        """
        pixels = [processor.to_array(image.open()) for image, processor in images]
        encoded = self._model.encode_images(mx.array(np.stack(pixels)))
        mx.eval(encoded)
        for (image, processor), rows in zip(images, encoded, strict=True):
            self._keep(rows_name(image, processor), mx.contiguous(rows))

    def _keep(self, name: str, rows: mx.array) -> None:
        """Hold rows as those used last, and as many of the others as there is room for."""
        if name not in self._rows:
            self._rows[name] = rows
            self._bytes += rows.nbytes
        self._rows.move_to_end(name)
        while self._bytes > self._max_bytes and len(self._rows) > 1:
            _, oldest = self._rows.popitem(last=False)
            self._bytes -= oldest.nbytes


def rows_name(image: ImageContent, image_processor: ImageProcessor) -> str:
    """What the rows of an image depend on: its content and how it is prepared."""
    settings = hashlib.blake2b(repr(image_processor).encode(), digest_size=_NAME_BYTES)
    return f"{image.digest}-{settings.hexdigest()}"


class _RowFiles:
    """Rows in files, one an image, in a folder that bears the fingerprint of the weights that made them."""

    def __init__(self, folder: Path, model: FastVLM, max_bytes: int):
        self._max_bytes = max_bytes
        self._folder: Path | None = folder / _fingerprint(model)

    def read(self, name: str) -> mx.array | None:
        """The rows, or None if there is no sound file of them."""
        if self._folder is None:
            return None
        path = self._folder / f"{name}.safetensors"
        if not path.exists():
            return None
        try:
            rows = mx.load(str(path))["rows"]
            mx.eval(rows)
            os.utime(path)  # used now
        except (OSError, RuntimeError, KeyError, ValueError):  # damaged: made again
            return None
        return rows

    def write(self, name: str, rows: mx.array) -> None:
        """Keep rows; a folder that cannot be written is given up with a warning."""
        if self._folder is None:
            return
        aside = self._folder / f".{name}.{os.getpid()}.safetensors"
        try:
            self._folder.mkdir(parents=True, exist_ok=True)
            try:
                mx.save_safetensors(str(aside), {"rows": rows})
                os.replace(aside, self._folder / f"{name}.safetensors")
            except BaseException:
                with suppress(OSError):
                    aside.unlink()
                raise
            self._forget_oldest()
        except (OSError, RuntimeError) as error:  # RuntimeError: MLX's for any failed write
            warnings.warn(f"Image rows cannot be kept in {self._folder} ({error}).", FastVLMWarning, stacklevel=2)
            self._folder = None

    def _forget_oldest(self) -> None:
        """Delete the files used longest ago until the rest fits."""
        files = []
        for path in self._folder.glob("*.safetensors"):
            with suppress(OSError):  # another process deletes too
                status = path.stat()
                files.append((status.st_mtime_ns, status.st_size, path))
        total = sum(size for _, size, _ in files)
        for _, size, path in sorted(files):
            if total <= self._max_bytes:
                return
            with suppress(OSError):
                path.unlink()
            total -= size


def _fingerprint(model: FastVLM) -> str:
    """A name for the weights that rows depend on, whatever file they came from: 32 digits of a SHA-256.

    There are hundreds of megabytes to read, and processors have this one built in.
    """
    digest = hashlib.sha256(f"{_PREPARATION} {model.dtype}".encode())
    for name, weight in sorted(tree_flatten(model.parameters())):
        if name.startswith(("vision_tower.", "mm_projector.")):
            digest.update(f"{name} {weight.shape} {weight.dtype}".encode())
            digest.update(np.ascontiguousarray(weight.reshape(-1).view(mx.uint8)))
    return digest.hexdigest()[:32]
