"""Reading single tensors, or rows of them, out of .safetensors files, bfloat16 included.

`safetensors` checks the header; its numpy and mlx front ends refuse bfloat16, which is why the bytes are moved here.
"""

from __future__ import annotations

import json
import math
import struct
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
# bytes of one element of each type of the format
_SIZES = {"F64": 8, "I64": 8, "U64": 8, "C64": 8, "F32": 4, "I32": 4, "U32": 4, "F16": 2, "BF16": 2, "I16": 2, "U16": 2}
_SIZES |= dict.fromkeys(("I8", "U8", "BOOL", "F8_E4M3", "F8_E5M2", "F8_E8M0"), 1)
_MAX_HEADER = 100_000_000  # bytes, the format's own limit

# safetensors' dtype name → the type that weights stored so are kept in
DTYPE_NAMES = {"F64": "float32", "F32": "float32", "F16": "float16", "BF16": "bfloat16"}


class SafetensorsFile:
    """One file's tensors, each read from disk when asked for and not kept.

    Args:
        path: the file.
        offset: where its bytes begin, if it lies inside another file (a zip).
        length: how many bytes it has there; None for a file of its own.

    Raises:
        CheckpointError: the file is missing, cut off, or not safetensors.
    """

    def __init__(self, path: Path, offset: int = 0, length: int | None = None):
        self.path = path
        if length is None:
            check_safetensors(path)
            length = path.stat().st_size - offset
        self._entries, self._data_start = _read_header(path, offset, length)

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
        try:
            raw = np.fromfile(self.path, raw_type, count=math.prod(shape), offset=offset)
        except OSError as error:
            raise CheckpointError(f"{self.path} cannot be read: {error.strerror or error}.") from None
        if raw.size != math.prod(shape):
            raise CheckpointError(f"{self.path} has become shorter while it was read; {name} is cut off.")
        raw = raw.reshape(shape)
        if raw_type is np.float64:
            return mx.array(raw.astype(np.float32))
        array = mx.array(raw)
        return array.view(dtype) if dtype == mx.bfloat16 else array


def _read_header(path: Path, offset: int, length: int) -> tuple[dict[str, dict], int]:
    """The header of a file inside a file, held against the format's rules, which `safe_open` checks for paths only.

    Returns:
        Name → {"dtype", "shape", "data_offsets"}, and where in `path` the data begins.

    Raises:
        CheckpointError: a rule is broken: nothing is allocated by what the header claims before that is known.
    """

    def refuse(reason: str) -> CheckpointError:
        return CheckpointError(f"{path} is cut off or damaged ({reason}); download or convert the model again.")

    with path.open("rb") as file:
        file.seek(offset)
        prefix = file.read(8) if length >= 8 else b""
        if len(prefix) < 8:
            raise refuse("it is too short for a header")
        (size,) = struct.unpack("<Q", prefix)
        if size > min(_MAX_HEADER, length - 8):
            raise refuse(f"its header claims {size} bytes")
        try:
            header = json.loads(file.read(size), object_pairs_hook=_without_duplicates)
        except (ValueError, RecursionError) as error:
            raise refuse(f"its header is not JSON: {error}") from None
    if not isinstance(header, dict):
        raise refuse("its header is not an object")
    header.pop("__metadata__", None)
    expected_start = 0
    for name, entry in sorted(header.items(), key=lambda item: _sort_key(item[1])):
        if not _is_entry(entry):
            raise refuse(f"the entry of {name!r} is malformed")
        start, end = entry["data_offsets"]
        if start != expected_start or end - start != math.prod(entry["shape"]) * _SIZES[entry["dtype"]]:
            raise refuse(f"the place of {name!r} does not fit its shape or what lies before it")
        expected_start = end
    if expected_start != length - 8 - size:
        raise refuse(f"its tensors have {expected_start} bytes, the file has room for {length - 8 - size}")
    return header, offset + 8 + size


def _without_duplicates(pairs: list[tuple[str, object]]) -> dict[str, object]:
    found = dict(pairs)
    if len(found) < len(pairs):
        raise ValueError("a name is there twice")
    return found


def _sort_key(entry: object) -> list[int]:
    return entry["data_offsets"] if _is_entry(entry) else []


def _is_entry(entry: object) -> bool:
    """Whether a header's value has a known type, a shape and a range of bytes, as far as one entry alone can tell."""
    return (
        isinstance(entry, dict)
        and isinstance(entry.get("dtype"), str)
        and entry["dtype"] in _SIZES
        and _are_sizes(entry.get("shape"))
        and _are_sizes(entry.get("data_offsets"))
        and len(entry["data_offsets"]) == 2
    )


def _are_sizes(value: object) -> bool:
    return isinstance(value, list) and all(type(number) is int and number >= 0 for number in value)


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
