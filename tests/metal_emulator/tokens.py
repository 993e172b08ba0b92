"""Splits MSL into tokens; together they are the text again."""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass

KINDS = re.compile(
    r"""
    (?P<comment>//[^\n]*|/\*.*?\*/)
  | (?P<string>"(?:\\.|[^"\\\n])*"|'(?:\\.|[^'\\\n])*')
  | (?P<number>0[xX][0-9a-fA-F]+\w*|(?:\d+\.\d*|\.\d+|\d+)(?:[eE][+-]?\d+)?\w*)
  | (?P<name>[A-Za-z_]\w*)
  | (?P<space>\s+)
  | (?P<punctuation>::|->|\+\+|--|<<|<=|>=|==|!=|&&|\|\||[-+*/%&|^]=|.)
    """,
    re.X | re.S,
)
OPENING, CLOSING = "([{", ")]}"


@dataclass(frozen=True)
class Token:
    """A piece of MSL: kind (a group of KINDS), its text and where it starts."""

    kind: str
    text: str
    start: int

    @property
    def significant(self) -> bool:
        """Whether the compiler sees it."""
        return self.kind not in ("comment", "space")


def tokenize(text: str) -> list[Token]:
    """All tokens, spaces and comments too."""
    return [Token(match.lastgroup, match.group(), match.start()) for match in KINDS.finditer(text)]


def next_significant(tokens: Sequence[Token], index: int) -> int:
    """Index of the first significant token at or after `index`; len(tokens) if none."""
    while index < len(tokens) and not tokens[index].significant:
        index += 1
    return index


def previous_significant(tokens: Sequence[Token], index: int) -> int:
    """Index of the last significant token at or before `index`; -1 if none."""
    while index >= 0 and not tokens[index].significant:
        index -= 1
    return index


def after_template_arguments(tokens: Sequence[Token], index: int) -> int | None:
    """Index behind the `>` that closes the `<` at `index`; None if it is not closed."""
    depth = 0
    for i in range(index, len(tokens)):
        text = tokens[i].text
        depth += (text == "<") - (text == ">")
        if depth == 0:
            return i + 1
        if text in ";{}":
            return None
    return None


def joined(tokens: Sequence[Token]) -> str:
    """The text of the tokens."""
    return "".join(token.text for token in tokens)
