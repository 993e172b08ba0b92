"""What Tab can add in the chat: names of commands, of options, and of files after the commands that take some."""

from __future__ import annotations

import os
import re
from collections.abc import Iterator
from dataclasses import dataclass

from mlx_fastvlm.captions.picture_files import SUFFIXES
from mlx_fastvlm.cli.chat_commands import COMMANDS, SETTINGS

_FILES = {"image": tuple(SUFFIXES), "load": (".json",), "save": (".json",)}  # command → suffixes of its files


@dataclass(frozen=True)
class Proposal:
    """One way to go on.

    Attributes:
        text: what the last word becomes.
        replaces: how many letters before the cursor it stands for.
        shown: what the menu calls it.
        explanation: what the menu says of it.
    """

    text: str
    replaces: int
    shown: str
    explanation: str = ""


def proposals(before: str) -> Iterator[Proposal]:
    """How the text before the cursor can go on."""
    match = re.match(r"/(\S*)(\s+)?(.*)$", before, re.DOTALL)
    if match is None:
        return
    name, space, argument = match.groups()
    if space is None:
        for command, what in COMMANDS.items():
            if command.startswith(name.lower()):
                end = " " if what.argument else ""
                yield Proposal(f"/{command}{end}", len(before), f"/{command}", what.explanation)
    elif name == "set":
        for option in SETTINGS:
            if option.startswith(argument):
                yield Proposal(f"{option} ", len(argument), option)
    elif name in _FILES:
        yield from _files(argument, _FILES[name])


def _files(argument: str, suffixes: tuple[str, ...]) -> Iterator[Proposal]:
    written, meant = _last_word(argument)
    folder, beginning = os.path.split(meant)
    try:
        entries = sorted(os.scandir(os.path.expanduser(folder) or "."), key=lambda entry: entry.name.lower())
    except (OSError, ValueError):  # no such folder, or not ours to read
        return
    for entry in entries:
        hidden = entry.name.startswith(".") and not beginning.startswith(".")
        if hidden or not entry.name.startswith(beginning):
            continue
        if entry.is_dir():
            yield Proposal(_escaped(os.path.join(folder, entry.name)) + "/", len(written), f"{entry.name}/")
        elif entry.name.lower().endswith(suffixes):
            yield Proposal(_escaped(os.path.join(folder, entry.name)), len(written), entry.name)


def _last_word(argument: str) -> tuple[str, str]:
    """The last word as written, with quotes and backslashes, and as meant, without; a quote may still be open."""
    start, meant, quote, escaped = 0, "", "", False
    for i, letter in enumerate(argument):
        if escaped:
            meant, escaped = meant + letter, False
        elif letter == "\\" and quote != "'":
            escaped = True
        elif quote:
            quote, meant = ("", meant) if letter == quote else (quote, meant + letter)
        elif letter in "'\"":
            quote = letter
        elif letter.isspace():
            start, meant = i + 1, ""
        else:
            meant += letter
    return argument[start:], meant


def _escaped(path: str) -> str:
    return re.sub(r"([\s'\"\\])", r"\\\1", path)
