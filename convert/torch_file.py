"""PyTorch's .bin, .pth and .pt files: what lies where is asked of PyTorch, the bytes are read here, one tensor at a time.

No code in such a file is ever run: PyTorch unpickles it with weights_only, and that without the tensors' data, so that
memory stays small whatever the file's size. The only part of the converter that imports torch.
"""

from __future__ import annotations

import math
import zipfile
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import mlx.core as mx
import numpy as np

from mlx_fastvlm.errors import CheckpointError

from .archive import stored_extent

# How trainers wrap a model's tensors among their own records (epoch, optimizer, …).
_WRAPPERS = ("state_dict", "model_state_dict", "model", "module")

# torch's dtype → (safetensors' word for it, numpy type of the raw bytes)
_DTYPES: dict[str, tuple[str, type]] = {
    "bfloat16": ("BF16", np.uint16),
    "float16": ("F16", np.float16),
    "float32": ("F32", np.float32),
    "float64": ("F64", np.float64),
    "int64": ("I64", np.int64),
    "int32": ("I32", np.int32),
    "int16": ("I16", np.int16),
    "int8": ("I8", np.int8),
    "uint8": ("U8", np.uint8),
    "bool": ("BOOL", np.bool_),
}


@dataclass(frozen=True)
class _Place:
    """One tensor on disk. Offset and strides are in elements, as PyTorch counts them.

    Attributes:
        storage: byte of the file at which the tensor's storage begins; storages may be shared by several tensors.
    """

    kind: str
    shape: tuple[int, ...]
    strides: tuple[int, ...]
    storage: int
    offset: int

    @property
    def itemsize(self) -> int:
        return np.dtype(_DTYPES[self.kind][1]).itemsize


class TorchFile:
    """Tensors of a file written by `torch.save`, each read from disk when asked for and not kept.

    Two exceptions: a file in the format from before PyTorch 1.6 (no zip) is held in memory as a whole, and a PyTorch too
    old to tell the tensors' places maps the file, so that its pages count as the process's while there is room.

    Raises:
        CheckpointError: PyTorch is not installed, or the file is damaged, unsafe, or holds no dictionary of tensors.
    """

    def __init__(self, path: Path):
        try:
            import torch
        except ImportError:
            raise CheckpointError(
                f"{path} is in PyTorch's format; reading it needs PyTorch: pip install 'mlx-fastvlm[torch]'."
            ) from None
        if not path.is_file():
            raise CheckpointError(f"{path} is missing; download the checkpoint again.")
        self.path = path
        self._places: dict[str, _Place] = {}
        self._loaded: dict[str, Any] = {}
        is_zip = zipfile.is_zipfile(path)
        ends = _storage_ends(path) if is_zip else {}
        tensors = _plain_tensors(path, _load(path, without_data=is_zip), torch)
        _check_tensors(path, tensors)
        has_places = is_zip and all(_storage(tensor) is not None for tensor in tensors.values())
        if is_zip and not has_places:
            tensors = _plain_tensors(path, _load(path, mmap=True), torch)
        for name, tensor in tensors.items():
            if has_places:
                self._places[name] = _place(path, name, tensor, ends)
            else:
                self._loaded[name] = tensor.detach()

    def names(self) -> list[str]:
        return [*self._places, *self._loaded]

    def shape(self, name: str) -> tuple[int, ...]:
        return self._places[name].shape if name in self._places else tuple(self._loaded[name].shape)

    def dtype(self, name: str) -> str:
        """The type in safetensors' words, such as "BF16"."""
        return _DTYPES[self._kind(name)][0]

    def nbytes(self, name: str) -> int:
        return math.prod(self.shape(name)) * np.dtype(_DTYPES[self._kind(name)][1]).itemsize

    def read(self, name: str) -> mx.array:
        """The tensor as stored; float64 as float32."""
        if name in self._loaded:
            return self._array(name, _raw(self._loaded[name]))
        return self._array(name, self._read(self._places[name]))

    def rows(self, name: str, start: int, stop: int) -> mx.array:
        """Rows start … stop − 1 along the first axis; the others are not read."""
        if name in self._loaded:
            return self._array(name, _raw(self._loaded[name][start:stop]))
        place = self._places[name]
        length, *rest = place.shape
        stop = min(stop, length)
        part = _Place(
            place.kind,
            (max(stop - start, 0), *rest),
            place.strides,
            place.storage,
            place.offset + start * place.strides[0],
        )
        return self._array(name, self._read(part))

    def _kind(self, name: str) -> str:
        return self._places[name].kind if name in self._places else _kind(self._loaded[name])

    def _read(self, place: _Place) -> np.ndarray:
        """Raw numbers of one tensor, of its rows, or of a view such as a transposed one."""
        raw_type = _DTYPES[place.kind][1]
        if math.prod(place.shape) == 0:
            return np.zeros(place.shape, raw_type)
        count = _span(place.shape, place.strides)
        flat = np.fromfile(self.path, raw_type, count=count, offset=place.storage + place.offset * place.itemsize)
        if flat.size != count:
            raise CheckpointError(f"{self.path} has become shorter while it was read.")
        return np.lib.stride_tricks.as_strided(flat, place.shape, [step * place.itemsize for step in place.strides])

    def _array(self, name: str, raw: np.ndarray) -> mx.array:
        kind = self._kind(name)
        if kind == "float64":  # MLX has no float64 on the GPU
            raw = raw.astype(np.float32)
        array = mx.array(np.ascontiguousarray(raw).reshape(raw.shape))
        return array.view(mx.bfloat16) if kind == "bfloat16" else array


