"""What the chat shows: answers as they come, notes and errors. On a terminal, markdown; elsewhere, plain lines.

Knows nothing of conversations. What goes where: a terminal gets everything on stdout; otherwise stdout gets the answers
and stderr the rest.
"""

from __future__ import annotations

import sys
import time
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING

from mlx_fastvlm.cli.chat_markdown import LiveLines, markdown_lines, printable, split_blocks
from mlx_fastvlm.cli.terminal import say

if TYPE_CHECKING:
    from rich.console import Console

SECONDS_BETWEEN_FRAMES = 0.05
SHARE_OF_DRAWING = 0.1  # of the time; the rest is the model's
_MORE_ABOVE = "⋮"  # the block in progress is taller than the screen


class ShownAnswer(ABC):
    """One answer on its way to the reader."""

    @abstractmethod
    def add(self, text: str) -> None:
        """Show what the answer grows by."""

    @abstractmethod
    def end(self) -> None:
        """Nothing more comes: leave the answer complete on lines of its own."""


class View(ABC):
    """Where a chat is shown."""

    @abstractmethod
    def note(self, text: str) -> None:
        """Show information that is no answer."""

    @abstractmethod
    def error(self, text: str) -> None:
        """Show what went wrong, in one line."""

    @abstractmethod
    @contextmanager
    def status(self, text: str) -> Iterator[None]:
        """Show what takes a while, and afterwards how long it took."""

    @abstractmethod
    @contextmanager
    def answer(self) -> Iterator[ShownAnswer]:
        """Where the pieces of one answer go; it is complete on the screen when the block ends, however it does."""


class LineView(View):
    """For pipes and files: the answers, and nothing else, on stdout."""

    def note(self, text: str) -> None:
        print(printable(text), file=sys.stderr, flush=True)

    def error(self, text: str) -> None:
        self.note(f"mlx-fastvlm: {' '.join(text.split())}")

    @contextmanager
    def status(self, text: str) -> Iterator[None]:
        yield

    @contextmanager
    def answer(self) -> Iterator[ShownAnswer]:
        yield from _ended(_PlainAnswer(printable if sys.stdout.isatty() else str))


class TerminalView(View):
    """For people: markdown where it is wanted and the terminal can move its cursor.

    Args:
        console: writes to the terminal.
        markdown: whether answers are rendered.
    """

    def __init__(self, console: Console, *, markdown: bool = True):
        self._console = console
        self._markdown = markdown and not console.is_dumb_terminal
        if self._markdown:
            markdown_lines(console, "a")  # loads what the first answer should not wait for

    def note(self, text: str) -> None:
        self._console.print(printable(text), style="dim", markup=False)

    def error(self, text: str) -> None:
        self._console.print(printable(" ".join(text.split())), style="red", markup=False, soft_wrap=True)

    @contextmanager
    def status(self, text: str) -> Iterator[None]:
        console, start = self._console, time.perf_counter()
        console.print(printable(text), style="dim", markup=False, soft_wrap=True, end="… ")
        try:
            yield
            console.print(f"{time.perf_counter() - start:.1f} s", style="dim", end="")
        finally:
            console.print()

    @contextmanager
    def answer(self) -> Iterator[ShownAnswer]:
        shown = _MarkdownAnswer(self._console) if self._markdown else _PlainAnswer(printable)
        yield from _ended(shown)


def terminal_console() -> Console:
    """The terminal behind stdout."""
    from rich.console import Console

    return Console(file=sys.stdout, highlight=False)


def _ended(shown: ShownAnswer) -> Iterator[ShownAnswer]:
    try:
        yield shown
    finally:
        shown.end()


class _PlainAnswer(ShownAnswer):
    """As it comes, each piece changed by `clean`."""

    def __init__(self, clean: Callable[[str], str]) -> None:
        self._clean = clean
        self._begun = False

    def add(self, text: str) -> None:
        self._begun = True
        say(self._clean(text), end="")

    def end(self) -> None:
        if self._begun:
            say("")


class _MarkdownAnswer(ShownAnswer):
    """Rendered: finished blocks are printed for good, the one in progress is drawn anew as it grows."""

    def __init__(self, console: Console) -> None:
        self._console = console
        self._lines = LiveLines(console.file)
        self._size = console.size
        self._text = ""  # of the blocks that are not printed for good
        self._printed_any = False
        self._next_drawing = 0.0  # on the monotonic clock

    def add(self, text: str) -> None:
        self._text += printable(text)
        start = time.monotonic()
        if start >= self._next_drawing:
            self._draw()
            end = time.monotonic()
            self._next_drawing = end + max(SECONDS_BETWEEN_FRAMES, (end - start) / SHARE_OF_DRAWING)

    def end(self) -> None:
        self._follow_resize()
        self._lines.draw(self._rendered(self._text), [])

    def _draw(self) -> None:
        self._follow_resize()
        finished, growing = split_blocks(self._text)
        printed = self._rendered(finished)
        self._printed_any = self._printed_any or bool(printed)
        height = self._console.height - 1  # the cursor stands on a line of its own
        live = self._rendered(growing)
        if len(live) > height:
            live = [_MORE_ABOVE, *live[len(live) - height + 1 :]]
        self._lines.draw(printed, live)
        self._text = growing

    def _follow_resize(self) -> None:
        """After a change of the window's size nobody knows where the lines drawn went: go on below them."""
        if self._console.size != self._size:
            self._size = self._console.size
            self._lines = LiveLines(self._console.file)

    def _rendered(self, markdown: str) -> list[str]:
        """Lines with their colors, the empty one first that separates blocks."""
        lines = markdown_lines(self._console, markdown)
        return ["", *lines] if lines and self._printed_any else lines
