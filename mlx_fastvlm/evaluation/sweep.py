"""What size and resolution cost and gain: a task asked of several models, each at several resolutions."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, nullcontext
from pathlib import Path
from typing import Any

from mlx_fastvlm.benchmarks.machine import describe_machine, machine_line
from mlx_fastvlm.benchmarks.report import format_table
from mlx_fastvlm.errors import OptionError
from mlx_fastvlm.evaluation.result import Result, interval, percent
from mlx_fastvlm.evaluation.run import OnAnswer, Resolution, Selection, Subject, evaluate, resolution_name, run_name

OnRun = Callable[[str], AbstractContextManager[OnAnswer]]  # the run's name → what is told how far it is


def sweep(
    selection: Selection,
    subjects: Sequence[Subject],
    resolutions: Sequence[Resolution | None],
    folder: Path,
    *,
    on_run: OnRun | None = None,
    **options: Any,
) -> list[Result]:
    """Evaluate every model at every resolution, one model in memory at a time.

    Args:
        selection: the questions, the same for all.
        subjects: the models.
        resolutions: see `GenerationOptions`; None for the one a model was trained on.
        folder: gets a file of answers for each run, with which a later sweep goes on.
        on_run: told of each run before it begins; yields what is told how far that is.
        options: see `evaluate`.

    Raises:
        OptionError: two models have the same name, or two resolutions are the same; or see `evaluate`.
    """
    models = [subject.name for subject in subjects]
    sizes = [resolution_name(resolution) or "as trained" for resolution in resolutions]
    for each, what in ((models, "model"), (sizes, "resolution")):
        double = next((value for value in each if each.count(value) > 1), None)
        if double is not None:
            raise OptionError(f"The {what} {double} is given twice; their answers would go into one file.")
    results = []
    for subject in subjects:
        for resolution in resolutions:
            name = run_name(selection.task.name, subject.name, resolution, options.get("fit"))
            out = folder / f"{name}.jsonl"
            with on_run(name) if on_run else nullcontext() as on_answer:
                result = evaluate(selection, subject, out, resolution=resolution, on_answer=on_answer, **options)
            results.append(result)
        subject.unload()
    return results


def to_dict(results: Sequence[Result]) -> dict[str, Any]:
    """The results as JSON has them, with the machine that this process is on."""
    return {"machine": describe_machine(), "runs": [result.to_dict() for result in results]}


def format_sweep(results: Sequence[Result]) -> str:
    """A table with a line for each run."""
    header = ["model", "resolution", results[0].metric, "95% interval", "first token, ms", "encode, ms"]
    rows = [
        [
            result.settings.model,
            resolution_text(result),
            percent(result.score.mean.value),
            interval(result.score.mean),
            *(["", ""] if result.speed is None else _milliseconds(result.speed.ttft_s, result.speed.encode_s)),
        ]
        for result in results
    ]
    title = f"{results[0].title}, {results[0].score.questions:,} questions"
    return "\n".join([machine_line(describe_machine()), "", title, "", format_table(header, rows)])


def resolution_text(result: Result) -> str:
    """The resolution of a run in words."""
    return str(result.settings.options.get("resolution", "as trained"))


def _milliseconds(*seconds: float) -> list[str]:
    return [f"{1e3 * value:,.1f}" for value in seconds]
