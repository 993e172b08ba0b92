"""What every command shares: printing, progress, the model's options, and loading with advice."""

from __future__ import annotations

import os
import re
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from enum import Enum
from typing import TYPE_CHECKING, Annotated

import typer

from mlx_fastvlm.kernels import cpu
from mlx_fastvlm.loading import OnProgress

if TYPE_CHECKING:
    import mlx.core as mx

    from mlx_fastvlm.model import FastVLM
    from mlx_fastvlm.processor import Processor

_CONTROLS = re.compile(r"[\x00-\x1f\x7f-\x9f]")
_FEWEST_BYTES = 100_000  # a total below it counts steps: no model is that small


class DType(str, Enum):
    float16 = "float16"
    bfloat16 = "bfloat16"
    float32 = "float32"


Model = Annotated[
    str,
    typer.Option(
        "--model", "-m", help='Hub id, model folder, or "demo" (built in, knows only simple shapes and words).'
    ),
]
Revision = Annotated[str | None, typer.Option(help="Branch, tag or commit of a hub id.", show_default="main")]


def say(text: str, end: str = "\n") -> None:
    """Print to stdout now; end quietly, as done, when its reader has left (`| head -1`)."""
    try:
        print(text, end=end, flush=True)
    except BrokenPipeError:
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())  # Python flushes stdout once more at its exit
        raise typer.Exit(0) from None


def tell(message: str) -> None:
    """Print a line to stderr."""
    print(message, file=sys.stderr)


def on_one_line(text: str) -> str:
    """`text` with escapes for control characters: names may hold line ends, tabs, and what commands a terminal."""
    return _CONTROLS.sub(lambda control: repr(control[0])[1:-1], text)


def load_model(model: str, dtype: DType | None, revision: str | None) -> tuple[FastVLM, Processor]:
    from mlx_fastvlm.loading import LARGE_MODEL_BYTES, load, on_slow_cpu, resolve_model

    with progress() as on_progress:
        folder = resolve_model(model, revision, on_progress)
    loaded, processor = load(folder, dtype=dtype and dtype.value)
    size = (folder / "model.safetensors").stat().st_size
    if size > LARGE_MODEL_BYTES and on_slow_cpu():
        _advise_on_speed(loaded.dtype)
    return loaded, processor


def _advise_on_speed(dtype: mx.Dtype) -> None:
    """One line on what would make a large model many times faster on a Linux CPU, if anything would."""
    from mlx.core import float32

    if dtype != float32:
        print("Many times faster on this CPU: --dtype float32", file=sys.stderr)
    elif cpu.missing() is not None:
        advice = "pip install scipy-openblas32 numba, see docs/cpu.md"
        print(f"Many times faster on this CPU: {advice} (now: {cpu.missing()})", file=sys.stderr)


@contextmanager
def progress() -> Iterator[OnProgress]:
    """A progress line on stderr that appears when there is something to report."""
    bar = None
    tasks: dict[str, int] = {}

    def report(what: str, done: int, total: int) -> None:
        nonlocal bar
        if bar is None:
            # Imported on first use: most commands report nothing, and rich takes 50 ms.
            from rich.console import Console
            from rich.progress import BarColumn, Progress, TextColumn, TimeRemainingColumn

            console = Console(stderr=True)
            columns = (TextColumn("{task.description}"), BarColumn(), TextColumn("{task.fields[amount]}"))
            bar = Progress(*columns, TimeRemainingColumn(), console=console, disable=not console.is_terminal)
            bar.start()
        if what not in tasks:
            tasks[what] = bar.add_task(what, total=total, amount="")
        bar.update(tasks[what], completed=done, total=total, amount=_amount(done, total))

    try:
        yield report
    finally:
        if bar is not None:
            bar.stop()


@contextmanager
def counting(total: int, unit: str, *, visible: bool = True) -> Iterator[Callable[..., None]]:
    """A bar on stderr, if that is a terminal, for work on `total` things of one kind.

    Args:
        total: how many there are.
        unit: what they are called, in the plural.
        visible: False shows no bar in any case.

    Yields:
        To be called with how many are done, how many of these are bad, and what else there is to say.
    """
    from rich.console import Console  # imported here: rich takes 50 ms
    from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

    console = Console(stderr=True)
    columns = (BarColumn(), MofNCompleteColumn(), TextColumn("{task.description}"), TimeRemainingColumn())
    bar = Progress(
        *columns, console=console, disable=not (visible and console.is_terminal), transient=True, redirect_stdout=False
    )
    with bar:
        task = bar.add_task(unit, total=total)
        start = time.monotonic()

        def report(done: int, bad: int = 0, note: str = "") -> None:
            rate = done / max(time.monotonic() - start, 1e-9)
            said = [f"{rate:.1f} {unit}/s", f"{bad} bad" if bad else "", note]
            bar.update(task, completed=done, description=", ".join(filter(None, said)))

        yield report


def _amount(done: int, total: int) -> str:
    """What is done as people read it: few steps as steps, many as bytes."""
    if total < _FEWEST_BYTES:
        return f"{done}/{total}"
    return f"{done / 1e6:,.0f}/{total / 1e6:,.0f} MB"
