"""Reading a set's files: where they lie, what is in them, and what is wrong with them in one line that says where.

What the fields mean is each set's own matter.
"""

from __future__ import annotations

import json
import os
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from mlx_fastvlm.errors import OptionError
from mlx_fastvlm.evaluation.task import Question

_NAMED = 3  # missing pictures that the message names


class Entry:
    """One entry of an annotation file, whose fields are checked as they are taken.

    Args:
        values: the entry; anything that JSON knows.
        place: where it stands, for messages.
    """

    def __init__(self, values: Any, place: str):
        if not isinstance(values, Mapping):
            raise OptionError(f"{place}: a JSON object is expected, not {_shown(values)}.")
        self._values, self._place = values, place

    def text(self, name: str) -> str:
        """A field that is text, or a whole number as some releases write theirs. Raises OptionError."""
        value = self._field(name)
        if isinstance(value, bool) or not isinstance(value, str | int):
            raise self._wrong(name, value, "text")
        return str(value)

    def number(self, name: str) -> int:
        """A field that is a whole number. Raises OptionError."""
        value = self._field(name)
        if isinstance(value, bool) or not isinstance(value, int):
            raise self._wrong(name, value, "a whole number")
        return value

    def texts(self, name: str, count: int | None = None) -> tuple[str, ...]:
        """A field that is a list of texts, one or more; of just `count` where that is given. Raises OptionError."""
        value = self._field(name)
        expected = f"a list of {count or 'one or more'} texts"
        if not isinstance(value, list) or not value or (count and len(value) != count):
            raise self._wrong(name, value, expected)
        if not all(isinstance(item, str) for item in value):
            raise self._wrong(name, value, expected)
        return tuple(value)

    def entries(self, name: str) -> list[Entry]:
        """A field that is a list of entries. Raises OptionError."""
        value = self._field(name)
        if not isinstance(value, list) or not value:
            raise self._wrong(name, value, "a list of one or more entries")
        return [Entry(item, f"{self._place}, {name}, entry {number}") for number, item in enumerate(value, 1)]

    def entry(self, name: str) -> Entry:
        """A field that is an entry itself. Raises OptionError."""
        return Entry(self._field(name), f"{self._place}, {name}")

    def has(self, name: str) -> bool:
        """Whether the field is there and holds something."""
        return bool(self._values.get(name))

    def is_list(self, name: str) -> bool:
        """Whether the field is there and is a list."""
        return isinstance(self._values.get(name), list)

    def refuse(self, why: str) -> OptionError:
        """An error that says where the entry stands."""
        return OptionError(f"{self._place}: {why}")

    def _field(self, name: str) -> Any:
        if name not in self._values:
            raise self.refuse(f'"{name}" is missing.')
        return self._values[name]

    def _wrong(self, name: str, value: Any, expected: str) -> OptionError:
        return self.refuse(f'"{name}" is {_shown(value)}; expected {expected}.')


def read_json(path: Path) -> Any:
    """What a JSON file holds. Raises OptionError, with the line and column of what is no JSON."""
    try:
        return json.loads(path.read_bytes())
    except OSError as error:
        raise OptionError(f"{path} cannot be read ({error.strerror or error}).") from None
    except json.JSONDecodeError as error:
        raise OptionError(f"{path}, line {error.lineno}, column {error.colno}: {error.msg}.") from None
    except (ValueError, RecursionError) as error:
        raise OptionError(f"{path} is no JSON ({error}).") from None


def read_entries(path: Path, field: str | None = None) -> list[Entry]:
    """The entries of a JSON file: it is a list of them, or an object with the list in `field`. Raises OptionError."""
    content = read_json(path)
    if field is not None:
        content = Entry(content, str(path))._field(field)
    if not isinstance(content, list) or not content:
        where = f'"{field}" of {path}' if field else str(path)
        raise OptionError(f"{where} is {_shown(content)}; expected a list of one or more entries.")
    return [Entry(values, f"{path}, entry {number}") for number, values in enumerate(content, 1)]


def read_named_entries(path: Path) -> dict[str, Entry]:
    """The entries of a JSON file that is an object with an entry for each name. Raises OptionError."""
    content = read_json(path)
    if not isinstance(content, dict) or not content:
        raise OptionError(f"{path} is {_shown(content)}; expected a JSON object with one or more entries.")
    return {name: Entry(values, f'{path}, entry "{name}"') for name, values in content.items()}


def read_lines(path: Path) -> Iterator[Entry]:
    """The entries of a file with a JSON object on each line; empty lines are none. Raises OptionError at a bad line, or if
    there is none."""
    try:
        lines = path.read_bytes().splitlines()
    except OSError as error:
        raise OptionError(f"{path} cannot be read ({error.strerror or error}).") from None
    if not any(line.strip() for line in lines):
        raise OptionError(f"{path} is empty; a JSON object on each line is expected. Get a new copy.")
    for number, line in enumerate(lines, 1):
        if not line.strip():
            continue
        try:
            values = json.loads(line)
        except json.JSONDecodeError as error:
            raise OptionError(f"{path}, line {number}, column {error.colno}: {error.msg}.") from None
        except (ValueError, RecursionError) as error:
            raise OptionError(f"{path}, line {number} is no JSON ({error}).") from None
        yield Entry(values, f"{path}, line {number}")


def find(folder: Path, names: Sequence[str]) -> Path:
    """The first of these, files or folders, that lies in `folder` or one folder below it. Raises OptionError if none does."""
    if not folder.is_dir():
        raise OptionError(f"There is no folder {folder}: give the one that holds the set's files with --data.")
    for name in names:
        if (folder / name).exists():
            return folder / name
        below = next(iter(sorted(folder.glob(f"*/{name}"))), None)
        if below is not None:
            return below
    raise OptionError(f"{folder} has no {' or '.join(names)}, nor has a folder in it: see docs/evaluation.md.")


def picture_folder(folder: Path, images: Path | None, names: Sequence[str]) -> Path:
    """Where a set's pictures lie: `images`, or the first of `names` that is there. Raises OptionError if none is."""
    if images is None:
        return find(folder, names)
    if not images.is_dir():
        raise OptionError(f"There is no folder {images}: give the one that holds the pictures with --images.")
    return images


def check_questions(questions: Sequence[Question]) -> None:
    """Whether they can be asked. Raises OptionError if two have the same id, or pictures are missing."""
    seen: set[str] = set()
    for question in questions:
        if question.id in seen:
            raise OptionError(f"The set has two questions with the id {question.id}; each must have its own.")
        seen.add(question.id)
    missing = [path for path in _pictures(questions) if not os.path.isfile(path)]  # unlike Path's it never raises
    if missing:
        named = ", ".join(map(str, missing[:_NAMED])) + (", …" if len(missing) > _NAMED else "")
        raise OptionError(
            f"{len(missing)} of {len(_pictures(questions))} pictures are missing: {named}. Finish the download, or say "
            "where they lie with --images."
        )


def _pictures(questions: Iterable[Question]) -> dict[Path, None]:
    return {question.image: None for question in questions if question.image is not None}


def _shown(value: Any) -> str:
    text = json.dumps(value, ensure_ascii=False)
    return text if len(text) <= 60 else f"{text[:57]}…"
