"""Reading a checkpoint folder tensor by tensor: one .safetensors, a sharded index, or PyTorch's .bin/.pth."""

from __future__ import annotations

import json
from pathlib import Path

import mlx.core as mx

from mlx_fastvlm.errors import CheckpointError
from mlx_fastvlm.safetensors_file import SafetensorsFile


class TorchFile:
    """A .bin or .pth read through `torch.load(weights_only=True)`: no code in the file is ever run."""

    def __init__(self, path: Path):
        try:
            import torch
        except ImportError:
            raise CheckpointError(
                f"{path} is in PyTorch's format; reading it needs PyTorch: pip install 'mlx-fastvlm[torch]'."
            ) from None
        self.path = path
        self._float32 = torch.float32
        try:
            loaded = torch.load(path, map_location="cpu", weights_only=True, mmap=True)
        except Exception as error:  # torch raises many kinds for a damaged or unsafe file
            reason = str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
            raise CheckpointError(f"{path} cannot be read safely as PyTorch weights: {reason}") from None
        if not isinstance(loaded, dict) or not all(isinstance(value, torch.Tensor) for value in loaded.values()):
            raise CheckpointError(f"{path} does not hold a plain dictionary of tensors; expected model weights.")
        self._tensors = loaded

    def names(self) -> list[str]:
        return list(self._tensors)

    def shape(self, name: str) -> tuple[int, ...]:
        return tuple(self._tensors[name].shape)

    def dtype(self, name: str) -> str:
        """The type in safetensors' words, such as "BF16"."""
        kind = str(self._tensors[name].dtype).removeprefix("torch.")
        return {"bfloat16": "BF16", "float16": "F16", "float32": "F32", "float64": "F64"}.get(kind, kind)

    def nbytes(self, name: str) -> int:
        return self._tensors[name].nbytes

    def read(self, name: str) -> mx.array:
        return mx.array(self._tensors[name].to(self._float32).numpy())

    def rows(self, name: str, start: int, stop: int) -> mx.array:
        return mx.array(self._tensors[name][start:stop].to(self._float32).numpy())


class Checkpoint:
    """All tensors of a checkpoint folder by name; each `[]` reads one from disk as float32 and keeps nothing.

    Raises:
        CheckpointError: there are no weights, a shard is missing, or a file is damaged.
    """

    def __init__(self, folder: Path):
        self.folder = folder
        self._file_of: dict[str, SafetensorsFile | TorchFile] = {}
        for path in _weight_files(folder):
            file = SafetensorsFile(path) if path.suffix == ".safetensors" else TorchFile(path)
            for name in file.names():
                if name in self._file_of:
                    raise CheckpointError(f"{name} is stored twice, in {self._file_of[name].path} and in {path}.")
                self._file_of[name] = file

    def __contains__(self, name: str) -> bool:
        return name in self._file_of

    def __getitem__(self, name: str) -> mx.array:
        return self._file_of[name].read(name).astype(mx.float32)

    def rows(self, name: str, start: int, stop: int) -> mx.array:
        return self._file_of[name].rows(name, start, stop).astype(mx.float32)

    def names(self) -> list[str]:
        return list(self._file_of)

    def shape(self, name: str) -> tuple[int, ...]:
        return self._file_of[name].shape(name)

    def dtype(self, name: str) -> str:
        """The stored type in safetensors' words, such as "BF16"."""
        return self._file_of[name].dtype(name)

    def nbytes(self, name: str) -> int:
        return self._file_of[name].nbytes(name)


def _weight_files(folder: Path) -> list[Path]:
    """The files that hold a folder's weights, safetensors before PyTorch's, an index before a guess."""
    for index in ("model.safetensors.index.json", "pytorch_model.bin.index.json"):
        if (folder / index).exists():
            return _files_of_index(folder / index)
    for name in ("model.safetensors", "pytorch_model.bin"):
        if (folder / name).exists():
            return [folder / name]
    for pattern in ("*.safetensors", "*.bin", "*.pth"):
        found = sorted(folder.glob(pattern))
        if len(found) == 1:
            return found
        if found:
            names = ", ".join(path.name for path in found[:4])
            raise CheckpointError(
                f"{folder} has several weight files ({names}) but no index that says how they belong together."
            )
    raise CheckpointError(f"{folder} has a config.json but no weights (model.safetensors or its shards).")


def _files_of_index(index: Path) -> list[Path]:
    try:
        names = sorted(set(json.loads(index.read_text(encoding="utf-8"))["weight_map"].values()))
    except (OSError, ValueError, KeyError, AttributeError) as error:
        raise CheckpointError(f"{index} is not a readable weight index ({error}); download it again.") from None
    for name in names:
        # An index is data from outside: it must not lead out of its folder.
        if Path(name).name != name:
            raise CheckpointError(f"{index} names {name!r}, which is not a file of its own folder.")
        if not (index.parent / name).exists():
            raise CheckpointError(
                f"{index.parent} lacks the shard {name} that {index.name} names; finish the download."
            )
    return [index.parent / name for name in names]
