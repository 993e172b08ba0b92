"""Subtitles: rows with the same words become one cue, and cues become SubRip (.srt) or WebVTT (.vtt).

Cues never overlap, and each ends where the next begins.
"""

from __future__ import annotations

import re
from collections.abc import Callable
from dataclasses import dataclass

_BLANK_LINES = re.compile(r"\s*\n\s*")
_CONTROLS = re.compile(r"[\x00-\x09\x0b-\x1f\x7f-\x9f]")
_SRT_MARKUP = re.compile(r"[<{](?=[\w/\\!])")
_WORD_JOINER = "\u2060"  # shows nothing and breaks nothing but a tag


@dataclass(frozen=True)
class Cue:
    """Words and when they are shown: from `start` to `end`, in milliseconds, `start` < `end`."""

    start: int
    end: int
    text: str


class CueTrack:
    """Makes cues of frames as they come."""

    def __init__(self) -> None:
        self._start = 0
        self._text: str | None = None

    def add(self, time: float, text: str | None) -> Cue | None:
        """Take a frame's words.

        Args:
            time: in seconds, not before the last one.
            text: None, or nothing but space, shows no words.

        Returns:
            The cue that ends here; None if the words are still the same, or there were none.
        """
        text = _tidy(text or "") or None
        if text == self._text:
            return None
        ended = self.finish(time)
        self._start, self._text = _milliseconds(time), text
        return ended

    def finish(self, time: float) -> Cue | None:
        """The cue that is still shown, with its end; None if there is none or it would be shown for no time."""
        end = _milliseconds(time)
        return Cue(self._start, end, self._text) if self._text is not None and end > self._start else None


class SubRip:
    """SubRip as players read it; it has no standard."""

    header = ""

    def __init__(self) -> None:
        self._count = 0

    def encode(self, cue: Cue) -> str:
        """The cue's number, times, words and a blank line. What would be taken for a tag or a time is not."""
        self._count += 1
        text = _SRT_MARKUP.sub(lambda found: found[0] + _WORD_JOINER, cue.text).replace("-->", "->")
        return f"{self._count}\n{clock(cue.start, ',')} --> {clock(cue.end, ',')}\n{text}\n\n"


class WebVtt:
    """WebVTT as the W3C has it."""

    header = "WEBVTT\n\n"

    def encode(self, cue: Cue) -> str:
        """The cue's times, words and a blank line."""
        text = cue.text.replace("&", "&amp;").replace("<", "&lt;").replace(">", "&gt;")
        return f"{clock(cue.start)} --> {clock(cue.end)}\n{text}\n\n"


SUBTITLES: dict[str, Callable[[], SubRip | WebVtt]] = {"srt": SubRip, "vtt": WebVtt}


def clock(milliseconds: int, point: str = ".") -> str:
    """hh:mm:ss.mmm; more digits for more hours."""
    seconds, milliseconds = divmod(milliseconds, 1000)
    minutes, seconds = divmod(seconds, 60)
    return f"{minutes // 60:02}:{minutes % 60:02}:{seconds:02}{point}{milliseconds:03}"


def _milliseconds(time: float) -> int:
    return max(0, round(1000 * time))


def _tidy(text: str) -> str:
    """Lines without blank ones between them, which would end a cue, and without what commands a terminal."""
    lines = text.replace("\r\n", "\n").replace("\r", "\n")
    return _BLANK_LINES.sub("\n", _CONTROLS.sub(" ", lines)).strip()
