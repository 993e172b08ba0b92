"""Where captions are kept so that a run can be killed at any moment and go on later: one file of rows, or a text file
beside each picture.

The rows themselves are caption_rows' concern.
"""

from __future__ import annotations

import os
from collections import Counter
from collections.abc import Iterator, Sequence
from pathlib import Path

from mlx_fastvlm.captions.picture_files import Picture
from mlx_fastvlm.captions.rows import CaptionRow, Recipe, row_format
from mlx_fastvlm.errors import FastVLMError, OptionError
from mlx_fastvlm.locked_file import append, closed_on_failure, lock, open_locked, write_all
from mlx_fastvlm.replace_file import replace_file

_Key = tuple[str, int | None]


class CaptionFile:
    """Rows appended to a JSON Lines (.jsonl) or CSV (.csv) file, no picture twice.

    Each row is written at once, so that whatever ends the process leaves whole rows and at most one that is torn. When
    the file is opened again the torn row is cut off; captions count as finished, errors do not: their rows are taken
    out, for the pictures to be tried again. `finish` puts the rows into the order of the pictures where it is another,
    as after pictures were added or tried again.

    One process at a time writes: the file is locked while it is open.

    Args:
        path: of the file; made if it is missing. Its suffix says the format.
        recipe: what captions are made with now.
        pictures: all that the run is about, in order.
        overwrite: whether the first row replaces all that is there, whatever it was.

    Attributes:
        finished: keys of the pictures, of any run, that have captions.

    Raises:
        OptionError: the suffix is unknown, another process writes the file, it holds something else, or captions of
            these pictures made with another recipe.
        FastVLMError: the file cannot be written.
    """

    def __init__(self, path: Path, recipe: Recipe, pictures: Sequence[Picture], *, overwrite: bool = False):
        self._format = row_format(path)
        self._name = path
        self._path = Path(os.path.realpath(path))  # a link stays one
        self._aside = self._path.with_name(f".{self._path.name}.new")
        self._positions = {(picture.path, picture.page): i for i, picture in enumerate(pictures)}
        self.finished: set[_Key] = set()
        self._last_position = -1
        self._in_order = True
        self._starts_over = overwrite
        self._file = open_locked(path)
        with closed_on_failure(self.close, self._failure):
            self._aside.unlink(missing_ok=True)  # a run was killed while it wrote it
            if not overwrite:
                self._resume(recipe)

    def is_finished(self, picture: Picture) -> bool:
        return (picture.path, picture.page) in self.finished

    def add(self, row: CaptionRow) -> None:
        """Append a row; it is in the file when this returns. Raises FastVLMError if it cannot be written."""
        try:
            if self._starts_over:
                self._start_over()
            append(self._file, self._format.encode(row))
        except OSError as error:
            raise self._failure(error) from None
        self._note(row)

    def finish(self) -> None:
        """Put the rows in order, when all pictures are done. Raises FastVLMError if that cannot be written."""
        try:
            if not self._in_order:
                self._rewrite(self._sorted_records())
            os.fsync(self._file.fileno())
        except OSError as error:
            raise self._failure(error) from None

    def close(self) -> None:
        """Let others write the file."""
        self._file.close()

    def _resume(self, recipe: Recipe) -> None:
        """Learn what is finished, and take out what is torn or an error."""
        self._check_header()
        size = len(self._format.header)
        for row, record in self._kept_rows():
            if row.key in self._positions and row.recipe != recipe:
                raise OptionError(
                    f"{self._name} holds captions made with {_difference(row.recipe, recipe)}: use the same, give "
                    "another --out, or start over with --overwrite."
                )
            self._note(row)
            size += len(record)
        if size != os.fstat(self._file.fileno()).st_size:
            self._rewrite(record for _, record in self._kept_rows())

    def _check_header(self) -> None:
        """Write the header into a file that is new, or was torn within it."""
        header = self._format.header
        self._file.seek(0)
        start = self._file.read(len(header) + 1)
        if start.startswith(header):
            return
        if not header.startswith(start):
            raise self._foreign("its first line is not " + header.decode().strip())
        self._start_over()

    def _start_over(self) -> None:
        """Leave nothing but the header in the file."""
        self._starts_over = False
        self._file.truncate(0)
        write_all(self._file, self._format.header)

    def _rows(self) -> Iterator[tuple[CaptionRow, bytes]]:
        """Every whole row and its record; raises OptionError at the first that is not one of ours."""
        with open(self._path, "rb") as file:
            for number, (record, is_complete) in enumerate(self._format.records(file), start=1):
                if not is_complete and (self._format.may_begin(record) or not record.strip(b"\0")):
                    return  # torn by a kill, or by a power failure, which leaves null bytes
                try:
                    row = self._format.decode(record)
                except (ValueError, RecursionError) as error:
                    raise self._foreign(f"its row {number} cannot be read ({error})") from None
                yield row, record

    def _note(self, row: CaptionRow) -> None:
        """Keep account of a row that is in the file."""
        if row.caption is not None:
            self.finished.add(row.key)
        position = self._positions.get(row.key)
        if position is not None:
            self._in_order &= position > self._last_position
            self._last_position = position

    def _kept_rows(self) -> Iterator[tuple[CaptionRow, bytes]]:
        """The rows without errors of these pictures and without repetitions."""
        seen: set[_Key] = set()
        for row, record in self._rows():
            if row.key not in seen and (row.error is None or row.key not in self._positions):
                seen.add(row.key)
                yield row, record

    def _sorted_records(self) -> Iterator[bytes]:
        """Records of other pictures as they stand, then those of these in order; one is in memory at a time."""
        places: list[tuple[int, int, int]] = []
        offset = len(self._format.header)
        for row, record in self._rows():
            places.append((self._positions.get(row.key, -1), offset, len(record)))
            offset += len(record)
        for _, start, length in sorted(places):
            yield os.pread(self._file.fileno(), length, start)

    def _rewrite(self, records: Iterator[bytes]) -> None:
        """Replace the file by one of these records, aside and then renamed, without ever letting go of the lock."""
        new = open(self._aside, "a+b", buffering=0)  # noqa: SIM115, it becomes the file that stays open
        try:
            lock(new, self._name)
            os.fchmod(new.fileno(), os.fstat(self._file.fileno()).st_mode & 0o7777)
            write_all(new, self._format.header)
            for record in records:
                write_all(new, record)
            os.fsync(new.fileno())
            os.replace(self._aside, self._path)
        except BaseException:
            new.close()
            self._aside.unlink(missing_ok=True)
            raise
        self._file.close()
        self._file = new

    def _foreign(self, why: str) -> OptionError:
        return OptionError(f"{self._name} holds something other than captions: {why}. Give another --out.")

    def _failure(self, error: OSError) -> FastVLMError:
        return FastVLMError(
            f"{self._name} cannot be written ({error.strerror or error}). The captions in it are kept: mend that and run "
            "the same command again."
        )


