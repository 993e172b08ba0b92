"""Tokens → text pieces that are whole: no split UTF-8 character, nothing past a stop string."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from tokenizers import Tokenizer

_INCOMPLETE = "\ufffd"  # what a decoder shows for the first bytes of a character whose rest is still to come


class TextStream:
    """Turns one answer's tokens into pieces of text, in order, that join to the whole answer.

    Args:
        tokenizer: decodes ids; special tokens become nothing.
        stop: the answer ends before the first of these strings.

    Attributes:
        stopped: a stop string was met; later tokens add nothing.
    """

    def __init__(self, tokenizer: Tokenizer, stop: Sequence[str] = ()):
        self._tokenizer = tokenizer
        self._stop = [text for text in stop if text]
        self._ids: list[int] = []
        self._context = 0  # ids before this one are decoded and out; those from it on give the next piece its context
        self._decoded = 0  # ids before this one have reached _held or gone out
        self._held = ""  # decoded text that may be the beginning of a stop string
        self.stopped = False

    def add(self, token: int) -> str:
        """Take the next token; return the text that is certain now, often empty."""
        if self.stopped:
            return ""
        self._ids.append(token)
        # Decoding a little context before the new ids keeps the decoder's treatment of spaces the same as in one go.
        before = self._tokenizer.decode(self._ids[self._context : self._decoded])
        after = self._tokenizer.decode(self._ids[self._context :])
        if after.endswith(_INCOMPLETE):
            return ""
        self._context, self._decoded = self._decoded, len(self._ids)
        return self._release(after[len(before) :])

    def finish(self) -> str:
        """Return what is still held back once the last token is in."""
        if self.stopped:
            return ""
        before = self._tokenizer.decode(self._ids[self._context : self._decoded])
        rest = self._tokenizer.decode(self._ids[self._context :])[len(before) :]
        self._decoded = len(self._ids)
        text = self._release(rest) + ("" if self.stopped else self._held)
        self._held = ""
        return text

    def _release(self, new: str) -> str:
        """Add to the held text and return the part that can no longer become a stop string."""
        self._held += new
        found = [position for position in map(self._held.find, self._stop) if position >= 0]
        if found:
            self.stopped = True
            text, self._held = self._held[: min(found)], ""
            return text
        keep = max((_overlap(self._held, stop) for stop in self._stop), default=0)
        cut = len(self._held) - keep
        text, self._held = self._held[:cut], self._held[cut:]
        return text


def _overlap(text: str, stop: str) -> int:
    """Length of the longest end of `text` that is a proper beginning of `stop`."""
    return next((n for n in range(min(len(text), len(stop) - 1), 0, -1) if text.endswith(stop[:n])), 0)
