"""ScienceQA: questions with choices, answered by the letter of one. Those without a picture are asked without one."""

from __future__ import annotations

import re
from pathlib import Path

from mlx_fastvlm.evaluation.annotations import Entry, find, picture_folder, read_json, read_named_entries
from mlx_fastvlm.evaluation.task import Question, Task

_LETTERS = "ABCDE"
_LOWER_GRADES = {f"grade{number}" for number in range(1, 7)}
_CHOICE = re.compile(rf"([{_LETTERS}])(?:\.(?: .*)?)?", re.DOTALL)
_SENTENCE = re.compile(r"The answer is ([A-Z]).")  # as in run_gpt3.py and LLaVA's eval_science_qa.py: any character


def chosen_letter(answer: str) -> str | None:
    """The choice that an answer makes: "B", "B." or "B. Iron" as LLaVA reads them, or, once, the official
    "The answer is B."; None if it makes none."""
    choice = _CHOICE.fullmatch(answer)
    if choice:
        return choice[1]
    sentences = _SENTENCE.findall(answer)
    return sentences[0] if len(sentences) == 1 else None


def read_scienceqa(folder: Path, images: Path | None) -> list[Question]:
    """The test questions, in the order of the split. Raises OptionError."""
    problems = read_named_entries(find(folder, ["problems.json"]))
    path = find(folder, ["pid_splits.json"])
    splits = Entry(read_json(path), str(path))
    pictures: Path | None = None
    questions = []
    for name in splits.texts("test"):
        problem = problems.get(name)
        if problem is None:
            raise splits.refuse(f"problem {name} is not in problems.json.")
        picture = None
        if problem.has("image"):
            pictures = pictures or picture_folder(folder, images, ["images/test", "test"])
            picture = pictures / name / problem.text("image")
        questions.append(_question(name, problem, picture))
    return questions


def _question(name: str, problem: Entry, picture: Path | None) -> Question:
    choices, right = problem.texts("choices"), problem.number("answer")
    if len(choices) > len(_LETTERS) or not 0 <= right < len(choices):
        raise problem.refuse(f"{len(choices)} choices and the answer {right} do not go together.")
    lines = [f"Context: {problem.text('hint')}"] if problem.has("hint") else []
    lines.append(problem.text("question"))
    lines += [f"{letter}. {choice}" for letter, choice in zip(_LETTERS, choices, strict=False)]
    context = [kind for kind, name in (("text", "hint"), ("image", "image")) if problem.has(name)]
    groups = {
        "subject": (problem.text("subject"),),
        "context": tuple(context or ["none"]),
        "grade": ("1-6" if problem.text("grade") in _LOWER_GRADES else "7-12",),
    }
    return Question(name, "\n".join(lines), picture, (_LETTERS[right],), groups)


def _score(answer: str, question: Question) -> float:
    return float(chosen_letter(answer) == question.answers[0])


SCIENCEQA = Task(
    name="scienceqa",
    title="ScienceQA test",
    metric="accuracy",
    files="problems.json, pid_splits.json, images/test/",
    read=read_scienceqa,
    score=_score,
    template="{question}\nAnswer with the option's letter from the given choices directly.",
)
