"""What a run writes: a JSON object a line, first what the answers are made with, then each question's answer and score.

Each answer is written at once. Whatever ends a run leaves whole lines and at most one that is torn; when the file is
opened again that one is cut off, and the run goes on with the questions that have no line.
"""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from mlx_fastvlm.errors import FastVLMError, OptionError
from mlx_fastvlm.locked_file import append, closed_on_failure, open_locked

FORMAT = "mlx_fastvlm_eval"
FORMAT_VERSION = 1


@dataclass(frozen=True)
class Settings:
    """What answers are made with; those of other settings are not mixed.

    Attributes:
        task: its name.
        data: digest of the questions and their right answers.
        model: its name: the last part of its path, or its hub id.
        weights: digest of its files.
        template: the prompt with {question} in it.
        options: what differs from the defaults of `generate`, the type to compute in included, as JSON knows it.
    """

    task: str
    data: str
    model: str
    weights: str
    template: str
    options: Mapping[str, Any] = field(default_factory=dict)


@dataclass(frozen=True)
class Row:
    """One question's answer.

    Attributes:
        id, question, image: of the question, with its text as the set has it and the picture's path; None without one.
        answers, groups: right answers and groups of the question.
        answer: the model's.
        score: 0 to 1.
        tokens: of the answer, the one that ends it included.
        finish_reason: "stop", or "length" where the answer was cut.
        timings: see `answering.Reply`.
    """

    id: str
    question: str
    image: str | None
    answers: tuple[str, ...]
    groups: Mapping[str, tuple[str, ...]]
    answer: str
    score: float
    tokens: int
    finish_reason: str
    timings: Mapping[str, float]


class RunFile:
    """The answers of one run in a JSON Lines file, which is locked while it is open.

    Args:
        path: of the file; made if it is missing.
        settings: what answers are made with now.

    Attributes:
        rows: by question's id.

    Raises:
        OptionError: another process writes the file, it holds something else or answers of other settings, or it cannot
            be written.
    """

    def __init__(self, path: Path, settings: Settings):
        self._name = path
        self.rows: dict[str, Row] = {}
        self._file = open_locked(path)
        with closed_on_failure(self.close, self._failure):
            self._resume(settings)

    def add(self, row: Row) -> None:
        """Append an answer; it is in the file when this returns. Raises FastVLMError if it cannot be written."""
        try:
            append(self._file, _line(dataclasses.asdict(row)))
        except OSError as error:
            raise self._failure(error) from None
        self.rows[row.id] = row

    def close(self) -> None:
        """Let others write the file."""
        self._file.close()

    def __enter__(self) -> RunFile:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def _resume(self, settings: Settings) -> None:
        """Learn what is answered, and cut off what is torn."""
        self._file.seek(0)
        content = self._file.read()
        whole = content[: content.rfind(b"\n") + 1]
        header = _header(settings)
        if not whole and header.startswith(content):  # new, or torn within its first line
            self._file.truncate(0)
            append(self._file, header)
            return
        made_with, self.rows = _parse(whole, self._name)
        if made_with != settings:
            raise OptionError(
                f"{self._name} holds answers made with {_difference(made_with, settings)}: use the same, or give another "
                "--out."
            )
        self._file.truncate(len(whole))

    def _failure(self, error: OSError) -> FastVLMError:
        return FastVLMError(
            f"{self._name} cannot be written ({error.strerror or error}). The answers in it are kept: mend that and run "
            "the same command again."
        )


def read_run(path: Path) -> tuple[Settings, dict[str, Row]]:
    """A run's settings, and its answers by question's id; a last line that is torn is left out.

    Raises:
        OptionError: the file cannot be read or holds something else.
    """
    try:
        content = path.read_bytes()
    except OSError as error:
        raise OptionError(f"{path} cannot be read ({error.strerror or error}).") from None
    return _parse(content[: content.rfind(b"\n") + 1], path)


def _parse(content: bytes, name: Path) -> tuple[Settings, dict[str, Row]]:
    """The lines of a run's file; raises OptionError at the first that is none."""
    lines = _objects(content, name)
    try:
        header = next(lines)[1]
        if header.pop(FORMAT, None) != FORMAT_VERSION:
            raise ValueError
        settings = Settings(**header)
    except (StopIteration, TypeError, ValueError):
        raise OptionError(f"{name} is not the file of an evaluation; give another.") from None
    rows = {}
    for number, values in lines:
        try:
            row = _row(values)
        except (KeyError, TypeError, AttributeError):
            raise OptionError(f"{name}, line {number} is not an answer of an evaluation; take it out.") from None
        rows[row.id] = row
    return settings, rows


def _objects(content: bytes, name: Path) -> Iterator[tuple[int, dict[str, Any]]]:
    for number, line in enumerate(content.splitlines(), 1):
        try:
            values = json.loads(line)
        except (ValueError, RecursionError):
            values = None
        if not isinstance(values, dict):
            raise OptionError(f"{name}, line {number} is no JSON object; take it out, or give another file.")
        yield number, values


def _row(values: dict[str, Any]) -> Row:
    groups = {kind: tuple(names) for kind, names in values.pop("groups").items()}
    row = Row(**{**values, "answers": tuple(values["answers"]), "groups": groups})
    if not isinstance(row.id, str) or not isinstance(row.score, int | float) or not isinstance(row.timings, dict):
        raise TypeError
    return row


def _header(settings: Settings) -> bytes:
    return _line({FORMAT: FORMAT_VERSION, **dataclasses.asdict(settings)})


def _line(values: dict[str, Any]) -> bytes:
    """ASCII, which holds a name that is not UTF-8 too."""
    return (json.dumps(values) + "\n").encode()


def _difference(made: Settings, wanted: Settings) -> str:
    """The first thing that is not the same, as people name it."""
    if made.task != wanted.task:
        return f"the task {made.task}"
    if made.data != wanted.data:
        return "other questions or other right answers"
    if made.model != wanted.model:
        return f"the model {made.model}"
    if made.weights != wanted.weights:
        return f"other weights of {made.model}"
    if made.template != wanted.template:
        return f"the template {json.dumps(made.template, ensure_ascii=False)}"
    given = " ".join(f"--{name.replace('_', '-')} {value}" for name, value in made.options.items())
    return given or "the default options"
