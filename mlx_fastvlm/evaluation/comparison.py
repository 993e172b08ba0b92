"""Whether one run did better than another by more than chance, from their answers to the same questions."""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from mlx_fastvlm.benchmarks.report import format_table
from mlx_fastvlm.errors import OptionError
from mlx_fastvlm.evaluation.result import interval, percent, settings_line
from mlx_fastvlm.evaluation.run_file import Settings, read_run
from mlx_fastvlm.evaluation.tasks import find_task
from mlx_fastvlm.evaluation.uncertainty import Estimate, bootstrap, estimate, is_binary, mcnemar, sign_flips

_SURE = 0.05  # below it a difference is called one


@dataclass(frozen=True)
class Comparison:
    """Two runs over the questions that both have answered.

    Attributes:
        title, metric: of the task.
        settings: what the answers of each were made with.
        scores: mean score of each.
        questions: that both have answered.
        left_out: that only one has.
        difference: the second's mean score less the first's.
        better, worse: questions that the second answered better, or worse.
        p_value: how likely so large a difference is if there is none.
        test: by which that was found.
    """

    title: str
    metric: str
    settings: tuple[Settings, Settings]
    scores: tuple[Estimate, Estimate]
    questions: int
    left_out: int
    difference: Estimate
    better: int
    worse: int
    p_value: float
    test: str

    def to_dict(self) -> dict[str, Any]:
        """The comparison as JSON has it."""
        return dataclasses.asdict(self)


def compare_runs(first: Path, second: Path) -> Comparison:
    """Compare the files of two runs of one task.

    Raises:
        OptionError: one is not the file of a run, they are about different questions, or no question is in both.
    """
    (first_settings, first_rows), (second_settings, second_rows) = read_run(first), read_run(second)
    task = find_task(first_settings.task)
    if (first_settings.task, first_settings.data) != (second_settings.task, second_settings.data):
        raise OptionError(
            f"{first} has answers about {first_settings.task} and {second} about {second_settings.task}, or about "
            "different releases of it; only answers to the same questions can be compared."
        )
    shared = [name for name in first_rows if name in second_rows]
    if not shared:
        raise OptionError(f"{first} and {second} have no question in common; run both with the same --limit.")
    scores = [[rows[name].score for name in shared] for rows in (first_rows, second_rows)]
    differences = [after - before for before, after in zip(*scores, strict=True)]
    better, worse = sum(value > 0 for value in differences), sum(value < 0 for value in differences)
    if is_binary(scores[0] + scores[1]):
        p_value, test = mcnemar(worse, better), "McNemar's test, exact"
    else:
        p_value, test = sign_flips(differences), "paired permutation test"
    return Comparison(
        title=task.title,
        metric=task.metric,
        settings=(first_settings, second_settings),
        scores=(estimate(scores[0]), estimate(scores[1])),
        questions=len(shared),
        left_out=len(first_rows.keys() ^ second_rows.keys()),
        difference=bootstrap(differences),
        better=better,
        worse=worse,
        p_value=p_value,
        test=test,
    )


def format_comparison(found: Comparison) -> str:
    """A table of both, the difference and what to make of it."""
    rows = [
        [settings_line(settings), percent(score.value), interval(score)]
        for settings, score in zip(found.settings, found.scores, strict=True)
    ]
    rows.append(["difference", percent(found.difference.value), interval(found.difference)])
    left_out = f"; {found.left_out:,} that only one has are left out" if found.left_out else ""
    verdict = "more than chance explains" if found.p_value < _SURE else "no more than chance may explain"
    return "\n".join(
        [
            f"{found.title}, {found.questions:,} questions{left_out}",
            "",
            format_table(["", found.metric, "95% interval"], rows),
            "",
            f"The second does better at {found.better:,} questions and worse at {found.worse:,}: {verdict} "
            f"(p = {found.p_value:.2g}, {found.test}).",
        ]
    )
