"""Keys and values of several sequences of different lengths, which are decoded together and come and go.

The sequences are the rows of one array a layer. They end at the same column, so that a step writes one column for all;
what stands before a shorter one's first position is padding, which attention leaves out. Positions are counted from a
row's own first: each row's numbers are those it would have alone.
"""

from __future__ import annotations

from collections.abc import Sequence

import mlx.core as mx

from mlx_fastvlm.cache import KVCache, written
from mlx_fastvlm.kernels.causal_attention import causal_attention

STEP = 32  # columns by which the arrays grow: few, as rows that come or go have them copied


class BatchCache:
    """The caches of all layers for a batch of sequences.

    Args:
        num_layers: of the decoder.

    Attributes:
        layers: one for each layer, for `Qwen2.hidden_states`.
    """

    def __init__(self, num_layers: int):
        self.layers = [_Layer() for _ in range(num_layers)]
        self._padding: list[int] = []

    @property
    def lengths(self) -> list[int]:
        """Positions held of each row."""
        return [self._columns - padding for padding in self._padding]

    @property
    def nbytes(self) -> int:
        """Bytes held, padding and room for further positions included."""
        return sum(array.nbytes for layer in self.layers for array in (layer.keys, layer.values) if array is not None)

    def regroup(self, stay: Sequence[int], join: Sequence[Sequence[KVCache]] = ()) -> None:
        """Keep some rows and add others; no column stays that no row needs.

        Args:
            stay: the rows to keep, in their new order.
            join: for each newcomer the caches of all layers, of one sequence or of several equally long ones, with one
                position or more. They become the last rows; the caches themselves are not written.
        """
        held = self.lengths
        lengths = [held[row] for row in stay]
        lengths += [caches[0].offset for caches in join for _ in range(len(caches[0].keys))]
        columns = max(lengths, default=0)
        self._padding = [columns - length for length in lengths]
        alignment = _Alignment(self._padding)
        for index, layer in enumerate(self.layers):
            layer.regroup(stay, [caches[index] for caches in join], columns, alignment)

    def row(self, index: int) -> list[KVCache]:
        """A copy of one row's caches, as if it had been decoded alone."""
        return [layer.row(index, self._padding[index]) for layer in self.layers]

    @property
    def _columns(self) -> int:
        return self.layers[0].columns


class _Alignment:
    """Where the rows of a batch begin; the layers share it, and with it the arrays made for a step."""

    def __init__(self, padding: Sequence[int]):
        self._rows = list(padding)
        self.padding = mx.array(self._rows, mx.int32) if any(self._rows) else None
        self._offset: tuple[int, mx.array] | None = None

    def offset(self, columns: int) -> int | mx.array:
        """Positions held of each row when there are so many columns; one number where it is the same for all."""
        if self.padding is None:
            return columns
        if self._offset is None or self._offset[0] != columns:
            self._offset = columns, mx.array([columns - padding for padding in self._rows], mx.int32)
        return self._offset[1]


class _Layer:
    """One layer of a batch; see `cache.LayerCache`."""

    def __init__(self) -> None:
        self.keys: mx.array | None = None
        self.values: mx.array | None = None
        self.columns = 0
        self._alignment = _Alignment([])

    @property
    def offset(self) -> int | mx.array:
        return self._alignment.offset(self.columns)

    def attend(self, queries: mx.array, keys: mx.array, values: mx.array, scale: float) -> mx.array:
        start, self.columns = self.columns, self.columns + keys.shape[2]
        self.keys = written(self.keys, keys, start, STEP)
        self.values = written(self.values, values, start, STEP)
        seen = (array[..., : self.columns, :] for array in (self.keys, self.values))
        return causal_attention(queries, *seen, scale, self._alignment.padding)

    def regroup(self, stay: Sequence[int], join: Sequence[KVCache], columns: int, alignment: _Alignment) -> None:
        """See `BatchCache.regroup`; `columns` and `alignment` as they are afterwards."""
        first = max(0, self.columns - columns)  # of those that stay, the columns before it are padding
        keys = [self.keys[mx.array(stay), :, first : self.columns]] if stay else []
        values = [self.values[mx.array(stay), :, first : self.columns]] if stay else []
        self.keys = _right_aligned(keys + [cache.keys[..., : cache.offset, :] for cache in join], columns)
        self.values = _right_aligned(values + [cache.values[..., : cache.offset, :] for cache in join], columns)
        self.columns, self._alignment = columns, alignment

    def row(self, index: int, padding: int) -> KVCache:
        """See `BatchCache.row`; its first position is behind so many columns."""
        cache = KVCache()
        cache.offset = self.columns - padding
        cache.keys, cache.values = (
            mx.contiguous(array[index : index + 1, :, padding : self.columns]) for array in (self.keys, self.values)
        )
        return cache


def _right_aligned(parts: Sequence[mx.array], columns: int) -> mx.array | None:
    """Arrays (rows, heads, positions, width) below each other, all ending before column `columns`, with room behind it.

    What is padding is 0, not whatever memory held: it takes part in sums, weighted with 0.
    """
    if not parts:
        return None
    _, heads, _, width = parts[0].shape
    room = (columns // STEP + 1) * STEP
    joint = mx.zeros((sum(map(len, parts)), heads, room, width), parts[0].dtype)
    first = 0
    for part in parts:
        joint[first : first + len(part), :, columns - part.shape[2] : columns] = part
        first += len(part)
    return joint
