"""`mlx-fastvlm eval TASK`, `eval compare` and `eval sweep`: how well models answer a benchmark's questions."""

from __future__ import annotations

import json
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from mlx_fastvlm.cli.options import ComputeDType, FitOption, ResolutionOption, System, resolution_of
from mlx_fastvlm.cli.terminal import Revision, counting, load_model, progress, say
from mlx_fastvlm.errors import OptionError
from mlx_fastvlm.evaluation.tasks import TASKS, find_task
from mlx_fastvlm.loading import DEFAULT_MODEL

if TYPE_CHECKING:
    from mlx_fastvlm.evaluation.run import OnAnswer, Selection, Subject

evaluation = typer.Typer(
    name="eval",
    help="Evaluate: benchmarks' questions, with their own measures, from their official files.",
    epilog="Each task says which files it needs: mlx-fastvlm eval textvqa --help",
    rich_markup_mode=None,
    invoke_without_command=True,
)

Data = Annotated[
    Path | None,
    typer.Option(
        metavar="FOLDER", help="The set's files, as they are downloaded.", show_default="only easy-vqa has its own"
    ),
]
Images = Annotated[
    Path | None, typer.Option(metavar="FOLDER", help="Its pictures.", show_default="where they lie in --data")
]
Limit = Annotated[int | None, typer.Option(min=1, help="Ask only so many questions, the first.", show_default="all")]
Shuffle = Annotated[
    int | None,
    typer.Option(metavar="SEED", help="Take the questions in an order drawn with this seed.", show_default="the set's"),
]
Template = Annotated[
    str | None,
    typer.Option(help=r"The prompt, with {question} in it; \n stands for a line end.", show_default="the task's"),
]
MaxTokens = Annotated[int | None, typer.Option(min=1, help="Longest answer, in tokens.", show_default="128")]
BatchSize = Annotated[int, typer.Option(min=1, help="Answers begun at once: more is faster and takes more memory.")]
JsonFile = Annotated[
    Path | None, typer.Option("--json", metavar="FILE", help="Also write the result as JSON.", show_default=False)
]


@evaluation.callback()
def _group(context: typer.Context) -> None:
    if context.invoked_subcommand is None:
        say(context.get_help())


# What its help says is each task's own, see the end of this file.
def _evaluate(
    context: typer.Context,
    model: Annotated[str, typer.Argument(help='Hub id, model folder, or "demo".')] = DEFAULT_MODEL,
    data: Data = None,
    images: Images = None,
    out: Annotated[
        Path | None,
        typer.Option(
            "--out",
            "-o",
            metavar="FILE",
            help="Answers, a JSON object a line; a later run goes on with them.",
            show_default="TASK-MODEL.jsonl here",
        ),
    ] = None,
    limit: Limit = None,
    shuffle: Shuffle = None,
    resolution: ResolutionOption = None,
    fit: FitOption = None,
    template: Template = None,
    system: System = None,
    max_tokens: MaxTokens = None,
    batch_size: BatchSize = 16,
    dtype: ComputeDType = None,
    revision: Revision = None,
    json_file: JsonFile = None,
) -> None:
    from mlx_fastvlm.evaluation.result import format_result
    from mlx_fastvlm.evaluation.run import evaluate, run_name

    _check_json(json_file)
    selection = _select(context.info_name, data, images, limit, shuffle)
    (subject,) = _subjects([model], dtype and dtype.value, revision)
    fit_name = fit and fit.value
    out = out or Path(f"{run_name(context.info_name, subject.name, resolution, fit_name)}.jsonl")
    with _going_on(out), _bar() as on_answer:
        result = evaluate(
            selection,
            subject,
            out,
            template=_unescaped(template),
            batch_size=batch_size,
            on_answer=on_answer,
            resolution=resolution,
            fit=fit_name,
            system=system,
            max_tokens=max_tokens,
        )
    say(f"{format_result(result)}\nAnswers: {out}")
    _write_json(json_file, result.to_dict())


def compare(
    first: Annotated[Path, typer.Argument(help="File of a run.")],
    second: Annotated[Path, typer.Argument(help="File of another run of the same task.")],
    json_file: JsonFile = None,
) -> None:
    """Compare two runs of a task, question by question: is the difference more than chance?"""
    from mlx_fastvlm.evaluation.comparison import compare_runs, format_comparison

    _check_json(json_file)
    found = compare_runs(first, second)
    say(format_comparison(found))
    _write_json(json_file, found.to_dict())


