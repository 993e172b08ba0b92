"""A run: a model answers a task's questions, into a file that a later run goes on with."""

from __future__ import annotations

import hashlib
import json
import random
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import closing
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

from mlx_fastvlm.auto_resolution import FILE_NAME as AUTO_RESOLUTION_FILE
from mlx_fastvlm.auto_resolution import AutoResolution
from mlx_fastvlm.errors import CheckpointError, OptionError
from mlx_fastvlm.evaluation.annotations import check_questions
from mlx_fastvlm.evaluation.answering import DEFAULT_BATCH_SIZE, Prompt, Reply, answer_prompts
from mlx_fastvlm.evaluation.result import Result, make_result
from mlx_fastvlm.evaluation.run_file import Row, RunFile, Settings
from mlx_fastvlm.evaluation.task import Question, Task
from mlx_fastvlm.json_file import read_json_object
from mlx_fastvlm.loading import load
from mlx_fastvlm.model import FastVLM
from mlx_fastvlm.options import GenerationOptions
from mlx_fastvlm.processor import Processor

DEFAULT_MAX_TOKENS = 128  # as LLaVA-1.5's evaluation has it

Resolution = int | str | AutoResolution  # as GenerationOptions has it
OnAnswer = Callable[[int, int, float], None]  # (answers of this run, questions it asks, mean score of all there are)

_DIGITS = 16  # of a digest


@dataclass(frozen=True)
class Selection:
    """The questions of a run.

    Attributes:
        task: that they belong to.
        data: digest of the whole set, those that were not chosen included.
        questions: those about one picture next to each other.
    """

    task: Task
    data: str
    questions: Sequence[Question]


class Subject:
    """A model to be asked, which is loaded when the first question is.

    Args:
        name: what it is called in results.
        folder: of the converted model.
        dtype: type to compute in; see `load`.
        load_model: (folder, dtype) → model and processor.
    """

    def __init__(
        self,
        name: str,
        folder: Path,
        dtype: str | None = None,
        load_model: Callable[[Path, str | None], tuple[FastVLM, Processor]] = load,
    ):
        self.name, self.dtype = name, dtype
        self._folder, self._load = folder, load_model

    @cached_property
    def loaded(self) -> tuple[FastVLM, Processor]:
        """The model and its processor."""
        return self._load(self._folder, self.dtype)

    def unload(self) -> None:
        """Give up the model; it is loaded again if it is asked once more."""
        self.__dict__.pop("loaded", None)

    @cached_property
    def weights(self) -> str:
        """A digest of its files: of their checksums in conversion.json, which says what they were when they were made, and
        of the thresholds for --resolution auto."""
        record = read_json_object(self._folder / "conversion.json", CheckpointError)
        weights = self._folder / "model.safetensors"
        try:
            size = weights.stat().st_size
        except OSError as error:
            raise CheckpointError(
                f"{weights} cannot be read ({error.strerror or error}); convert the model again."
            ) from None
        thresholds = self._folder / AUTO_RESOLUTION_FILE
        return _digest([record.get("sha256"), size, thresholds.read_text() if thresholds.exists() else None])


def select(
    task: Task, data: Path | None, images: Path | None = None, *, limit: int | None = None, shuffle: int | None = None
) -> Selection:
    """Read a task's questions and choose among them.

    Args:
        task: which.
        data: the folder with its files; None for where its package keeps them.
        images: the folder with its pictures; None for where they lie officially.
        limit: take so many at most, the first.
        shuffle: a seed for the order in which they are taken; None for the set's own.

    Raises:
        OptionError: the files are not there or damaged, with the place in them; or pictures are missing.
    """
    if limit is not None and limit < 1:
        raise OptionError(f"limit is {limit}; expected 1 or more.")
    if data is None:
        if task.home is None:
            raise OptionError(f"{task.title} needs --data: a folder with {task.files}.")
        data = task.home()
    questions = task.read(data, images)
    if not questions:
        raise OptionError(f"The files of {task.title} in {data} hold no question; get a new copy.")
    whole = _digest([[question.id, question.text, question.answers] for question in questions])
    if shuffle is not None:
        random.Random(shuffle).shuffle(questions)
    chosen = questions[:limit]
    check_questions(chosen)
    return Selection(task, whole, _by_picture(chosen))