def _load(path: Path, *, without_data: bool = False, mmap: bool = False) -> Any:
    """What the file holds; with `without_data`, tensors know their place in the file but have no numbers."""
    import torch
    from torch._subclasses.fake_tensor import FakeTensorMode

    try:
        if without_data:
            # PyTorch's serialization notes name this way to learn where each storage lies in the file.
            with FakeTensorMode():
                return torch.load(path, map_location="cpu", weights_only=True)
        return torch.load(path, map_location="cpu", weights_only=True, mmap=mmap)
    except Exception as error:  # torch raises many kinds for a damaged or unsafe file
        reason = str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
        raise CheckpointError(
            f"{path} cannot be read safely as PyTorch weights: {reason.rstrip('.')}. "
            "Download it again, or save the model's state_dict() alone."
        ) from None


def _plain_tensors(path: Path, loaded: object, torch: Any) -> dict[str, Any]:
    """The dictionary of tensors in a file, also when a trainer has wrapped it."""

    def is_plain(value: object) -> bool:
        return isinstance(value, Mapping) and all(
            isinstance(name, str) and isinstance(tensor, torch.Tensor) for name, tensor in value.items()
        )

    if is_plain(loaded):
        return dict(loaded)
    if isinstance(loaded, Mapping):
        wrapped = [name for name in _WRAPPERS if is_plain(loaded.get(name))]
        if len(wrapped) > 1:
            raise CheckpointError(f"{path} holds tensors under {' and '.join(wrapped)}; expected one model's weights.")
        if wrapped:
            return dict(loaded[wrapped[0]])
    raise CheckpointError(
        f"{path} does not hold a plain dictionary of tensors (nor one under {', '.join(_WRAPPERS)}); "
        "expected model weights."
    )


def _check_tensors(path: Path, tensors: Mapping[str, Any]) -> None:
    """Dense numbers of a known type, and no view that repeats elements: it could claim any size."""
    for name, tensor in tensors.items():
        if str(tensor.layout) != "torch.strided" or tensor.is_quantized or _kind(tensor) not in _DTYPES:
            raise CheckpointError(f"{path}: tensor {name} is {tensor.layout} {tensor.dtype}; expected dense weights.")
        if tensor.nbytes > tensor.untyped_storage().nbytes():
            raise _misfit(path, name, tensor)


def _misfit(path: Path, name: str, tensor: Any) -> CheckpointError:
    return CheckpointError(
        f"{path} is cut off or damaged: tensor {name} {list(tensor.shape)} does not fit its record; download it again."
    )


def _kind(tensor: Any) -> str:
    return str(tensor.dtype).removeprefix("torch.")


def _storage_ends(path: Path) -> dict[int, int]:
    """Byte at which each member's data begins → byte at which it ends, from the zip itself.

    Raises:
        CheckpointError: the zip is damaged, or compressed, which `torch.save` never does.
    """
    try:
        with zipfile.ZipFile(path) as archive, path.open("rb") as file:
            members = archive.infolist()
            if any(member.compress_type != zipfile.ZIP_STORED for member in members):
                raise CheckpointError(f"{path} is compressed, which torch.save never does; save it again with it.")
            extents = [stored_extent(file, path, member) for member in members]
            directory = archive.start_dir
    except (zipfile.BadZipFile, OSError, ValueError, NotImplementedError, RuntimeError) as error:
        raise CheckpointError(f"{path} is cut off or damaged ({error}); download it again.") from None
    # Empty members begin where others do and hold nothing.
    ends = {extent.offset: extent.offset + extent.length for extent in extents if extent.length}
    if any(end > directory for end in ends.values()):
        raise CheckpointError(f"{path} is cut off or damaged (a record is longer than the file); download it again.")
    return ends


def _place(path: Path, name: str, tensor: Any, ends: dict[int, int]) -> _Place:
    """Where a tensor lies, after checking that it lies within one record of the file."""
    kind, shape, strides = _kind(tensor), tuple(tensor.shape), tuple(tensor.stride())
    offset = tensor.storage_offset()
    if math.prod(shape) == 0:
        return _Place(kind, shape, strides, 0, 0)
    storage = _storage(tensor)
    place = _Place(kind, shape, strides, storage, offset)
    room = ends.get(storage, 0) - storage
    needed = (offset + _span(shape, strides)) * place.itemsize
    if needed > room or tensor.nbytes > room or min(strides, default=0) < 0 or offset < 0:
        raise _misfit(path, name, tensor)
    return place


def _storage(tensor: Any) -> int | None:
    """Byte of the file at which a tensor's storage begins; None if this PyTorch does not say."""
    return getattr(tensor.untyped_storage(), "_checkpoint_offset", None)


def _span(shape: tuple[int, ...], strides: tuple[int, ...]) -> int:
    """Elements from the first to the last of a strided tensor, both included."""
    return 1 + sum((length - 1) * step for length, step in zip(shape, strides, strict=True))


def _raw(tensor: Any) -> np.ndarray:
    """A loaded tensor's numbers; bfloat16, which numpy lacks, as its 16 bits."""
    import torch

    return (tensor.contiguous().view(torch.uint16) if tensor.dtype == torch.bfloat16 else tensor).numpy()
