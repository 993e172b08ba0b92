"""Sets whose answers are right only as they stand: GQA and easy-VQA."""

from __future__ import annotations

from importlib.util import find_spec
from pathlib import Path

from mlx_fastvlm.errors import OptionError
from mlx_fastvlm.evaluation.annotations import find, picture_folder, read_json, read_named_entries
from mlx_fastvlm.evaluation.task import AS_IT_IS, Question, Task

_SHAPES = {"circle", "rectangle", "triangle"}


def read_gqa(folder: Path, images: Path | None) -> list[Question]:
    """GQA's balanced test-dev questions. Raises OptionError."""
    entries = read_named_entries(find(folder, ["testdev_balanced_questions.json"]))
    pictures = picture_folder(folder, images, ["images"])
    return [
        Question(
            name,
            entry.text("question"),
            pictures / f"{entry.text('imageId')}.jpg",
            (entry.text("answer"),),
            {kind: (entry.entry("types").text(kind),) for kind in ("structural", "semantic")},
        )
        for name, entry in entries.items()
    ]


def read_easy_vqa(folder: Path, images: Path | None) -> list[Question]:
    """easy-VQA's test questions. Raises OptionError."""
    path = find(folder, ["test/questions.json"])
    pictures = picture_folder(folder, images, ["test/images"])
    rows = read_json(path)
    if not isinstance(rows, list):
        raise OptionError(f"{path} holds no list of questions.")
    questions = []
    for number, row in enumerate(rows, 1):
        if not isinstance(row, list) or [type(value) for value in row] != [str, str, int]:
            raise OptionError(f"{path}, entry {number}: expected a question, its answer and the number of its picture.")
        text, answer, picture = row
        groups = {"answer": (_kind_of(answer),)}
        questions.append(Question(str(number), text, pictures / f"{picture}.png", (answer,), groups))
    return questions


def easy_vqa_home() -> Path:
    """The data in the package easy-vqa. Raises OptionError if that is not installed."""
    package = find_spec("easy_vqa")
    if package is None:
        raise OptionError("easy-VQA is not installed: run `pip install easy-vqa`, or give its data folder with --data.")
    return Path(package.submodule_search_locations[0], "data")


def _kind_of(answer: str) -> str:
    return "yes or no" if answer in ("yes", "no") else "shape" if answer in _SHAPES else "color"


def _score_gqa(answer: str, question: Question) -> float:
    """LLaVA's conversion for GQA's own scorer takes the answer without a final period and in small letters."""
    return float(answer.rstrip(".").lower() == question.answers[0])


def _score_easy_vqa(answer: str, question: Question) -> float:
    return float(answer == question.answers[0])


GQA = Task(
    name="gqa",
    title="GQA balanced test-dev",
    metric="accuracy",
    files="testdev_balanced_questions.json, images/",
    read=read_gqa,
    score=_score_gqa,
)
EASY_VQA = Task(
    name="easy-vqa",
    title="easy-VQA test",
    metric="exact match",
    files="the folder data/ of the package easy-vqa, which is taken where it is installed",
    read=read_easy_vqa,
    score=_score_easy_vqa,
    template=AS_IT_IS,
    home=easy_vqa_home,
)
