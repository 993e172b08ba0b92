"""Markdown as lines for a terminal, and lines that change while text grows. Knows no chat."""

from __future__ import annotations

import itertools
import re
from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING, TextIO

if TYPE_CHECKING:
    from markdown_it import MarkdownIt
    from markdown_it.token import Token
    from rich.console import Console

_CONTROLS = re.compile(r"[\x00-\x08\x0b-\x1f\x7f-\x9f\ud800-\udfff]")  # all but line break and tab; lone surrogates


class LiveLines:
    """The last lines of the output, which may still change; only what differs is drawn.

    Args:
        file: the terminal; its cursor is at the beginning of a line, and stays below what is drawn.
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
