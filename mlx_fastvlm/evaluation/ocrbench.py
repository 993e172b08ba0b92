"""OCRBench: a thousand questions about text in pictures; an answer is right if it contains a right one."""

from __future__ import annotations

from pathlib import Path

from mlx_fastvlm.evaluation.annotations import Entry, find, picture_folder, read_entries
from mlx_fastvlm.evaluation.task import AS_IT_IS, Judgments, Question, Task

_FORMULAS = "HME100k"  # the data set of handwritten formulas, where case counts and spaces do not


def contains_answer(answer: str, right: str, *, formula: bool) -> bool:
    """Whether an answer contains the right one, as Yuliang-Liu/MultimodalOCR's OCRBench/example.py compares them."""
    if formula:
        return _without_spaces(right) in _without_spaces(answer)
    return _plain(right) in _plain(answer)


def read_ocrbench(folder: Path, images: Path | None) -> list[Question]:
    """All questions. Raises OptionError."""
    entries = read_entries(find(folder, ["OCRBench.json"]))
    pictures = picture_folder(folder, images, ["OCRBench_Images"])
    return [
        Question(
            str(number),  # the file has no ids
            entry.text("question"),
            pictures / entry.text("image_path"),
            _answers(entry),
            {"type": (entry.text("type"),), "data set": (entry.text("dataset_name"),)},
        )
        for number, entry in enumerate(entries, 1)
    ]


def _answers(entry: Entry) -> tuple[str, ...]:
    """One text, or a list of them."""
    return entry.texts("answers") if entry.is_list("answers") else (entry.text("answers"),)


def _without_spaces(text: str) -> str:
    return text.strip().replace("\n", " ").replace(" ", "")


def _plain(text: str) -> str:
    return text.lower().strip().replace("\n", " ")


def _score(answer: str, question: Question) -> float:
    formula = question.groups["data set"] == (_FORMULAS,)
    return float(any(contains_answer(answer, right, formula=formula) for right in question.answers))


def _final_score(judged: Judgments) -> dict[str, int]:
    """As it is published: the number of right answers, of 1,000."""
    return {"right answers": round(sum(each.score for each in judged))}


OCRBENCH = Task(
    name="ocrbench",
    title="OCRBench",
    metric="accuracy",
    files="OCRBench/OCRBench.json, OCRBench_Images/",
    read=read_ocrbench,
    score=_score,
    template=AS_IT_IS,
    figures=_final_score,
)
