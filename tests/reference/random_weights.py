"""Random tensor bytes that are the same on every machine and numpy version, and safetensors files made of them.

Only the raw PCG64 stream is used (numpy keeps it stable), and values are multiples of 2**-16 of a range, so each is one
multiplication and one addition. A table with 65536 entries turns the stream into any dtype at memory speed, which
makes the full-size 0.5B checkpoint a matter of seconds.
"""

import json
import zlib
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from .tensor_layout import Tensor

DTYPES = {"bfloat16": ("BF16", 2), "float16": ("F16", 2), "float32": ("F32", 4)}
_CHUNK = 1 << 22  # elements held in memory at a time


def encode(values: np.ndarray, dtype: str) -> np.ndarray:
    """Float values rounded to nearest even in `dtype`; bfloat16 comes back as its uint16 bits."""
    values = values.astype("<f4")
    if dtype == "float32":
        return values
    if dtype == "float16":
        return values.astype("<f2")
    bits = values.view("<u4")
    return ((bits + 0x7FFF + ((bits >> 16) & 1)) >> 16).astype("<u2")


def _table(low: float, high: float, center: float, dtype: str) -> np.ndarray:
    grid = (np.arange(65536, dtype=np.float64) + 0.5) / 65536  # never an end point, never exactly the middle
    return encode(low + (high - low) * grid + center, dtype)


def tensor_chunks(tensor: Tensor, seed: int, dtype: str) -> Iterator[np.ndarray]:
    """The flat little-endian values of one tensor; they depend on its name, shape and the seed alone."""
    source = zlib.crc32((tensor.copy_of or tensor.name).encode())
    stream = np.random.PCG64(np.random.SeedSequence([seed, source]))
    if tensor.counter:
        yield np.array([1 + stream.random_raw() % 100_000], dtype="<i8")
        return
    table = _table(tensor.low, tensor.high, 0.0, dtype)
    for start in range(0, tensor.size, _CHUNK):
        count = min(_CHUNK, tensor.size - start)
        steps = stream.random_raw((count + 3) // 4).astype("<u8", copy=False).view("<u2")[:count]
        values = table[steps]
        if tensor.center:
            _shift_middle_tap(values, steps, tensor, dtype)
        yield values


def _shift_middle_tap(values: np.ndarray, steps: np.ndarray, tensor: Tensor, dtype: str) -> None:
    if tensor.size != values.size:
        raise ValueError(f"{tensor.name}: a kernel with a middle tap must fit into one chunk")
    _, _, height, width = tensor.shape
    tap = (slice(None), slice(None), height // 2, width // 2)
    shifted = _table(tensor.low, tensor.high, tensor.center, dtype)
    values.reshape(tensor.shape)[tap] = shifted[steps.reshape(tensor.shape)[tap]]


def _byte_size(tensor: Tensor, dtype: str) -> int:
    return 8 if tensor.counter else tensor.size * DTYPES[dtype][1]


def write_safetensors(path: Path, tensors: Sequence[Tensor], seed: int, dtype: str) -> None:
    """One .safetensors file, streamed in chunks; counters come first so that everything stays aligned."""
    ordered = sorted(tensors, key=lambda tensor: not tensor.counter)
    header: dict[str, Any] = {"__metadata__": {"format": "pt"}}
    offset = 0
    for tensor in ordered:
        end = offset + _byte_size(tensor, dtype)
        kind = "I64" if tensor.counter else DTYPES[dtype][0]
        header[tensor.name] = {"dtype": kind, "shape": list(tensor.shape), "data_offsets": [offset, end]}
        offset = end
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    with path.open("wb") as file:
        file.write(len(text).to_bytes(8, "little"))
        file.write(text)
        for tensor in ordered:
            for values in tensor_chunks(tensor, seed, dtype):
                file.write(values.data)


def write_shards(folder: Path, tensors: Sequence[Tensor], seed: int, dtype: str, shards: int) -> list[Path]:
    """model.safetensors, or `shards` files of about equal size with model.safetensors.index.json."""
    if not 1 <= shards <= len(tensors):
        raise ValueError(f"shards must be between 1 and {len(tensors)}, not {shards}")
    if shards == 1:
        write_safetensors(folder / "model.safetensors", tensors, seed, dtype)
        return [folder / "model.safetensors"]
    total = sum(_byte_size(tensor, dtype) for tensor in tensors)
    groups: list[list[Tensor]] = [[]]
    written = 0
    for position, tensor in enumerate(tensors):
        remaining = len(tensors) - position
        full = written >= total * len(groups) / shards or remaining <= shards - len(groups)
        if groups[-1] and len(groups) < shards and full:
            groups.append([])
        groups[-1].append(tensor)
        written += _byte_size(tensor, dtype)
    weight_map: dict[str, str] = {}
    for number, group in enumerate(groups, start=1):
        name = f"model-{number:05d}-of-{shards:05d}.safetensors"
        write_safetensors(folder / name, group, seed, dtype)
        weight_map.update({tensor.name: name for tensor in group})
    index = {"metadata": {"total_size": total}, "weight_map": dict(sorted(weight_map.items()))}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index, indent=2) + "\n")
    return [folder / name for name in sorted(set(weight_map.values()))]
