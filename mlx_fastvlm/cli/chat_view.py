"""What the chat shows: answers as they come, notes and errors. On a terminal, markdown; elsewhere, plain lines.

Knows nothing of conversations. What goes where: a terminal gets everything on stdout; otherwise stdout gets the answers
and stderr the rest.
"""

from __future__ import annotations

import itertools
import re
import sys
import time
from abc import ABC, abstractmethod
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import TYPE_CHECKING, TextIO

from mlx_fastvlm.cli.terminal import say

if TYPE_CHECKING:
    from markdown_it import MarkdownIt
    from markdown_it.token import Token
    from rich.console import Console

SECONDS_BETWEEN_FRAMES = 0.05
SHARE_OF_DRAWING = 0.1  # of the time; the rest is the model's
_CONTROLS = re.compile(r"[\x00-\x08\x0b-\x1f\x7f-\x9f\ud800-\udfff]")  # all but line break and tab; lone surrogates
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
        print(text, file=sys.stderr, flush=True)

    def error(self, text: str) -> None:
        self.note(f"mlx-fastvlm: {' '.join(text.split())}")

    @contextmanager
    def status(self, text: str) -> Iterator[None]:
        yield

    @contextmanager
    def answer(self) -> Iterator[ShownAnswer]:
        yield from _ended(_PlainAnswer())


class TerminalView(View):
    """For people: markdown where it is wanted and the terminal can move its cursor.

    Args:
        console: writes to the terminal.
        markdown: whether answers are rendered.
    """

    def __init__(self, console: Console, *, markdown: bool = True):
        self._console = console
        self._markdown = markdown and not console.is_dumb_terminal

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
    """As it comes."""

    def __init__(self, clean=str) -> None:
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


class LiveLines:
    """The last lines of the output, which may still change; only what differs is drawn.

    Args:
        file: the terminal; its cursor is at the beginning of a line.
    """

    def __init__(self, file: TextIO) -> None:
        self._file = file
        self._live: list[str] = []

    def draw(self, finished: Sequence[str], live: Sequence[str]) -> None:
        """Put lines in place of those that could still change.

        Args:
            finished: stay for good.
            live: may change; fewer than the terminal has lines, and none longer than one of those.
        """
        lines = [*finished, *live]
        same = sum(
            1 for _ in itertools.takewhile(lambda pair: pair[0] == pair[1], zip(self._live, lines, strict=False))
        )
        above = len(self._live) - same
        up = f"\x1b[{above}A" if above else ""
        changed = "".join(f"\x1b[K{line}\n" for line in lines[same:])
        rest = "\x1b[J" if len(lines) < len(self._live) else ""
        if up or changed:
            self._file.write(up + changed + rest)
            self._file.flush()
        self._live = list(live)


def printable(text: str) -> str:
    """`text` without what would command the terminal; a model may say anything."""
    return _CONTROLS.sub("\N{REPLACEMENT CHARACTER}", text)


def split_blocks(markdown: str) -> tuple[str, str]:
    """What can no longer change when more text follows, and the rest: the last block and the line that is being written."""
    complete = markdown[: markdown.rfind("\n") + 1]
    starts = [token.map[0] for token in _parser().parse(complete) if token.level == 0 and token.map]
    if not starts:
        return "", markdown
    lines = markdown.split("\n")
    return "\n".join([*lines[: starts[-1]], ""]) if starts[-1] else "", "\n".join(lines[starts[-1] :])


def markdown_lines(console: Console, markdown: str) -> list[str]:
    """Lines as the terminal shows them, colors included; one empty line between blocks.

    Each block is rendered by itself, so that it looks the same whether or not those around it are known yet.
    """
    lines: list[str] = []
    for tokens in _blocks(_parser().parse(markdown)):
        if block := _rendered_block(console, tokens):
            lines += [*([""] if lines else []), *block]
    return lines


def _blocks(tokens: Sequence[Token]) -> Iterator[list[Token]]:
    """The tokens of each outermost block."""
    block: list[Token] = []
    for token in tokens:
        block.append(token)
        if token.level == 0 and token.nesting <= 0:
            yield block
            block = []


def _rendered_block(console: Console, tokens: list[Token]) -> list[str]:
    from rich.markdown import Markdown

    for token in tokens:
        for child in token.children or ():
            if child.type == "softbreak":  # models mean their line breaks
                child.type = "hardbreak"
    # Links are shown with where they lead. The theme has no background of its own, so it suits dark and light terminals.
    rendered = Markdown("", hyperlinks=False, code_theme="ansi_dark")
    rendered.parsed = tokens
    with console.capture() as capture:
        console.print(rendered)
    lines = [line.rstrip(" ") for line in capture.get().split("\n")]
    filled = [i for i, line in enumerate(lines) if _without_colors(line).strip()]
    return lines[filled[0] : filled[-1] + 1] if filled else []


def _without_colors(line: str) -> str:
    return re.sub(r"\x1b\[[0-9;]*m", "", line)


def _parser() -> MarkdownIt:
    from markdown_it import MarkdownIt

    # What looks like HTML is shown as it stands.
    return MarkdownIt("commonmark", {"html": False}).enable(["strikethrough", "table"])
