"""Reading a checkpoint folder tensor by tensor: one .safetensors, a sharded index, or PyTorch's .bin/.pth/.pt."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import mlx.core as mx

from mlx_fastvlm.checkpoint_files import WEIGHT_SUFFIXES, is_training_state
from mlx_fastvlm.errors import CheckpointError
from mlx_fastvlm.json_file import read_json_object
from mlx_fastvlm.safetensors_file import SafetensorsFile

from .archive import Folder, check_inside
from .torch_file import TorchFile

_INDEXES = ("model.safetensors.index.json", "pytorch_model.bin.index.json")
_WHOLE = ("model.safetensors", "pytorch_model.bin")


class Checkpoint:
    """All tensors of a checkpoint by name; each `[]` reads one from disk as float32 and keeps nothing.

    Args:
        source: a folder, or one that `archive.open_source` has opened.
        files: names of the weight files to read; None finds the model's own.

    Raises:
        CheckpointError: there are no weights, a shard is missing, a file is damaged, or a link leads out of the folder.
    """

    def __init__(self, source: Path | Folder, files: Sequence[str] | None = None):
        folder = source if isinstance(source, Folder) else Folder(source, source)
        self.folder = folder.path
        self._file_of: dict[str, SafetensorsFile | TorchFile] = {}
        for name in _weight_files(folder) if files is None else files:
            self._add(_open(folder, name))

    @classmethod
    def from_file(cls, path: Path) -> Checkpoint:
        """The tensors of one file, e.g. a vision tower's; other files of its folder are not looked at.

        Raises:
            CheckpointError: the file is missing, damaged, or not of a known type.
        """
        if path.suffix not in WEIGHT_SUFFIXES:
            raise CheckpointError(f"{path} is not a weight file; expected one ending in {', '.join(WEIGHT_SUFFIXES)}.")
        if not path.is_file():
            raise CheckpointError(f"{path} is missing or not a file.")
        checkpoint = cls.__new__(cls)
        checkpoint.folder = path.parent
        checkpoint._file_of = {}
        checkpoint._add(_open_file(path))
        return checkpoint

    def __contains__(self, name: str) -> bool:
        return name in self._file_of

    def __getitem__(self, name: str) -> mx.array:
        return _as_float32(self._file_of[name].read(name))

    def rows(self, name: str, start: int, stop: int) -> mx.array:
        return _as_float32(self._file_of[name].rows(name, start, stop))

    def names(self) -> list[str]:
        return list(self._file_of)

    def shape(self, name: str) -> tuple[int, ...]:
        return self._file_of[name].shape(name)

    def dtype(self, name: str) -> str:
        """The stored type in safetensors' words, such as "BF16"."""
        return self._file_of[name].dtype(name)

    def nbytes(self, name: str) -> int:
        return self._file_of[name].nbytes(name)

    def _add(self, file: SafetensorsFile | TorchFile) -> None:
        for name in file.names():
            if name in self._file_of:
                raise CheckpointError(f"{name} is stored twice, in {self._file_of[name].path} and in {file.path}.")
            self._file_of[name] = file


def _open(folder: Folder, name: str) -> SafetensorsFile | TorchFile:
    if name in folder.embedded:
        extent = folder.embedded[name]
        return SafetensorsFile(extent.path, extent.offset, extent.length)
    return _open_file(check_inside(folder.path, folder.path / name))


def _open_file(path: Path) -> SafetensorsFile | TorchFile:
    return SafetensorsFile(path) if path.suffix == ".safetensors" else TorchFile(path)


def _weight_files(folder: Folder) -> list[str]:
    """Names of the files that hold a folder's weights, safetensors before PyTorch's, an index before a guess."""
    present = {name for name in folder.names() if not name.startswith(".")}
    for index in _INDEXES:
        if index in present:
            return _files_of_index(folder, index, present)
    for name in _WHOLE:
        if name in present:
            return [name]
    for suffix in WEIGHT_SUFFIXES:
        found = sorted(name for name in present if name.endswith(suffix) and not is_training_state(name))
        if len(found) == 1:
            return found
        if found:
            raise CheckpointError(
                f"{folder.origin} has several weight files ({', '.join(found[:4])}) but no index that says how they "
                "belong together."
            )
    raise CheckpointError(f"{folder.origin} has a config.json but no weights (model.safetensors or its shards).")


def _files_of_index(folder: Folder, index: str, present: set[str]) -> list[str]:
    shown = folder.origin / index
    raw = read_json_object(check_inside(folder.path, folder.path / index), CheckpointError, shown=shown)
    try:
        names = sorted(set(raw["weight_map"].values()))
    except (KeyError, TypeError, AttributeError) as error:
        raise CheckpointError(f"{shown} is not a readable weight index ({error}); download it again.") from None
    for name in names:
        # An index is data from outside: it must not lead out of its folder.
        if not isinstance(name, str) or Path(name).name != name:
            raise CheckpointError(f"{shown} names {name!r}, which is not a file of its own folder.")
        if name not in present:
            raise CheckpointError(f"{folder.origin} lacks the shard {name} that {index} names; finish the download.")
    return names


def _as_float32(array: mx.array) -> mx.array:
    """Numbers in float32; integers as stored: they are counters, or MLX's packed weights."""
    return array.astype(mx.float32) if mx.issubdtype(array.dtype, mx.floating) else array