class Sidecars:
    """A text file beside each picture: `photo.txt` for photo.jpg, `paper.page3.txt` for page 3 of paper.pdf.

    Pictures that differ only in their suffix, as photo.jpg and photo.png, get photo.jpg.txt and photo.png.txt. A picture
    whose text file is there is finished, whoever wrote that. Errors are not kept.

    Args:
        pictures: all that the run is about.
        overwrite: whether text files that are there are replaced.

    Raises:
        OptionError: one of them is a URL.
    """

    def __init__(self, pictures: Sequence[Picture], *, overwrite: bool = False):
        url = next((picture.path for picture in pictures if picture.is_url), None)
        if url is not None:
            raise OptionError(f"{url} has no folder for a text file: give --out captions.jsonl.")
        self._overwrite = overwrite
        self._uses = Counter(_sidecar(picture) for picture in pictures)

    def path(self, picture: Picture) -> Path:
        """Of the picture's text file."""
        path = _sidecar(picture)
        return path if self._uses[path] <= 1 else _sidecar(picture, keep_suffix=True)

    def is_finished(self, picture: Picture) -> bool:
        return not self._overwrite and self.path(picture).exists()

    def add(self, row: CaptionRow) -> None:
        """Write a caption, aside and then renamed. Raises FastVLMError if it cannot be written."""
        if row.caption is None:
            return
        path = self.path(Picture(row.path, row.page))
        try:
            replace_file(path, f"{row.caption}\n".encode())
        except OSError as error:
            raise FastVLMError(
                f"{path} cannot be written ({error.strerror or error}): mend that and run the same command again."
            ) from None

    def finish(self) -> None:
        """Nothing is left to do."""

    def close(self) -> None:
        """Nothing is held."""


def _sidecar(picture: Picture, keep_suffix: bool = False) -> Path:
    path = Path(picture.path)
    stem = path.name if keep_suffix or path.suffix == ".txt" else path.stem  # never the picture itself
    return path.with_name(f"{stem}.txt" if picture.page is None else f"{stem}.page{picture.page}.txt")


def _difference(made: Recipe, wanted: Recipe) -> str:
    """In words of the command line, the first thing in which captions were made otherwise."""
    if made.model != wanted.model:
        return f"--model {made.model}"
    if made.prompt != wanted.prompt:
        return f'the prompt "{made.prompt}"'
    given = " ".join(f"--{name.replace('_', '-')} {value}" for name, value in made.options.items())
    return given or "the default options"
