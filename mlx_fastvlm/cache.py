"""Key/value caches of the decoder: they grow in steps, so that most tokens are written in place, and they attend."""

from __future__ import annotations

from typing import Protocol

import mlx.core as mx

from mlx_fastvlm.errors import OptionError
from mlx_fastvlm.kernels import quantized_attention
from mlx_fastvlm.kernels.causal_attention import causal_attention

STEP = 256  # positions by which a cache grows
KV_BITS = (2, 3, 4, 5, 6, 8)


class Cache(Protocol):
    """Keys and values of one layer for all positions seen so far.

    Attributes:
        offset: number of positions held; the next token's position in the rotary embedding.
    """

    offset: int

    def attend(self, queries: mx.array, keys: mx.array, values: mx.array, scale: float) -> mx.array:
        """Append L new positions and attend from them, each to itself and all before it.

        Args:
            queries: (B, heads, L, head_dim).
            keys, values: (B, num_key_value_heads, L, head_dim).
            scale: of the scores.

        Returns:
            (B, heads, L, head_dim).
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
        self.keys = _written(self.keys, keys, start)
        self.values = _written(self.values, values, start)
        return self.keys[..., : self.offset, :], self.values[..., : self.offset, :]


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
        self._how = {"group_size": 64 if head_dim % 64 == 0 else 32, "bits": bits}
        self.keys: list[mx.array | None] = [None] * 3
        self.values: list[mx.array | None] = [None] * 3
        self.offset = 0

    def attend(self, queries: mx.array, keys: mx.array, values: mx.array, scale: float) -> mx.array:
        start, self.offset = self.offset, self.offset + keys.shape[2]
        for held, new in ((self.keys, keys), (self.values, values)):
            held[:] = [
                _written(array, rows, start) for array, rows in zip(held, mx.quantize(new, **self._how), strict=True)
            ]
        seen = ([array[..., : self.offset, :] for array in held] for held in (self.keys, self.values))
        return quantized_attention(queries, *seen, scale, **self._how)


def _written(held: mx.array | None, rows: mx.array, start: int) -> mx.array:
    """`held` with `rows` from position `start` on along the second last axis, made longer where they do not fit."""
    stop = start + rows.shape[2]
    length = 0 if held is None else held.shape[2]
    if stop > length:
        batch, heads, _, width = rows.shape
        room = mx.zeros((batch, heads, -(-stop // STEP) * STEP - length, width), rows.dtype)
        held = room if held is None else mx.concatenate([held, room], axis=2)
    held[..., start:stop, :] = rows
    return held
