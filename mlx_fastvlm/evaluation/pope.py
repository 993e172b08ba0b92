"""POPE: whether a model sees things that are not there, by questions to be answered with yes or no."""

from __future__ import annotations

from pathlib import Path

from mlx_fastvlm.evaluation.annotations import find, picture_folder, read_lines
from mlx_fastvlm.evaluation.task import Judgments, Question, Task

_SAMPLINGS = ("random", "popular", "adversarial")  # how the things were chosen that are not there
_NO = {"No", "not", "no"}


def is_yes(answer: str) -> bool:
    """An answer is "yes" unless its first sentence says no, as AoiDragon/POPE's evaluate.py takes it."""
    sentence = answer.partition(".")[0].replace(",", "")
    return _NO.isdisjoint(sentence.split(" "))


def read_pope(folder: Path, images: Path | None) -> list[Question]:
    """The questions of all three samplings. Raises OptionError."""
    pictures = picture_folder(folder, images, ["val2014"])
    questions = []
    for sampling in _SAMPLINGS:
        for entry in read_lines(find(folder, [f"coco_pope_{sampling}.json", f"coco/coco_pope_{sampling}.json"])):
            label = entry.text("label")
            if label not in ("yes", "no"):
                raise entry.refuse(f'"label" is "{label}"; expected "yes" or "no".')
            questions.append(
                Question(
                    f"{sampling}-{entry.text('question_id')}",
                    entry.text("text"),
                    pictures / entry.text("image"),
                    (label,),
                    {"sampling": (sampling,)},
                )
            )
    return questions


def _score(answer: str, question: Question) -> float:
    return float(is_yes(answer) == (question.answers[0] == "yes"))


def _figures(judged: Judgments) -> dict[str, float]:
    """Precision, recall and F1 of "yes", and how often it was said; 0 where there is nothing to divide by."""
    right_yes = sum(each.score for each in judged if each.answers[0] == "yes")
    yes = sum(each.answers[0] == "yes" for each in judged)
    said_yes = right_yes + sum(1 - each.score for each in judged if each.answers[0] == "no")
    precision, recall = (right_yes / count if count else 0.0 for count in (said_yes, yes))
    f1 = 2 * precision * recall / (precision + recall) if right_yes else 0.0
    return {"precision": precision, "recall": recall, "F1": f1, "yes ratio": said_yes / len(judged)}


POPE = Task(
    name="pope",
    title="POPE on COCO",
    metric="accuracy",
    files="coco_pope_random.json, coco_pope_popular.json, coco_pope_adversarial.json, val2014/",
    read=read_pope,
    score=_score,
    figures=_figures,
)