def evaluate(
    selection: Selection,
    subject: Subject,
    out: Path,
    *,
    template: str | None = None,
    batch_size: int = DEFAULT_BATCH_SIZE,
    on_answer: OnAnswer | None = None,
    **options: Any,
) -> Result:
    """Have a model answer, and say how well it did.

    Args:
        selection: the questions.
        subject: the model.
        out: the file of answers. Those in it are not asked for again; those of other questions stay and do not count.
        template: the prompt with {question} in it; None for the task's.
        batch_size: answers that begin together; more take more memory.
        on_answer: told how far the work is.
        options: see `GenerationOptions`; all but `kv_bits`. max_tokens is DEFAULT_MAX_TOKENS where it is not given.

    Raises:
        OptionError: an option is out of range, or the file holds something else or answers of other settings.
        FastVLMError: the model cannot be loaded, a picture cannot be read, or the file cannot be written. The answers
            that are there stay.
    """
    template = selection.task.template if template is None else template
    if "{question}" not in template:
        raise OptionError("The template has no {question} in it: say where the question goes.")
    if batch_size < 1:
        raise OptionError(f"batch_size is {batch_size}; expected 1 or more.")
    given = {"max_tokens": DEFAULT_MAX_TOKENS} | {name: value for name, value in options.items() if value is not None}
    chosen = GenerationOptions(**given)
    settings = Settings(
        task=selection.task.name,
        data=selection.data,
        model=subject.name,
        weights=subject.weights,
        template=template,
        options=_plain(given if subject.dtype is None else given | {"dtype": subject.dtype}),
    )
    with RunFile(out, settings) as file:
        todo = [question for question in selection.questions if question.id not in file.rows]
        if todo:
            prompts = (_prompt(question, template, chosen) for question in todo)
            replies = answer_prompts(*subject.loaded, prompts, batch_size)
            known = [file.rows[question.id].score for question in selection.questions if question.id in file.rows]
            _write(selection.task, todo, replies, file, known, on_answer or (lambda done, total, mean: None))
        rows = [file.rows[question.id] for question in selection.questions]
    return make_result(selection.task, settings, rows)


def _plain(options: Mapping[str, Any]) -> dict[str, Any]:
    """Options as JSON knows them: what is no number or text, as thresholds for --resolution auto, as text."""
    return {name: value if isinstance(value, int | float | str) else str(value) for name, value in options.items()}


def _prompt(question: Question, template: str, options: GenerationOptions) -> Prompt:
    images = [] if question.image is None else [str(question.image)]
    return Prompt(f"Question {question.id}", template.replace("{question}", question.text), images, options)


def _write(
    task: Task,
    todo: Sequence[Question],
    replies: Iterator[Reply],
    file: RunFile,
    known: Sequence[float],
    on_answer: OnAnswer,
) -> None:
    """Judge answers and write them down as they come.

    Args:
        todo: the questions, one for each reply.
        known: scores of earlier answers, which count into the mean.
    """
    total, count = sum(known), len(known)
    on_answer(0, len(todo), total / max(count, 1))
    with closing(replies):
        for done, (question, reply) in enumerate(zip(todo, replies, strict=True), 1):
            row = _row(task, question, reply)
            file.add(row)
            total, count = total + row.score, count + 1
            on_answer(done, len(todo), total / count)


def _row(task: Task, question: Question, reply: Reply) -> Row:
    return Row(
        id=question.id,
        question=question.text,
        image=None if question.image is None else str(question.image),
        answers=question.answers,
        groups=question.groups,
        answer=reply.text,
        score=task.score(reply.text, question),
        tokens=reply.tokens,
        finish_reason=reply.finish_reason,
        timings={stage: round(seconds, 6) for stage, seconds in reply.timings.items()},
    )


def _by_picture(questions: Sequence[Question]) -> list[Question]:
    """Those about one picture together, pictures in the order in which they come up."""
    groups: dict[Path | None, list[Question]] = {}
    for question in questions:
        groups.setdefault(question.image, []).append(question)
    return [question for group in groups.values() for question in group]


def _digest(values: Any) -> str:
    return hashlib.sha256(json.dumps(values, sort_keys=True).encode()).hexdigest()[:_DIGITS]


def model_name(model: str) -> str:
    """What a model is called in results and file names: its hub id's or its folder's last part, never a path."""
    path = Path(model).expanduser()
    return path.resolve().name if path.is_dir() else path.name


def run_name(task: str, model: str, resolution: Resolution | None = None, fit: str | None = None) -> str:
    """What the file of a run is called, without suffix."""
    return "-".join(part for part in (task, model, resolution_name(resolution), fit) if part is not None)


def resolution_name(resolution: Resolution | None) -> str | None:
    """What a resolution is called in a file's name: "auto" is without its thresholds."""
    return None if resolution is None else str(resolution).partition(" ")[0]
