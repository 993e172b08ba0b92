"""Key/value cache of the decoder: grows in steps, so that most tokens are written in place."""

from __future__ import annotations

import mlx.core as mx


class KVCache:
    """Keys and values of one layer for all positions seen so far.

    Attributes:
        offset: number of positions held; the next token's position in the rotary embedding.
    """

    step = 256

    def __init__(self) -> None:
        self.keys: mx.array | None = None
        self.values: mx.array | None = None
        self.offset = 0

    def update_and_fetch(self, keys: mx.array, values: mx.array) -> tuple[mx.array, mx.array]:
        """Append new positions and return everything held.

        Args:
            keys, values: (B, num_key_value_heads, L, head_dim) of the L new positions.

        Returns:
            Keys and values, each (B, num_key_value_heads, offset, head_dim), after the append.
        """
        start, self.offset = self.offset, self.offset + keys.shape[2]
        self._reserve(keys)
        self.keys[..., start : self.offset, :] = keys
        self.values[..., start : self.offset, :] = values
        return self.keys[..., : self.offset, :], self.values[..., : self.offset, :]

    def _reserve(self, like: mx.array) -> None:
        held = 0 if self.keys is None else self.keys.shape[2]
        if self.offset <= held:
            return
        capacity = -(-self.offset // self.step) * self.step
        room = mx.zeros((like.shape[0], like.shape[1], capacity - held, like.shape[3]), like.dtype)
        if self.keys is None:
            self.keys, self.values = room, mx.zeros_like(room)
        else:
            self.keys = mx.concatenate([self.keys, room], axis=2)
            self.values = mx.concatenate([self.values, room], axis=2)
