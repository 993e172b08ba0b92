"""ChartQA and its relaxed accuracy: a number within 5% of the right one is right, other answers as they stand."""

from __future__ import annotations

from pathlib import Path

from mlx_fastvlm.evaluation.annotations import find, picture_folder, read_entries
from mlx_fastvlm.evaluation.task import Question, Task

TOLERANCE = 0.05
_HALVES = {"human": "test_human.json", "augmented": "test_augmented.json"}


def is_relaxed_match(answer: str, right: str) -> bool:
    """Whether an answer is right: ChartQA's paper, section 5.1, as Pix2Struct and lmms-eval compute it.

    A percentage is its hundredth, and a right answer of zero must be met as text.
    """
    value, target = _number(answer), _number(right)
    if value is not None and target:
        return abs(value - target) / abs(target) <= TOLERANCE
    return answer.lower() == right.lower()


def read_chartqa(folder: Path, images: Path | None) -> list[Question]:
    """The test questions, those that people wrote and those that were made by a model. Raises OptionError."""
    questions = []
    for half, name in _HALVES.items():
        entries = read_entries(find(folder, [f"test/{name}", name]))
        pictures = picture_folder(folder, images, ["test/png", "png"])
        questions += [
            Question(
                f"{half}-{number}",  # the files have no ids
                entry.text("query"),
                pictures / entry.text("imgname"),
                (entry.text("label"),),
                {"half": (half,)},
            )
            for number, entry in enumerate(entries, 1)
        ]
    return questions


def _number(text: str) -> float | None:
    try:
        return float(text.removesuffix("%")) / 100 if text.endswith("%") else float(text)
    except ValueError:
        return None


def _score(answer: str, question: Question) -> float:
    return float(is_relaxed_match(answer, question.answers[0]))


CHARTQA = Task(
    name="chartqa",
    title="ChartQA test",
    metric="relaxed accuracy",
    files="ChartQA Dataset/test/ with test_human.json, test_augmented.json and png/",
    read=read_chartqa,
    score=_score,
    template="{question}\nAnswer the question with a single word.",
)
