"""A run of `mlx-fastvlm caption`: takes each caption to where it belongs, and keeps account of what became of each picture."""

from __future__ import annotations

import json
import time
from collections import Counter
from collections.abc import Iterator, Sequence
from contextlib import closing
from dataclasses import dataclass, field
from pathlib import Path
from typing import Protocol

from mlx_fastvlm.captions.captioning import Caption
from mlx_fastvlm.captions.metadata import NoPlaceForCaption, check_available, read_alt_text, write_caption
from mlx_fastvlm.captions.picture_files import Picture
from mlx_fastvlm.captions.rows import CaptionRow, Recipe
from mlx_fastvlm.cli.terminal import counting, on_one_line, say, tell
from mlx_fastvlm.errors import ImageError


class Output(Protocol):
    """Where captions go, see `captions.output.CaptionFile`."""

    def is_finished(self, picture: Picture) -> bool: ...
    def add(self, row: CaptionRow) -> None: ...
    def finish(self) -> None: ...
    def close(self) -> None: ...


@dataclass
class CaptionRun:
    """What became of the pictures of a run.

    Attributes:
        recipe: what captions are made with.
        embedder: where captions also go into the pictures' own files.
        captioned, finished_before, bad: numbers of pictures.
        seconds: that captioning took.
    """

    recipe: Recipe
    embedder: Embedder | None
    captioned: int = 0
    finished_before: int = 0
    bad: int = 0
    seconds: float = 0.0

    def report_bad(self, message: str) -> None:
        """Say, in one line on stderr, why there is no caption, and count it."""
        self.bad += 1
        tell(f"Bad: {on_one_line(message)}")

    def work(self, todo: Sequence[Picture], captions: Iterator[Caption], output: Output, shows_bar: bool) -> None:
        """Take the captions of these pictures to the output, one by one in order.

        Args:
            todo: the pictures.
            captions: one each; closed at the end, however that comes.
            output: where they go.
            shows_bar: whether a bar may be shown on stderr.
        """
        start = time.monotonic()
        with closing(captions), counting(len(todo), "pictures", visible=shows_bar) as report:
            report(0, self.bad)
            for done, (picture, made) in enumerate(zip(todo, captions, strict=True), start=1):
                if made.text is not None and self.embedder is not None:
                    self.embedder.add(picture, made.text)  # before its row: what has a row is finished
                output.add(self._row(picture, made))
                if made.text is None:
                    self.report_bad(made.error)
                else:
                    self.captioned += 1
                self.seconds = time.monotonic() - start
                report(done, self.bad)

    def summary(self) -> str:
        """One line about the run."""
        rate = f" ({self.captioned / self.seconds:.1f}/s)" if self.captioned else ""
        before = f", {self.finished_before} finished before" if self.finished_before else ""
        embedded = f" {self.embedder.summary()}" if self.embedder else ""
        return f"{self.captioned} captioned{rate}{before}, {self.bad} bad.{embedded}"

    def _row(self, picture: Picture, made: Caption) -> CaptionRow:
        return CaptionRow(
            picture.path,
            picture.page,
            self.recipe,
            caption=made.text,
            error=made.error,
            finish_reason=made.finish_reason,
            tokens=made.generation_tokens,
        )


class Printed:
    """Captions on standard output: path, tab and caption in a line, or a JSON object."""

    def __init__(self, as_json: bool, embedder: Embedder | None):
        self._as_json, self._embedder = as_json, embedder

    def is_finished(self, picture: Picture) -> bool:
        """Whether the picture's own file has a caption, where captions go there."""
        return self._embedder is not None and self._embedder.is_finished(picture)

    def add(self, row: CaptionRow) -> None:
        if self._as_json:
            say(json.dumps(row.to_dict(), ensure_ascii=False))
        elif row.caption is not None:
            name, words = Picture(row.path, row.page).name, " ".join(row.caption.split())
            say(f"{on_one_line(name)}\t{on_one_line(words)}")

    def finish(self) -> None:
        """Nothing is left to do."""

    def close(self) -> None:
        """Nothing is held."""


@dataclass
class Embedder:
    """Writes captions into the pictures' own files, and keeps account of those that stay without.

    Raises:
        OptionError: the extra that it needs is not installed.
    """

    overwrite: bool
    written: int = 0
    kept: int = 0
    failed: int = 0
    without_place: Counter[str] = field(default_factory=Counter)  # by suffix

    def __post_init__(self) -> None:
        check_available()

    def is_finished(self, picture: Picture) -> bool:
        """Whether there is nothing to write, because the picture has an alternative text that stays."""
        return not self.overwrite and _is_file(picture) and read_alt_text(Path(picture.path)) is not None

    def add(self, picture: Picture, text: str) -> None:
        """Write a caption; whatever speaks against it is counted or said."""
        try:
            if not _is_file(picture):
                raise NoPlaceForCaption
            if write_caption(Path(picture.path), text, overwrite=self.overwrite):
                self.written += 1
            else:
                self.kept += 1
        except NoPlaceForCaption:
            self.without_place["URL" if picture.is_url else Path(picture.path).suffix.lower()] += 1
        except ImageError as error:
            self.failed += 1
            tell(f"Not written into the picture: {on_one_line(str(error))}")

    def summary(self) -> str:
        """One sentence."""
        parts = [f"Alternative text: {self.written} written"]
        if self.kept:
            parts.append(f"{self.kept} kept as it was (--overwrite replaces it)")
        if self.failed:
            parts.append(f"{self.failed} failed")
        if self.without_place:
            kinds = ", ".join(f"{count} {kind}" for kind, count in sorted(self.without_place.items()))
            parts.append(f"no place for it in {kinds}")
        return ", ".join(parts) + "."


def _is_file(picture: Picture) -> bool:
    """Whether the picture is a file of its own."""
    return picture.page is None and not picture.is_url
