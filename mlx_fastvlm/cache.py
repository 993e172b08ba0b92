"""Key/value caches of the decoder: they grow in steps, so that most tokens are written in place, and they attend."""

from __future__ import annotations

from typing import Protocol

import mlx.core as mx

from mlx_fastvlm.errors import OptionError
from mlx_fastvlm.kernels import quantized_attention
from mlx_fastvlm.kernels.causal_attention import causal_attention

STEP = 256  # positions by which a cache grows
KV_BITS = (2, 3, 4, 5, 6, 8)


class LayerCache(Protocol):
    """Keys and values of one layer for all positions seen so far: what the decoder asks of them.

    Attributes:
        offset: number of positions held, which is the next token's position in the rotary embedding. For sequences of
            different lengths (B,) int32.
    """

    offset: int | mx.array

    def attend(self, queries: mx.array, keys: mx.array, values: mx.array, scale: float) -> mx.array:
        """Append L new positions and attend from them, each to itself and all before it.

        Args:
            queries: (B, heads, L, head_dim).
            keys, values: (B, num_key_value_heads, L, head_dim).
            scale: of the scores.

        Returns:
            (B, heads, L, head_dim).
        """


class Cache(LayerCache, Protocol):
    """Keys and values of one layer for one sequence, or for several that are equally long."""

    offset: int

    def arrays(self) -> list[mx.array]:
        """What is held, so that several caches can be evaluated together."""

    @property
    def nbytes(self) -> int:
        """Bytes held, room for further positions included."""

    def trim(self, offset: int) -> None:
        """Forget the positions from `offset` on."""

    def copy(self, length: int) -> Cache:
        """A cache of the first `length` positions: neither sees what is written into the other later.

        It holds no room beyond them. Its arrays are lazy, and until they are evaluated they keep all that this cache
        holds: a cache to be kept is evaluated, with its siblings of the other layers, by mx.eval on their `arrays`.
        """


class KVCache:
    """Keys and values in the type they are computed in; see `Cache`."""

    def __init__(self) -> None:
        self.keys: mx.array | None = None
        self.values: mx.array | None = None
        self.offset = 0

    def attend(self, queries: mx.array, keys: mx.array, values: mx.array, scale: float) -> mx.array:
        return causal_attention(queries, *self.update_and_fetch(keys, values), scale)

    def update_and_fetch(self, keys: mx.array, values: mx.array) -> tuple[mx.array, mx.array]:
        """Append new positions and return everything held.

        Args:
            keys, values: (B, num_key_value_heads, L, head_dim) of the L new positions.

        Returns:
            Keys and values, each (B, num_key_value_heads, offset, head_dim), after the append.
        """
        start, self.offset = self.offset, self.offset + keys.shape[2]
        self.keys = written(self.keys, keys, start)
        self.values = written(self.values, values, start)
        return self.keys[..., : self.offset, :], self.values[..., : self.offset, :]

    def arrays(self) -> list[mx.array]:
        return [] if self.keys is None else [self.keys, self.values]

    @property
    def nbytes(self) -> int:
        return sum(array.nbytes for array in self.arrays())

    def trim(self, offset: int) -> None:
        self.offset = _checked_length(offset, self.offset)

    def copy(self, length: int) -> KVCache:
        copied = KVCache()
        copied.offset = _checked_length(length, self.offset)
        if length:
            copied.keys, copied.values = (_first(array, length) for array in self.arrays())
        return copied


class QuantizedKVCache:
    """Keys and values quantized in affine mode along head_dim, each position when it comes; see `Cache`.

    Args:
        bits: per number, one of KV_BITS.
        head_dim: width of a head, a multiple of 32.

    Raises:
        OptionError: MLX cannot quantize so.
    """

    def __init__(self, bits: int, head_dim: int) -> None:
        if head_dim % 32:
            raise OptionError(f"kv_bits needs heads of a multiple of 32 channels; this model's have {head_dim}.")
        self._bits, self._head_dim = bits, head_dim
        self._how = {"group_size": 64 if head_dim % 64 == 0 else 32, "bits": bits}
        self.keys: list[mx.array | None] = [None] * 3
        self.values: list[mx.array | None] = [None] * 3
        self.offset = 0

    def attend(self, queries: mx.array, keys: mx.array, values: mx.array, scale: float) -> mx.array:
        start, self.offset = self.offset, self.offset + keys.shape[2]
        for held, new in ((self.keys, keys), (self.values, values)):
            held[:] = [
                written(array, rows, start) for array, rows in zip(held, mx.quantize(new, **self._how), strict=True)
            ]
        seen = ([array[..., : self.offset, :] for array in held] for held in (self.keys, self.values))
        return quantized_attention(queries, *seen, scale, **self._how)

    def arrays(self) -> list[mx.array]:
        return [array for array in (*self.keys, *self.values) if array is not None]

    @property
    def nbytes(self) -> int:
        return sum(array.nbytes for array in self.arrays())

    def trim(self, offset: int) -> None:
        self.offset = _checked_length(offset, self.offset)

    def copy(self, length: int) -> QuantizedKVCache:
        copied = QuantizedKVCache(self._bits, self._head_dim)
        copied.offset = _checked_length(length, self.offset)
        if length:
            copied.keys = [_first(array, length) for array in self.keys]
            copied.values = [_first(array, length) for array in self.values]
        return copied


def _checked_length(length: int, held: int) -> int:
    if not 0 <= length <= held:
        raise ValueError(f"length is {length}; this cache holds {held} positions.")
    return length


def _first(array: mx.array, length: int) -> mx.array:
    """The first positions in memory of their own; where these are all, the same memory under another name.

    Another name is enough: assigning to a slice of an MLX array changes what one name stands for, never the memory that
    a second name stands for.
    """
    return mx.contiguous(array[..., :length, :])


def written(held: mx.array | None, rows: mx.array, start: int, step: int = STEP) -> mx.array:
    """`held` with `rows` from position `start` on along the second last axis, made longer where they do not fit.

    Args:
        held: (B, heads, room, width), or None at first.
        rows: (B, heads, L, width).
        start: at most the room there is.
        step: the room is a multiple of it.
    """
    stop = start + rows.shape[2]
    length = 0 if held is None else held.shape[2]
    if stop > length:
        batch, heads, _, width = rows.shape
        room = mx.zeros((batch, heads, -(-stop // step) * step - length, width), rows.dtype)
        held = room if held is None else mx.concatenate([held, room], axis=2)
    held[..., start:stop, :] = rows
    return held
