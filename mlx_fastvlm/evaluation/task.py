"""What an evaluation is made of: questions, and the task that they belong to."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

SHORT_ANSWER = "{question}\nAnswer the question using a single word or phrase."  # as LLaVA-1.5 asks
AS_IT_IS = "{question}"


@dataclass(frozen=True)
class Question:
    """One question of a set.

    Attributes:
        id: as the set names it; no other question has it.
        text: the question.
        image: the picture it is about; None where there is none.
        answers: the right ones, in the form that the task's score takes.
        groups: kind of group → the question's groups of that kind, for results by group.
    """

    id: str
    text: str
    image: Path | None
    answers: tuple[str, ...]
    groups: Mapping[str, tuple[str, ...]] = field(default_factory=dict)


@dataclass(frozen=True)
class Judged:
    """How a question was answered.

    Attributes:
        score: from 0 to 1.
        answers, groups: of the question.
    """

    score: float
    answers: Sequence[str]
    groups: Mapping[str, Sequence[str]]


Judgments = Sequence[Judged]


@dataclass(frozen=True)
class Task:
    """A benchmark.

    Attributes:
        name: what the command line calls it.
        title: its own name, with the split.
        metric: what the mean score is called.
        files: what its folder holds, for people.
        read: (folder, folder of pictures or None for where they lie officially) → questions, in the set's order. Raises
            OptionError, see `annotations`.
        score: (answer, question) → 0 to 1.
        template: the prompt, with {question} in it.
        home: the folder to read where none is given; None if one must be.
        figures: further figures of the whole run, or of a group, by name.
    """

    name: str
    title: str
    metric: str
    files: str
    read: Callable[[Path, Path | None], list[Question]]
    score: Callable[[str, Question], float]
    template: str = SHORT_ANSWER
    home: Callable[[], Path] | None = None
    figures: Callable[[Judgments], dict[str, float]] | None = None
