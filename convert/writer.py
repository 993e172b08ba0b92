"""Writing .safetensors block by block: the header first, then every block of rows at its place in the file.

safetensors' own writer wants all tensors in memory at once; here a 7B checkpoint passes through in blocks of megabytes.
"""

from __future__ import annotations

import json
import math
import struct
from collections.abc import Mapping
from pathlib import Path
from types import TracebackType

import mlx.core as mx
import numpy as np

from mlx_fastvlm.errors import CheckpointError

_NAMES = {
    mx.float32: "F32",
    mx.float16: "F16",
    mx.bfloat16: "BF16",
    mx.uint32: "U32",
    mx.uint8: "U8",
    mx.int64: "I64",
}

Spec = tuple[tuple[int, ...], mx.Dtype]  # shape and type of one stored tensor


def stored_bytes(specs: Mapping[str, Spec]) -> int:
    """Bytes that tensors of these shapes and types take, the header aside."""
    return sum(math.prod(shape) * dtype.size for shape, dtype in specs.values())


class SafetensorsWriter:
    """One file. Use as a context manager; leaving it checks that every tensor was written completely.

    Args:
        path: the new file.
        specs: name → (shape, type) of every tensor, in the file's order. Blocks may come in any order.
        metadata: strings for the header's `__metadata__`.

    Raises:
        OSError: the disk is full, or the file cannot be written.
    """

    def __init__(self, path: Path, specs: Mapping[str, Spec], metadata: Mapping[str, str]):
        self._specs = dict(specs)
        self._offsets: dict[str, int] = {}
        self._missing = {name: math.prod(shape) for name, (shape, _) in specs.items()}
        header: dict[str, object] = {"__metadata__": dict(metadata)}
        offset = 0
        for name, (shape, dtype) in specs.items():
            end = offset + math.prod(shape) * dtype.size
            header[name] = {"dtype": _NAMES[dtype], "shape": list(shape), "data_offsets": [offset, end]}
            self._offsets[name] = offset
            offset = end
        encoded = json.dumps(header, separators=(",", ":")).encode()
        encoded += b" " * (-len(encoded) % 8)  # tensors start aligned, as safetensors itself does
        self._data_start = 8 + len(encoded)
        self._file = path.open("wb")
        self._file.write(struct.pack("<Q", len(encoded)) + encoded)

    def __enter__(self) -> SafetensorsWriter:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._file.close()
        if kind is None:
            unwritten = [name for name, count in self._missing.items() if count]
            assert not unwritten, f"tensors of the header were not written: {unwritten[:6]}"

    def write(self, name: str, array: mx.array, start_row: int = 0) -> None:
        """Write rows of a tensor, cast to its type.

        Args:
            name: one of the header's.
            array: the rows, of the tensor's shape but for the first axis.
            start_row: where the first of them belongs.

        Raises:
            CheckpointError: a value does not fit float16.
        """
        shape, dtype = self._specs[name]
        assert tuple(array.shape[1:]) == shape[1:], f"{name}: {array.shape} does not fit {shape}"
        data = array.astype(dtype)
        if dtype == mx.float16 and array.dtype != dtype and mx.any(mx.isinf(data) & mx.isfinite(array)).item():
            raise CheckpointError(f"{name} has values beyond float16's 65504; convert to bfloat16 or float32.")
        # numpy has no bfloat16: its bytes travel as 16-bit integers. Not ndarray.tofile, which hides a full disk.
        raw = np.array(data.view(mx.uint16) if dtype == mx.bfloat16 else data)
        self._file.seek(self._data_start + self._offsets[name] + start_row * math.prod(shape[1:]) * dtype.size)
        self._file.write(np.ascontiguousarray(raw).data)
        self._missing[name] -= array.size
