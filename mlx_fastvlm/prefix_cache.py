"""Keys and values of prompts seen, for later prompts that begin alike."""

from __future__ import annotations

from collections import deque
from collections.abc import Sequence
from dataclasses import dataclass

import mlx.core as mx

from mlx_fastvlm.cache import Cache

# One position of the decoder: a token's id, or the name of the image that one of its rows stands there for. Rows of an
# image come in order, so two prompts that agree on all positions before agree on which row it is.
Position = int | str

_MOST = 512  # prefixes held: each is looked at for every prompt, which is to cost next to nothing
_FEW = 32  # positions: computing them again costs less than a second copy of all that comes before them takes


@dataclass(eq=False)
class _Entry:
    positions: list[Position]
    cache: list[Cache]
    kv_bits: int | None
    pinned: bool
    nbytes: int


class PrefixCache:
    """Holds keys and values by what the decoder saw, the least recently used going first.

    Args:
        max_bytes: how much all that is held may take; pinned prefixes come on top.
    """

    def __init__(self, max_bytes: int):
        self._max_bytes = max_bytes
        self._entries: list[_Entry] = []  # least recently used first

    @property
    def nbytes(self) -> int:
        """Bytes held."""
        return sum(entry.nbytes for entry in self._entries)

    def longest(self, positions: Sequence[Position], kv_bits: int | None = None) -> tuple[list[Cache] | None, int]:
        """A copy of the longest beginning of `positions` that is held.

        Args:
            positions: of a prompt.
            kv_bits: of the cache that is wanted.

        Returns:
            The caches, one a layer, for the caller to extend, with their length: at least 1, and less than that of
            `positions`, so that the last one's logits are computed. Or None and 0.
        """
        known, best, length = positions[:-1], None, 0
        for entry in self._entries:
            common = common_length(entry.positions, known) if entry.kv_bits == kv_bits else 0
            if common >= length:  # of several the one used last: what only shares a beginning is not used by that
                best, length = entry, common
        if not length:
            return None, 0
        self._entries.remove(best)
        self._entries.append(best)
        return [layer.copy(length) for layer in best.cache], length

    def keep(
        self, positions: Sequence[Position], cache: list[Cache], kv_bits: int | None = None, pinned: bool = False
    ) -> None:
        """Hold a copy of `cache`, or as much of its beginning as `max_bytes` allows.

        It takes the place of what holds next to nothing else: this conversation one turn ago, another short question
        on the same picture.

        Args:
            positions: what it holds, from the first on; what it holds beyond them is left out.
            cache: one a layer.
            kv_bits: its kind.
            pinned: whether to hold it for good.
        """
        positions = list(positions)
        nbytes = sum(layer.copy(len(positions)).nbytes for layer in cache)
        if nbytes > self._max_bytes and not pinned:
            del positions[len(positions) * self._max_bytes // nbytes :]
        cache = [layer.copy(len(positions)) for layer in cache]  # without the room that is for more
        mx.eval([layer.arrays() for layer in cache])
        self._entries = [entry for entry in self._entries if not _is_covered(entry, positions, kv_bits)]
        nbytes = sum(layer.nbytes for layer in cache)
        self._entries.append(_Entry(positions, cache, kv_bits, pinned, nbytes))
        loose = deque(entry for entry in self._entries if not entry.pinned)
        held = sum(entry.nbytes for entry in loose)
        while held > self._max_bytes or len(loose) > _MOST:
            oldest = loose.popleft()
            held -= oldest.nbytes
            self._entries.remove(oldest)


def common_length(first: Sequence[Position], second: Sequence[Position]) -> int:
    """How many positions two sequences share from the first on."""
    for i, (a, b) in enumerate(zip(first, second, strict=False)):
        if a != b:
            return i
    return min(len(first), len(second))


def _is_covered(entry: _Entry, positions: list[Position], kv_bits: int | None) -> bool:
    """Whether an entry holds few positions that `positions` does not, in all and beside those it does, and may go."""
    if entry.pinned or entry.kv_bits != kv_bits:
        return False
    length = len(entry.positions)
    return length - common_length(entry.positions, positions) <= min(_FEW, length // 16)
