"""Reading single tensors out of .safetensors files, bfloat16 included, and writing such files tensor by tensor.

`safetensors` checks the header; its numpy and mlx front ends refuse bfloat16 and its writer wants all tensors in memory
at once, which is why the bytes are moved here.
"""

from __future__ import annotations

import json
import math
import struct
from collections.abc import Iterable, Mapping
from pathlib import Path

import mlx.core as mx
import numpy as np
from safetensors import SafetensorError, safe_open

from mlx_fastvlm.errors import CheckpointError

# safetensors' dtype name → (numpy type of the raw bytes, MLX type they are viewed as)
_DTYPES: dict[str, tuple[type, mx.Dtype]] = {
    "F64": (np.float64, mx.float32),  # MLX has no float64 on the GPU; values are cast
    "F32": (np.float32, mx.float32),
    "F16": (np.float16, mx.float16),
    "BF16": (np.uint16, mx.bfloat16),
    "I64": (np.int64, mx.int64),
    "I32": (np.int32, mx.int32),
    "U32": (np.uint32, mx.uint32),
    "U8": (np.uint8, mx.uint8),
}
_NAMES = {mx.float32: "F32", mx.float16: "F16", mx.bfloat16: "BF16"}


class SafetensorsFile:
    """One file's tensors, each read from disk when asked for and not kept.

    Raises:
        CheckpointError: the file is missing, cut off, or not safetensors.
    """

    def __init__(self, path: Path):
        self.path = path
        check_safetensors(path)
        with path.open("rb") as file:
            (length,) = struct.unpack("<Q", file.read(8))
            header = json.loads(file.read(length))
        header.pop("__metadata__", None)
        self._entries: dict[str, dict] = header
        self._data_start = 8 + length

    def __contains__(self, name: str) -> bool:
        return name in self._entries

    def names(self) -> list[str]:
        return list(self._entries)

    def shape(self, name: str) -> tuple[int, ...]:
        return tuple(self._entries[name]["shape"])

    def dtype(self, name: str) -> str:
        """The type in safetensors' words, such as "BF16"."""
        return self._entries[name]["dtype"]

    def nbytes(self, name: str) -> int:
        start, end = self._entries[name]["data_offsets"]
        return end - start

    def read(self, name: str) -> mx.array:
        """The tensor as stored. Raises CheckpointError for a type this project has no use for."""
        return self._read(name, self.shape(name), 0)

    def rows(self, name: str, start: int, stop: int) -> mx.array:
        """Rows start … stop − 1 along the first axis; the others are not read."""
        length, *rest = self.shape(name)
        return self._read(name, (stop - start, *rest), start * (self.nbytes(name) // length))

    def _read(self, name: str, shape: tuple[int, ...], skipped_bytes: int) -> mx.array:
        entry = self._entries[name]
        if entry["dtype"] not in _DTYPES:
            raise CheckpointError(f"{self.path}: tensor {name} is of type {entry['dtype']}; expected F32, F16 or BF16.")
        raw_type, dtype = _DTYPES[entry["dtype"]]
        offset = self._data_start + entry["data_offsets"][0] + skipped_bytes
        raw = np.fromfile(self.path, raw_type, count=math.prod(shape), offset=offset).reshape(shape)
        if raw_type is np.float64:
            return mx.array(raw.astype(np.float32))
        array = mx.array(raw)
        return array.view(dtype) if dtype == mx.bfloat16 else array


def check_safetensors(path: Path) -> None:
    """Check that a file exists, has a sound header, and is as long as the header says.

    Raises:
        CheckpointError: it is not so.
    """
    try:
        with safe_open(path, framework="numpy"):
            pass
    except FileNotFoundError:
        raise CheckpointError(f"{path} is missing; download or convert the model again.") from None
    except SafetensorError as error:
        raise CheckpointError(f"{path} is cut off or damaged ({error}); download or convert the model again.") from None
    except OSError as error:
        raise CheckpointError(f"{path} cannot be read: {error.strerror or error}.") from None


def write_safetensors(
    path: Path,
    shapes: Mapping[str, tuple[int, ...]],
    dtype: mx.Dtype,
    tensors: Iterable[tuple[str, mx.array]],
    metadata: Mapping[str, str],
) -> None:
    """Write a file in one pass, holding one tensor at a time.

    Args:
        path: the new file.
        shapes: name → shape of every tensor, in the order in which `tensors` brings them.
        dtype: type of all of them: float32, float16 or bfloat16.
        tensors: (name, array) in that order; cast to `dtype` here.
        metadata: strings for the header's `__metadata__`.

    Raises:
        CheckpointError: a value does not fit float16.
        OSError: the disk is full, or the file cannot be written.
    """
    header: dict[str, object] = {"__metadata__": dict(metadata)}
    offset = 0
    for name, shape in shapes.items():
        size = int(np.prod(shape)) * dtype.size
        header[name] = {"dtype": _NAMES[dtype], "shape": list(shape), "data_offsets": [offset, offset + size]}
        offset += size
    encoded = json.dumps(header, separators=(",", ":")).encode()
    encoded += b" " * (-len(encoded) % 8)  # tensors start aligned, as safetensors itself does
    expected = iter(shapes.items())
    with path.open("wb") as file:
        file.write(struct.pack("<Q", len(encoded)) + encoded)
        for name, array in tensors:
            assert (name, tuple(array.shape)) == next(expected), f"{name} {array.shape} comes out of order"
            data = array.astype(dtype)
            if dtype == mx.float16 and mx.any(mx.isinf(data) & mx.isfinite(array)).item():
                raise CheckpointError(f"{name} has values beyond float16's 65504; convert to bfloat16 or float32.")
            # numpy has no bfloat16: its bytes travel as 16-bit integers. Not ndarray.tofile, which hides a full disk.
            raw = np.array(data.view(mx.uint16) if dtype == mx.bfloat16 else data)
            file.write(np.ascontiguousarray(raw).data)
    assert next(expected, None) is None, "a tensor of the header was not written"
