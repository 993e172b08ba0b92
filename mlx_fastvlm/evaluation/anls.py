"""ANLS, the measure of DocVQA and InfographicVQA, and these two sets.

Average normalized Levenshtein similarity: 1 less the edit distance to the nearest right answer over the longer one's
length, without regard to case; below 1/2 it counts as 0. Just 1/2 counts, as in the challenge's own script, though by the
paper's formula (arXiv 1905.13648) it would not.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from mlx_fastvlm.evaluation.annotations import Entry, find, picture_folder, read_entries
from mlx_fastvlm.evaluation.task import Question, Task

THRESHOLD = 0.5


def anls(answer: str, right: Sequence[str]) -> float:
    """The similarity, 0 or from THRESHOLD to 1, of an answer to the nearest of the right ones."""
    best = max(_similarity(answer, each) for each in right)
    return best if best >= THRESHOLD else 0.0


def edit_distance(first: str, second: str) -> int:
    """Levenshtein distance: characters put in, taken out or changed to make one of the other."""
    row = list(range(len(second) + 1))
    for number, character in enumerate(first, 1):
        diagonal, row[0] = row[0], number
        for column, other in enumerate(second, 1):
            cheapest = min(row[column] + 1, row[column - 1] + 1, diagonal + (character != other))
            diagonal, row[column] = row[column], cheapest
    return row[-1]


def read_docvqa(folder: Path, images: Path | None) -> list[Question]:
    """DocVQA's validation questions. Raises OptionError."""
    entries = read_entries(find(folder, ["val_v1.0_withQT.json", "val_v1.0.json"]), "data")
    pictures = picture_folder(folder, images, ["spdocvqa_images", "documents"])
    return [
        # The file says documents/NAME, whatever the folder is called.
        _question(entry, pictures / Path(entry.text("image")).name, {"question type": "question_types"})
        for entry in entries
    ]


def read_infovqa(folder: Path, images: Path | None) -> list[Question]:
    """InfographicVQA's validation questions. Raises OptionError."""
    names = ["infographicsVQA_val_v1.0_withQT.json", "infographicsVQA_val_v1.0.json"]
    pictures = picture_folder(folder, images, ["infographicsvqa_images"])
    return [
        _question(
            entry,
            pictures / entry.text("image_local_name"),
            {"answer type": "answer_type", "operation": "operation/reasoning"},
        )
        for entry in read_entries(find(folder, names), "data")
    ]


def _question(entry: Entry, picture: Path, groups: dict[str, str]) -> Question:
    return Question(
        entry.text("questionId"),
        entry.text("question"),
        picture,
        entry.texts("answers"),
        {kind: entry.texts(name) for kind, name in groups.items() if entry.has(name)},
    )


def _similarity(answer: str, right: str) -> float:
    """1 less the distance over the length, which is that of the texts as given and in capitals, as the official scorer's."""
    length = max(len(answer.upper()), len(right.upper()))
    return 1 - edit_distance(_plain(answer), _plain(right)) / length if length else 1.0


def _plain(text: str) -> str:
    return " ".join(text.lower().split())


def _score(answer: str, question: Question) -> float:
    return anls(answer, question.answers)


DOCVQA = Task(
    name="docvqa",
    title="DocVQA (single page) validation",
    metric="ANLS",
    files="spdocvqa_qas/val_v1.0_withQT.json, spdocvqa_images/",
    read=read_docvqa,
    score=_score,
)
INFOVQA = Task(
    name="infovqa",
    title="InfographicVQA validation",
    metric="ANLS",
    files="infographicsvqa_qas/infographicsVQA_val_v1.0_withQT.json, infographicsvqa_images/",
    read=read_infovqa,
    score=_score,
)
