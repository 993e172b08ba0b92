"""The shortest way to end an answer that a grammar allows, from any point of it: a search over bytes.

It knows matchers whose tokens are bytes and, for JSON, where in a text one is; tokens are the caller's matter.
"""

from __future__ import annotations

import heapq
import itertools
from collections.abc import Sequence
from typing import TYPE_CHECKING, NamedTuple

import numpy as np

if TYPE_CHECKING:
    from llguidance import LLMatcher

_QUOTE, _BACKSLASH, _U = b'"\\u'
_FEW = 48  # at most this many allowed bytes are all tried; more than that is free text


class Place(NamedTuple):
    """Where in a JSON text one is.

    Attributes:
        depth: objects and arrays that are open.
        in_string: between quotes.
        escaped: right after a backslash.
    """

    depth: int = 0
    in_string: bool = False
    escaped: bool = False

    def after(self, text: bytes) -> Place:
        """The place once `text` is written."""
        depth, in_string, escaped = self
        for byte in text:
            if escaped:
                escaped = False
            elif in_string:
                in_string, escaped = byte != _QUOTE, byte == _BACKSLASH
            elif byte == _QUOTE:
                in_string = True
            else:
                depth += (byte in b"{[") - (byte in b"}]")
        return Place(depth, in_string, escaped)


class EndingSearch:
    """Finds short endings of answers in one form.

    Args:
        words: what is worth trying in free text besides a letter: pieces that patterns may ask for.
        is_json: the answers are JSON; otherwise they are plain text.
    """

    def __init__(self, words: Sequence[bytes], is_json: bool):
        self._words = (b"a", *words)
        self._is_json = is_json

    def shortest(self, matcher: LLMatcher, place: Place, effort: int) -> bytes | None:
        """Bytes after which the answer may end, nearly the fewest there are, or if those are hard to find, few.

        Args:
            matcher: at the point to end from; it is left as it is.
            place: the same point in the JSON text.
            effort: how many points to go on from before giving up, once for the fewest and once for few.

        Returns:
            The bytes, or None if none were found: that does not mean that there are none.
        """
        ending = self._search(matcher, place, effort, free_text_price=1)
        return ending if ending is not None else self.short(matcher, place, effort)

    def short(self, matcher: LLMatcher, place: Place, effort: int) -> bytes | None:
        """Like `shortest`, but few bytes do; sooner found where several free texts follow one another."""
        # Who is past a free text gets ahead of those who still try what else might be written in it.
        return self._search(matcher, place, effort, free_text_price=4)

    def _search(self, matcher: LLMatcher, place: Place, effort: int, free_text_price: int) -> bytes | None:
        """Dijkstra's algorithm over written bytes; points that look alike at the same length count as one.

        They may differ in what is left to write, so an ending can be longer than need be, or not be found. Telling them
        apart by how far into a string they are was tried: shorter endings at times, but far fewer found.
        """
        order = itertools.count()  # decides between equals: matchers have no order
        waiting = [(0, next(order), b"", matcher.deep_copy(), place)]
        seen = set()
        while waiting and effort:
            price, _, ending, matcher, place = heapq.heappop(waiting)
            forced = b"" if matcher.is_accepting() else matcher.compute_ff_bytes()
            if forced:
                matcher.consume_tokens(list(forced))
                ending, place = ending + forced, place.after(forced)
            if matcher.is_error():
                continue
            if forced:  # its price has changed, so others may come first
                heapq.heappush(waiting, (price + len(forced), next(order), ending, matcher, place))
                continue
            if matcher.is_accepting():
                return ending
            allowed = matcher.compute_bitmask()
            looks = (len(ending), place, allowed)
            if looks in seen or matcher.is_error():
                continue
            seen.add(looks)
            effort -= 1
            worth_trying, is_free_text = self._worth_trying(allowed, place)
            for written in worth_trying:
                step = matcher.deep_copy()
                if step.consume_tokens(list(written)):
                    paid = price + len(written) * (free_text_price if is_free_text else 1)
                    heapq.heappush(waiting, (paid, next(order), ending + written, step, place.after(written)))
        return None

    def _worth_trying(self, bitmask: bytes, place: Place) -> tuple[list[bytes], bool]:
        """What may begin a shortest ending: allowed bytes, or in free text some words; and whether it is free text."""
        allowed = np.flatnonzero(np.unpackbits(np.frombuffer(bitmask, np.uint8), bitorder="little")[:256]).tolist()
        if self._is_json:
            allowed = _worth_trying_in_json(allowed, place)
        if len(allowed) <= _FEW:
            return [bytes([byte]) for byte in allowed], False
        return [word for word in self._words if word[0] in allowed] or [bytes(allowed[:1])], True


def _worth_trying_in_json(allowed: list[int], place: Place) -> list[int]:
    """The allowed bytes less those that cannot make an ending shorter."""
    if not place.in_string:
        # Whatever can be closed is closed, and a number that may end is ended.
        return next(([byte] for byte in b"}]," if byte in allowed), allowed)
    if place.escaped:
        return [byte for byte in allowed if byte != _U] or allowed
    if _QUOTE in allowed:
        return [_QUOTE]
    return [byte for byte in allowed if byte != _BACKSLASH] or allowed