def sweep(
    task: Annotated[str, typer.Argument(help=f"One of {', '.join(TASKS)}.")],
    models: Annotated[list[str], typer.Argument(help='Hub ids, model folders, or "demo".')],
    resolutions: Annotated[
        str | None,
        typer.Option(
            metavar="N,N,…", help="Resolutions in pixels, or auto, separated by commas.", show_default="as trained"
        ),
    ] = None,
    data: Data = None,
    images: Images = None,
    out: Annotated[
        Path, typer.Option("--out", "-o", metavar="FOLDER", help="Gets each run's answers; made if it is missing.")
    ] = Path("sweep"),
    plot: Annotated[
        Path | None, typer.Option(metavar="FILE", help="Draw score against TTFT as a PNG.", show_default=False)
    ] = None,
    limit: Limit = None,
    shuffle: Shuffle = None,
    fit: FitOption = None,
    template: Template = None,
    system: System = None,
    max_tokens: MaxTokens = None,
    batch_size: BatchSize = 16,
    dtype: ComputeDType = None,
    json_file: JsonFile = None,
) -> None:
    """Evaluate several models, each at several resolutions: what do size and resolution cost and gain?

    \b
    mlx-fastvlm eval sweep docvqa ./fastvlm-0.5b ./fastvlm-0.5b-int8 --data ./docvqa --resolutions 512,768,1024 \\
      --plot docvqa.png
    """
    from mlx_fastvlm.evaluation.plot import plot_sweep
    from mlx_fastvlm.evaluation.sweep import format_sweep, to_dict
    from mlx_fastvlm.evaluation.sweep import sweep as run_sweep
    from mlx_fastvlm.fidelity.plot import check_plot

    _check_json(json_file)
    if plot is not None:
        check_plot(plot)
    chosen = _resolutions(resolutions)
    selection = _select(task, data, images, limit, shuffle)
    subjects = _subjects(models, dtype and dtype.value, None)
    try:
        out.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise OptionError(f"{out} cannot be made ({error.strerror or error}); give another --out.") from None
    with _going_on(out):
        results = run_sweep(
            selection,
            subjects,
            chosen,
            out,
            on_run=_bar,
            template=_unescaped(template),
            batch_size=batch_size,
            fit=fit and fit.value,
            system=system,
            max_tokens=max_tokens,
        )
    say(format_sweep(results))
    _write_json(json_file, to_dict(results))
    if plot is not None:
        plot_sweep(results, plot)


def _select(task: str, data: Path | None, images: Path | None, limit: int | None, shuffle: int | None) -> Selection:
    from mlx_fastvlm.evaluation.run import select
    from mlx_fastvlm.loading import as_path

    folders = (None if folder is None else as_path(folder) for folder in (data, images))
    return select(find_task(task), *folders, limit=limit, shuffle=shuffle)


def _subjects(models: list[str], dtype: str | None, revision: str | None) -> list[Subject]:
    """The models, found but not loaded. Raises FastVLMError for the first that cannot be found."""
    from mlx_fastvlm.evaluation.run import Subject, model_name
    from mlx_fastvlm.loading import resolve_model

    subjects = []
    for model in models:
        with progress() as on_progress:
            folder = resolve_model(model, revision, on_progress)
        subjects.append(Subject(model_name(model), folder, dtype, _load))
    return subjects


def _load(folder: Path, dtype: str | None) -> tuple[Any, Any]:
    from mlx_fastvlm.cli.terminal import DType

    return load_model(str(folder), dtype and DType(dtype), None)


def _resolutions(given: str | None) -> list[Any]:
    return [None] if given is None else [resolution_of(each.strip()) for each in given.split(",")]


def _unescaped(template: str | None) -> str | None:
    return None if template is None else template.replace("\\n", "\n")


@contextmanager
def _bar(name: str | None = None) -> Iterator[OnAnswer]:
    """A bar with the mean score so far, from the first answer on."""
    with ExitStack() as stack:
        report = None

        def on_answer(done: int, total: int, mean: float) -> None:
            nonlocal report
            if report is None:
                report = stack.enter_context(counting(total, "questions"))
            score = f"mean score {mean:.2%}" if done else ""
            report(done, note=", ".join(filter(None, [score, name])))

        yield on_answer


@contextmanager
def _going_on(out: Path) -> Iterator[None]:
    """Say what Ctrl-C leaves."""
    try:
        yield
    except KeyboardInterrupt:
        typer.echo(f"\nThe answers so far are in {out}; the same command goes on from there.", err=True)
        raise


def _check_json(path: Path | None) -> None:
    if path is not None:
        from mlx_fastvlm.fidelity.output import check_writable

        check_writable(path)


def _write_json(path: Path | None, value: dict[str, Any]) -> None:
    if path is not None:
        from mlx_fastvlm.fidelity.output import write_output

        write_output(path, (json.dumps(value, indent=2) + "\n").encode())


for _task in TASKS.values():
    evaluation.command(_task.name, help=f"{_task.title}: {_task.metric}.\n\nFiles: {_task.files}.")(_evaluate)
evaluation.command()(compare)
evaluation.command()(sweep)
