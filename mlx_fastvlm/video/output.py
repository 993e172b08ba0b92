"""Where descriptions of frames go: a file that stays whole whenever the run ends, or standard output.

Every record is written at once and as soon as it is known: a row with its frame, a cue when the next one begins.
"""

from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path
from typing import Protocol

from mlx_fastvlm.captions.rows import Recipe
from mlx_fastvlm.errors import FastVLMError, OptionError
from mlx_fastvlm.locked_file import append, closed_on_failure, open_locked
from mlx_fastvlm.video.cues import SUBTITLES, CueTrack, clock
from mlx_fastvlm.video.describing import FrameCaption
from mlx_fastvlm.video.rows import FrameRow

FORMATS = ("text", "jsonl", "srt", "vtt")


class Format(Protocol):
    """How frames are written."""

    header: str  # what the output begins with

    def add(self, row: FrameRow) -> str:
        """What a frame adds to the output; may be nothing."""

    def finish(self, end: float) -> str:
        """What is still to be written when watching ends, at this time in seconds."""


class TextLines:
    """For people: the time and the words of every frame that was described; none for those that had not changed."""

    header = ""

    def add(self, row: FrameRow) -> str:
        if row.frame.reused or row.frame.text is None:
            return ""
        words = "".join(character if character.isprintable() else " " for character in row.frame.text)
        return f"{clock(round(1000 * row.frame.time))}  {' '.join(words.split())}\n"

    def finish(self, end: float) -> str:
        return ""


class JsonLines:
    """A JSON object a line, one for every frame, see `FrameRow`."""

    header = ""

    def add(self, row: FrameRow) -> str:
        return row.to_json() + "\n"

    def finish(self, end: float) -> str:
        return ""


class Subtitles:
    """Cues, each of as many frames as say the same. `name` is "srt" or "vtt"."""

    def __init__(self, name: str):
        self._style = SUBTITLES[name]()
        self._track = CueTrack()
        self.header = self._style.header

    def add(self, row: FrameRow) -> str:
        cue = self._track.add(row.frame.time, row.frame.text)
        return self._style.encode(cue) if cue else ""

    def finish(self, end: float) -> str:
        cue = self._track.finish(end)
        return self._style.encode(cue) if cue else ""


def make_format(name: str | None, path: Path | None) -> Format:
    """The format of this name, or else the one that the file's suffix stands for; text for neither.

    Raises:
        OptionError: it is unknown.
    """
    found = name or ("text" if path is None else path.suffix.lower().lstrip("."))
    if found == "text":
        return TextLines()
    if found == "jsonl":
        return JsonLines()
    if found in SUBTITLES:
        return Subtitles(found)
    if name is not None:
        raise OptionError(f"The format {name} is unknown; it must be one of {', '.join(FORMATS)}.")
    raise OptionError(f"The output {path} has an unknown suffix: give .jsonl, .srt or .vtt, or say --format.")


class Printed:
    """Standard output.

    Args:
        form: how frames are written.
        say: prints text as it is, at once.
    """

    first: FrameCaption | None = None
    last: FrameCaption | None = None
    last_new: FrameCaption | None = None
    can_resume = False

    def __init__(self, form: Format, say: Callable[[str], None]):
        self._form, self._say = form, say
        self._to_come = form.header

    def add(self, row: FrameRow) -> None:
        """Print what the row adds."""
        self._print(self._form.add(row))

    def finish(self, end: float) -> None:
        """Print what is left when watching ends, at this time in seconds."""
        self._print(self._form.finish(end))

    def close(self) -> None:
        """Nothing is held."""

    def _print(self, text: str) -> None:
        text, self._to_come = self._to_come + text, ""
        if text:
            self._say(text)


class OutputFile:
    """A file that records are appended to.

    JSON Lines of the same video and recipe are gone on with: a torn last line is cut off, and `last` tells where to go
    on. Any other file that is there must be replaced as a whole, which happens with the first record.

    Args:
        path: made if it is missing.
        form: how frames are written.
        source: name of the video.
        recipe: what descriptions are made with now.
        can_resume: whether the video can be watched again; a live source cannot.
        overwrite: whether what is there is replaced, whatever it is.

    Attributes:
        first, last, last_new: the first and the last frame in the file, and the last one that was described; None if
            there is none.
        can_resume: whether a later run can go on with the file.

    Raises:
        OptionError: the file holds something else and is not to be replaced, or another process writes it.
        FastVLMError: it cannot be written.
    """

    def __init__(
        self, path: Path, form: Format, source: str, recipe: Recipe, *, can_resume: bool, overwrite: bool = False
    ):
        self._path, self._form = path, form
        self._starts = True  # with the next record
        self.can_resume = can_resume and isinstance(form, JsonLines)
        self.first: FrameCaption | None = None
        self.last: FrameCaption | None = None
        self.last_new: FrameCaption | None = None
        self._file = open_locked(path)
        with closed_on_failure(self.close, self._failure):
            if os.fstat(self._file.fileno()).st_size and not overwrite:
                if not self.can_resume:
                    raise OptionError(f"{path} is there already: give another --out, or replace it with --overwrite.")
                self._resume(source, recipe)

    def add(self, row: FrameRow) -> None:
        """Append what the row adds; it is in the file when this returns. Raises FastVLMError."""
        self._append(self._form.add(row))

    def finish(self, end: float) -> None:
        """Append what is left when watching ends, at this time in seconds. Raises FastVLMError."""
        if self._starts:
            return  # no frame came: what was there stays
        self._append(self._form.finish(end))
        try:
            os.fsync(self._file.fileno())
        except OSError as error:
            raise self._failure(error) from None

    def close(self) -> None:
        """Let others write the file."""
        self._file.close()

    def _append(self, text: str) -> None:
        try:
            if self._starts:
                self._file.truncate(0)
                self._starts = False
                text = self._form.header + text
            append(self._file, text.encode(errors="replace"))
        except OSError as error:
            raise self._failure(error) from None

    def _resume(self, source: str, recipe: Recipe) -> None:
        """Learn how far the file goes, and cut off what is torn."""
        whole = 0
        with open(self._path, "rb") as lines:
            for number, line in enumerate(lines, start=1):
                if not line.endswith(b"\n"):
                    if number > 1 or line.startswith(b'{"source": "'):
                        break
                    raise self._foreign("it is no JSON Lines file")
                try:
                    row = FrameRow.from_json(line)
                except (ValueError, RecursionError) as error:
                    raise self._foreign(f"its line {number} cannot be read ({error})") from None
                if row.source != source:
                    raise self._foreign(f"it is about {row.source}")
                if row.recipe != recipe:
                    raise self._foreign("it was made with another model, prompt or options")
                self.first = self.first or row.frame
                self.last = row.frame
                self.last_new = self.last_new if row.frame.reused else row.frame
                whole += len(line)
        self._file.truncate(whole)
        self._starts = not whole

    def _foreign(self, why: str) -> OptionError:
        return OptionError(f"{self._path} cannot be gone on with: {why}. Give another --out, or --overwrite.")

    def _failure(self, error: OSError) -> FastVLMError:
        return FastVLMError(f"{self._path} cannot be written ({error.strerror or error}). What is in it is kept.")
