"""One row per captioned picture, and how rows stand in a file: JSON Lines or CSV.

What is done with the files is caption_output's concern.
"""

from __future__ import annotations

import csv
import io
import json
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, BinaryIO, Protocol

from mlx_fastvlm.errors import OptionError


@dataclass(frozen=True)
class Recipe:
    """What captions are made with; captions of different recipes are not mixed.

    Attributes:
        model: as it was named.
        prompt: the question asked about every picture.
        options: what differs from the defaults, as JSON knows it.
    """

    model: str
    prompt: str
    options: Mapping[str, Any] = field(default_factory=dict)


@dataclass(frozen=True)
class CaptionRow:
    """What became of one picture. It says nothing of time, so that two runs over the same pictures give the same rows.

    Attributes:
        path, page: of the picture; the page of a PDF document, or None.
        caption: the answer; None if there is an error.
        error: in one line, why the picture cannot be captioned; None if there is a caption.
        finish_reason: "stop", or "length" if the answer was cut at max_tokens.
        tokens: of the answer.
        recipe: what the caption was made with.
    """

    path: str
    page: int | None
    recipe: Recipe
    caption: str | None = None
    error: str | None = None
    finish_reason: str | None = None
    tokens: int = 0

    @property
    def key(self) -> tuple[str, int | None]:
        return self.path, self.page

    def to_dict(self) -> dict[str, Any]:
        """The row as JSON objects have it, without what is empty."""
        values = {
            "path": self.path,
            "page": self.page,
            "caption": self.caption,
            "error": self.error,
            "finish_reason": self.finish_reason,
            "tokens": None if self.caption is None else self.tokens,
            "model": self.recipe.model,
            "prompt": self.recipe.prompt,
            "options": dict(self.recipe.options) or None,
        }
        return {name: value for name, value in values.items() if value is not None}

    @classmethod
    def from_dict(cls, values: object) -> CaptionRow:
        """Raises ValueError if these are not a row's values."""
        if not isinstance(values, dict) or not values.keys() <= set(COLUMNS):
            raise ValueError("it has other fields")
        text = {name: values.get(name) for name in ("path", "caption", "error", "finish_reason", "model", "prompt")}
        options, page, tokens = values.get("options", {}), values.get("page"), values.get("tokens", 0)
        if (
            not all(value is None or isinstance(value, str) for value in text.values())
            or None in (text["path"], text["model"], text["prompt"])
            or (text["caption"] is None) == (text["error"] is None)
            or not isinstance(options, dict)
            or not isinstance(page, int | None)
            or not isinstance(tokens, int)
        ):
            raise ValueError("its fields have other values")
        recipe = Recipe(text["model"], text["prompt"], options)
        return cls(text["path"], page, recipe, text["caption"], text["error"], text["finish_reason"], tokens)


COLUMNS = ("path", "page", "caption", "error", "finish_reason", "tokens", "model", "prompt", "options")


class RowFormat(Protocol):
    """How rows stand in a file, one record each."""

    header: bytes  # what the file begins with

    def encode(self, row: CaptionRow) -> bytes:
        """The row as a record, its last line's end included."""

    def decode(self, record: bytes) -> CaptionRow:
        """Raises ValueError if the record is not a row of ours."""

    def records(self, file: BinaryIO) -> Iterator[tuple[bytes, bool]]:
        """Each record after the header, and whether it is complete; only the last one may not be."""

    def may_begin(self, record: bytes) -> bool:
        """Whether an incomplete record may be the beginning of a row of ours."""


class JsonLines:
    """A JSON object a line."""

    header = b""
    _start = b'{"path": "'

    def encode(self, row: CaptionRow) -> bytes:
        try:
            return (json.dumps(row.to_dict(), ensure_ascii=False) + "\n").encode()
        except UnicodeEncodeError:  # a file name that is not UTF-8: as escapes it stays valid and can be read back
            return (json.dumps(row.to_dict()) + "\n").encode()

    def decode(self, record: bytes) -> CaptionRow:
        return CaptionRow.from_dict(json.loads(record))

    def records(self, file: BinaryIO) -> Iterator[tuple[bytes, bool]]:
        for line in file:
            yield line, line.endswith(b"\n")

    def may_begin(self, record: bytes) -> bool:
        return record.startswith(self._start) or self._start.startswith(record)


class CsvRows:
    """Comma-separated values as RFC 4180 has them: a header, and quotes around what holds commas or line ends."""

    header = (",".join(COLUMNS) + "\r\n").encode()

    def encode(self, row: CaptionRow) -> bytes:
        values = row.to_dict()
        if "options" in values:
            values["options"] = json.dumps(values["options"], ensure_ascii=False)
        line = io.StringIO(newline="")
        csv.writer(line).writerow(values.get(name, "") for name in COLUMNS)
        return line.getvalue().encode(errors="surrogateescape")  # a file name that is not UTF-8 stays as it is

    def decode(self, record: bytes) -> CaptionRow:
        text = record.decode(errors="surrogateescape")
        try:
            (cells,) = csv.reader(io.StringIO(text, newline=""), strict=True)
        except csv.Error as error:
            raise ValueError(str(error)) from None
        if len(cells) != len(COLUMNS):
            raise ValueError(f"it has {len(cells)} fields instead of {len(COLUMNS)}")
        values: dict[str, Any] = {name: cell for name, cell in zip(COLUMNS, cells, strict=True) if cell}
        for name in ("page", "tokens"):
            if name in values:
                values[name] = int(values[name])
        if "options" in values:
            values["options"] = json.loads(values["options"])
        if "error" not in values:
            values.setdefault("caption", "")
        return CaptionRow.from_dict({"prompt": "", **values})

    def records(self, file: BinaryIO) -> Iterator[tuple[bytes, bool]]:
        file.readline()
        record, is_quoted = b"", False
        for line in file:
            record += line
            is_quoted ^= line.count(b'"') % 2 == 1
            if line.endswith(b"\n") and not is_quoted:
                yield record, True
                record = b""
        if record:
            yield record, False

    def may_begin(self, record: bytes) -> bool:
        return True  # a file with our header is ours


_FORMATS: dict[str, RowFormat] = {".jsonl": JsonLines(), ".csv": CsvRows()}


def row_format(path: Path) -> RowFormat:
    """The format that a file's suffix stands for. Raises OptionError for another one."""
    try:
        return _FORMATS[path.suffix.lower()]
    except KeyError:
        raise OptionError(
            f"The output {path} has an unknown suffix: give a file that ends with .jsonl or .csv."
        ) from None
