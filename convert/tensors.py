"""A checkpoint as folding sees it: named tensors under LlavaQwen2's names, read one at a time or by blocks of rows.

`Checkpoint` reads files; every other layout, an adapter or another tower is a view over it that answers the same
questions, so that nothing is rewritten on disk and only what is being worked on is in memory.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from typing import Protocol

import mlx.core as mx


class Tensors(Protocol):
    """Named tensors."""

    def names(self) -> list[str]: ...

    def __contains__(self, name: str) -> bool: ...

    def __getitem__(self, name: str) -> mx.array:
        """The whole tensor in float32; integers as they are stored."""

    def rows(self, name: str, start: int, stop: int) -> mx.array:
        """Rows start … stop − 1 along the first axis, as `[]` gives them; the others are not read where that is possible."""

    def shape(self, name: str) -> tuple[int, ...]: ...

    def dtype(self, name: str) -> str:
        """The stored type in safetensors' words, such as "BF16"."""

    def nbytes(self, name: str) -> int:
        """Bytes that reading the tensor moves."""


@dataclass(frozen=True)
class Stored:
    """Where a renamed tensor is found and how it becomes what LlavaQwen2 stores.

    Args:
        name: the stored name.
        transform: applied to the whole float32 tensor, e.g. OHWI → OIHW; None leaves rows readable by blocks.
    """

    name: str
    transform: Callable[[mx.array], mx.array] | None = None


class Renamed:
    """Tensors under other names, some of them transformed."""

    def __init__(self, tensors: Tensors, stored: Mapping[str, Stored]):
        self._tensors = tensors
        self._stored = dict(stored)

    def names(self) -> list[str]:
        return list(self._stored)

    def __contains__(self, name: str) -> bool:
        return name in self._stored

    def __getitem__(self, name: str) -> mx.array:
        stored = self._stored[name]
        array = self._tensors[stored.name]
        return array if stored.transform is None else stored.transform(array)

    def rows(self, name: str, start: int, stop: int) -> mx.array:
        stored = self._stored[name]
        return self._tensors.rows(stored.name, start, stop) if stored.transform is None else self[name][start:stop]

    def shape(self, name: str) -> tuple[int, ...]:
        stored = self._stored[name]
        shape = self._tensors.shape(stored.name)
        # MLX is lazy: zeros that nobody reads cost nothing, and the transform tells the shape itself.
        return shape if stored.transform is None else tuple(stored.transform(mx.zeros(shape)).shape)

    def dtype(self, name: str) -> str:
        return self._tensors.dtype(self._stored[name].name)

    def nbytes(self, name: str) -> int:
        return self._tensors.nbytes(self._stored[name].name)


class Combined:
    """Several sets of tensors as one; where two have a name, the first answers."""

    def __init__(self, *parts: Tensors):
        self._parts = parts

    def names(self) -> list[str]:
        return list(dict.fromkeys(name for part in self._parts for name in part.names()))

    def __contains__(self, name: str) -> bool:
        return any(name in part for part in self._parts)

    def __getitem__(self, name: str) -> mx.array:
        return self._holder(name)[name]

    def rows(self, name: str, start: int, stop: int) -> mx.array:
        return self._holder(name).rows(name, start, stop)

    def shape(self, name: str) -> tuple[int, ...]:
        return self._holder(name).shape(name)

    def dtype(self, name: str) -> str:
        return self._holder(name).dtype(name)

    def nbytes(self, name: str) -> int:
        return self._holder(name).nbytes(name)

    def _holder(self, name: str) -> Tensors:
        for part in self._parts:
            if name in part:
                return part
        raise KeyError(name)


def same_tensor(tensors: Tensors, first: str, second: str) -> bool:
    """Whether two tensors, of one axis or more, have the same shape and numbers; compared by blocks of rows."""
    return tensors.shape(first) == tensors.shape(second) and all(
        mx.array_equal(tensors.rows(second, start, start + len(rows)), rows).item()
        for start, rows in row_blocks(tensors, first)
    )


def row_blocks(tensors: Tensors, name: str, max_bytes: int = 2**26) -> Iterator[tuple[int, mx.array]]:
    """A tensor in blocks of whole rows of at most about `max_bytes` in float32: (first row, rows)."""
    shape = tensors.shape(name)
    if not shape:
        yield 0, tensors[name]
        return
    width = 4
    for length in shape[1:]:
        width *= length
    step = max(1, max_bytes // width)
    for start in range(0, shape[0], step):
        yield start, tensors.rows(name, start, min(start + step, shape[0]))
