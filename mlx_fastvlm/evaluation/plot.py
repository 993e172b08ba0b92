"""The picture of a sweep: score against time to first token, a line for each model. Needs matplotlib."""

from __future__ import annotations

import io
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from mlx_fastvlm.errors import OptionError
from mlx_fastvlm.evaluation.result import Result
from mlx_fastvlm.evaluation.sweep import resolution_text
from mlx_fastvlm.fidelity.output import write_output
from mlx_fastvlm.fidelity.plot import check_plot

if TYPE_CHECKING:
    from matplotlib.figure import Figure


def plot_sweep(results: Sequence[Result], path: Path) -> Path:
    """Draw the results of one task as a PNG file.

    Args:
        results: of runs with pictures.
        path: file to write, ending in .png; aside first and then renamed.

    Raises:
        OptionError: there is nothing to draw, or see `fidelity.plot.check_plot`.
    """
    timed = [result for result in results if result.speed is not None]
    if not timed:
        raise OptionError("There is nothing to draw: no question had a picture.")
    check_plot(path)
    drawn = io.BytesIO()
    _draw(timed).savefig(drawn, format="png", dpi=150)
    return write_output(path, drawn.getvalue())


def _draw(results: Sequence[Result]) -> Figure:
    from matplotlib.figure import Figure

    figure = Figure(figsize=(8, 5), layout="constrained")
    axes = figure.add_subplot()
    for model in dict.fromkeys(result.settings.model for result in results):
        line = sorted(
            (result for result in results if result.settings.model == model), key=lambda result: result.speed.ttft_s
        )
        times = [1e3 * result.speed.ttft_s for result in line]
        means = [result.score.mean for result in line]
        shares = [100 * mean.value for mean in means]
        errors = [[100 * (mean.value - mean.low) for mean in means], [100 * (mean.high - mean.value) for mean in means]]
        axes.errorbar(times, shares, yerr=errors, marker="o", capsize=3, label=model)
        for result, x, y in zip(line, times, shares, strict=True):
            axes.annotate(resolution_text(result), (x, y), xytext=(4, 4), textcoords="offset points", fontsize=8)
    axes.set_title(results[0].title)
    axes.set_xlabel("time to first token, ms (mean)")
    axes.set_ylabel(f"{results[0].metric}, % (with 95% interval)")
    axes.set_xscale("log")
    axes.grid(alpha=0.3)
    axes.legend()
    return figure
