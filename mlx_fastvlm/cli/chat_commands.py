"""What a line entered into the chat means: a question, a command, pictures dragged in. Reads words, does nothing."""

from __future__ import annotations

import difflib
import os
import re
import shlex
from collections.abc import Callable
from dataclasses import dataclass
from urllib.parse import unquote, urlsplit

from mlx_fastvlm.cli.options import resolution_of
from mlx_fastvlm.errors import ImageError, OptionError


@dataclass(frozen=True)
class Command:
    """One line of /help.

    Attributes:
        argument: what may follow the name, as the help writes it; empty if nothing may.
        explanation: what it does.
    """

    argument: str
    explanation: str


COMMANDS = {
    "image": Command("[PATH…]", "show pictures (files, URLs); alone, list those shown"),
    "system": Command("[TEXT]", "set the system line, or default; alone, show it"),
    "retry": Command("", "ask the last question again"),
    "undo": Command("", "take back the pictures just shown, or the last question"),
    "branch": Command("N", "go back to where N questions were answered"),
    "clear": Command("", "forget everything said and shown"),
    "history": Command("", "what was said and shown so far"),
    "save": Command("[FILE]", "write the chat to a file, pictures included"),
    "load": Command("FILE", "go on with a saved chat"),
    "set": Command("[NAME VALUE]", "change an option, as in /set temp 0.7; alone, list all"),
    "stats": Command("", "the last answer's times and rates; the context's use"),
    "help": Command("[COMMAND]", "this list"),
    "exit": Command("", "leave (as Ctrl-D does)"),
}
ALIASES = {"quit": "exit", "?": "help"}
SETTINGS = {
    "max_tokens": int,
    "temp": float,
    "top_p": float,
    "top_k": int,
    "repetition_penalty": float,
    "seed": int,
    "resolution": resolution_of,
    "fit": str,
}
_MAY_BE_NONE = ("seed", "resolution", "fit")

KEYS_HELP = """\
Enter sends. Alt-Enter, Ctrl-J, or a \\ at the end of a line begins another line.
Tab completes. Ctrl-R searches what was entered before, today or earlier.
Ctrl-C stops an answer, or clears the line.
A file dragged into the terminal is shown with the next question.
A question that begins with / is sent with //."""


@dataclass(frozen=True)
class Question:
    """Words for the model, and pictures that were dragged in before them."""

    text: str
    pictures: tuple[str, ...] = ()


@dataclass(frozen=True)
class Order:
    """A command to carry out: a key of `COMMANDS`, and what followed it."""

    command: str
    argument: str = ""


def parse(line: str, is_file: Callable[[str], bool] | None = None) -> Question | Order:
    """What `line` means.

    Args:
        line: as entered, not blank; may have several lines.
        is_file: tells files that a line begins with from commands; by default, asks the file system.

    Raises:
        OptionError: it begins with / and is no command.
    """
    line = line.strip()
    pictures, rest = _dragged(line, is_file or _is_file)
    if pictures:
        return Question(rest, pictures) if rest else Order("image", line)
    if not line.startswith("/"):
        return Question(line)
    if line.startswith("//"):
        return Question(line[1:])
    name, _, argument = re.match(r"/(\S*)(\s*)(.*)", line, re.DOTALL).groups()
    name = ALIASES.get(name.lower(), name.lower())
    if name not in COMMANDS:
        raise OptionError(f"There is no command /{name}{_nearest(name)}; /help lists them. As a question: //{name}.")
    if argument and not COMMANDS[name].argument:
        raise OptionError(f"/{name} takes nothing after it. To send the line as a question, begin it with //.")
    return Order(name, argument)


def picture_names(argument: str, is_file: Callable[[str], bool] | None = None) -> list[str]:
    """The pictures that the words after /image name: one path as it stands, or several written as in a shell.

    Raises:
        OptionError: a quote is not closed.
        ImageError: a name is "-".
    """
    whole = _plain_path(argument.strip())
    if (is_file or _is_file)(whole):
        return [whole]
    try:
        names = [_plain_path(word) for word in shlex.split(argument)]
    except ValueError:
        raise OptionError("A quote in the names is not closed; close it, or write \\' for the letter.") from None
    for name in names:
        refuse_standard_input(name)
    return names


def refuse_standard_input(name: str) -> None:
    """Raise ImageError for the name that elsewhere stands for standard input."""
    if name == "-":
        raise ImageError("A chat reads questions from standard input, so no picture can come from there; name a file.")


def file_name(argument: str) -> str:
    """The one file that the words after /save or /load name: quoted, escaped, or as it stands."""
    try:
        words = shlex.split(argument)
    except ValueError:
        words = []
    return _plain_path(words[0] if len(words) == 1 else argument.strip())


def parse_setting(argument: str) -> tuple[str, float | int | str | None]:
    """What /set is to set, from `temp 0.7`, `temp=0.7` or `seed none`.

    Raises:
        OptionError: there is no such option, or its value is no number.
    """
    name, _, text = re.match(r"(\S*?)(\s*=\s*|\s+|$)(.*)", argument.strip(), re.DOTALL).groups()
    name = name.lower().lstrip("-").replace("-", "_")
    if name not in SETTINGS:
        raise OptionError(f"There is no option {name}; expected one of {', '.join(SETTINGS)}.")
    if name in _MAY_BE_NONE and text.lower() == "none":
        return name, None
    kind = SETTINGS[name]
    try:
        return name, kind(text)
    except ValueError:
        expected = "a whole number" if kind is int else "a number"
        raise OptionError(f"{name} is {text!r}; expected {expected}, as in /set {name} 1.") from None


def _dragged(line: str, is_file: Callable[[str], bool]) -> tuple[tuple[str, ...], str]:
    """The files that a line begins with, as terminals write them when dropped there, and the rest of the line."""
    if line.startswith(("/", "~/")) and is_file(line):
        return (line,), ""
    pictures = []
    while line.startswith(("/", "~/", "file:", "'", '"')):
        lexer = shlex.shlex(line, posix=True)
        lexer.whitespace_split, lexer.commenters = True, ""
        try:
            path = _plain_path(lexer.get_token() or "")
        except ValueError:  # a quote that is not closed
            break
        if not path.startswith(("/", "~/")) or not is_file(path):
            break
        pictures.append(path)
        line = lexer.instream.read().strip()
    return tuple(pictures), line


def _plain_path(name: str) -> str:
    """A name without what makes it a file:// URL."""
    return unquote(urlsplit(name).path) if re.match("file:/", name, re.IGNORECASE) else name


def _is_file(path: str) -> bool:
    try:
        return os.path.isfile(os.path.expanduser(path))
    except ValueError:  # a null character
        return False


def _nearest(name: str) -> str:
    close = difflib.get_close_matches(name, [*COMMANDS, *ALIASES], n=1, cutoff=0.5)
    return f"; did you mean /{close[0]}?" if close else ""
