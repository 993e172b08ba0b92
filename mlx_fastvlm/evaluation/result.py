"""What a run comes to: the mean score with its interval, in all and by group, and what the first token took."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from statistics import mean
from typing import Any

from mlx_fastvlm.benchmarks.report import format_table
from mlx_fastvlm.evaluation.run_file import Row, Settings
from mlx_fastvlm.evaluation.task import Judged, Task
from mlx_fastvlm.evaluation.uncertainty import Estimate, estimate


@dataclass(frozen=True)
class Score:
    """Of all questions, or of a group of them.

    Attributes:
        questions: how many they are.
        mean: their mean score, 0 to 1.
        figures: the task's further figures, by name.
    """

    questions: int
    mean: Estimate
    figures: Mapping[str, float]


@dataclass(frozen=True)
class Speed:
    """What a model took for the first question about a picture, which is run alone: means, in seconds.

    Attributes:
        pictures: how many there were. The first of several is left out, as it is slow for being the first.
        encode_s: of the vision tower and the projector.
        ttft_s: from the picture's file to the decoder's logits for the first token.
    """

    pictures: int
    encode_s: float
    ttft_s: float


@dataclass(frozen=True)
class Result:
    """What a run comes to.

    Attributes:
        title, metric: of the task.
        settings: what the answers were made with.
        score: of all questions.
        groups: kind of group → group → its score.
        cut: answers that were as long as they might be.
        speed: None where no question had a picture.
    """

    title: str
    metric: str
    settings: Settings
    score: Score
    groups: Mapping[str, Mapping[str, Score]]
    cut: int
    speed: Speed | None

    def to_dict(self) -> dict[str, Any]:
        """The result as JSON has it."""
        return dataclasses.asdict(self)


def make_result(task: Task, settings: Settings, rows: Sequence[Row]) -> Result:
    """The result of one or more answers."""
    kinds = dict.fromkeys(kind for row in rows for kind in row.groups)
    return Result(
        title=task.title,
        metric=task.metric,
        settings=settings,
        score=_score(task, rows),
        groups={kind: _by_group(task, kind, rows) for kind in kinds},
        cut=sum(row.finish_reason == "length" for row in rows),
        speed=_speed(rows),
    )


def format_result(result: Result) -> str:
    """A table with a line for all and for each group, and what else there is to know."""
    score, settings = result.score, result.settings
    names = ["all", *(f"{kind}: {name}" for kind, groups in result.groups.items() for name in groups)]
    scores = [score, *(each for groups in result.groups.values() for each in groups.values())]
    header = ["", result.metric, "95% interval", "questions", *score.figures]
    rows = [[name, *_cells(each)] for name, each in zip(names, scores, strict=True)]
    lines = [f"{result.title}: {settings_line(settings)}", "", format_table(header, rows), ""]
    methods = sorted({each.mean.method for each in scores})
    lines.append(f"Interval: {' and '.join(methods)}, questions taken as independent.")
    if result.speed is not None:
        speed = result.speed
        lines.append(
            f"First token after {1e3 * speed.ttft_s:,.1f} ms, of which encoding takes {1e3 * speed.encode_s:,.1f} ms "
            f"(means over {speed.pictures:,} pictures)."
        )
    if result.cut:
        lines.append(f"{result.cut:,} answers were cut at the longest that was allowed (--max-tokens).")
    return "\n".join(lines)


def settings_line(settings: Settings) -> str:
    """The model and its options."""
    return f"{settings.model} ({', '.join(f'{name} {value}' for name, value in settings.options.items())})"


def percent(value: float) -> str:
    """A share as people read it."""
    return f"{100 * value:.2f}%"


def interval(mean: Estimate) -> str:
    """The interval of a share, in percent."""
    return f"{100 * mean.low:.2f}-{100 * mean.high:.2f}"


def _cells(score: Score) -> list[str]:
    figures = [f"{value:,}" if isinstance(value, int) else percent(value) for value in score.figures.values()]
    return [percent(score.mean.value), interval(score.mean), f"{score.questions:,}", *figures]


def _by_group(task: Task, kind: str, rows: Sequence[Row]) -> dict[str, Score]:
    """A question of several groups counts in each."""
    members: dict[str, list[Row]] = {}
    for row in rows:
        for name in row.groups.get(kind, ()):
            members.setdefault(name, []).append(row)
    return {name: _score(task, members[name]) for name in sorted(members)}


def _score(task: Task, rows: Sequence[Row]) -> Score:
    judged = [Judged(row.score, row.answers, row.groups) for row in rows]
    figures = task.figures(judged) if task.figures else {}
    return Score(len(rows), estimate([row.score for row in rows]), figures)


def _speed(rows: Iterable[Row]) -> Speed | None:
    firsts = [row.timings for row in rows if "encode" in row.timings]
    if not firsts:
        return None
    timed = firsts[1:] or firsts
    return Speed(
        pictures=len(timed),
        encode_s=mean(timings["encode"] + timings["project"] for timings in timed),
        ttft_s=mean(sum(timings.values()) for timings in timed),
    )
