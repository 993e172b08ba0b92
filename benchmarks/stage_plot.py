"""The picture of the ttft benchmark: one bar a variant, its stages side by side. Needs matplotlib (the extra `plot`)."""

from __future__ import annotations

import io
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from mlx_fastvlm.fidelity.output import write_output

from .ttft_variant import STAGES

if TYPE_CHECKING:
    from matplotlib.figure import Figure

_BAR_INCHES = 0.5


def plot_stages(name: str, labels: Sequence[str], variants: Sequence[dict[str, Any]], path: Path) -> Path:
    """Draw the stages' medians, from the image's bytes to the first token, as a PNG file.

    Args:
        name: of the model.
        labels: of the variants.
        variants: "times_s" of each has a Summary of every stage.
        path: file to write, aside first and then renamed; `fidelity.plot.check_plot` has accepted it.
    """
    drawn = io.BytesIO()
    _draw(name, labels, variants).savefig(drawn, format="png", dpi=150)
    return write_output(path, drawn.getvalue())


def _draw(name: str, labels: Sequence[str], variants: Sequence[dict[str, Any]]) -> Figure:
    from matplotlib.figure import Figure  # imported where it is needed: it takes half a second

    figure = Figure(figsize=(10, 1.6 + _BAR_INCHES * len(variants)), layout="constrained")
    axes = figure.add_subplot()
    places = range(len(variants))
    starts = [0.0] * len(variants)
    for stage in STAGES:
        widths = [1e3 * variant["times_s"][stage].median for variant in variants]
        axes.barh(places, widths, left=starts, label=stage.replace("_", " "))
        starts = [start + width for start, width in zip(starts, widths, strict=True)]
    for place, end in zip(places, starts, strict=True):
        axes.annotate(f" {end:,.0f}", (end, place), va="center", fontsize=8)
    axes.set_yticks(places, labels)
    axes.invert_yaxis()
    axes.set_xlim(0, 1.1 * max(starts))
    axes.set_xlabel("from the image's bytes to the first token, ms (medians by stage)")
    axes.set_title(name)
    axes.legend(loc="upper center", bbox_to_anchor=(0.5, -0.9 / figure.get_figheight()), ncols=len(STAGES), fontsize=8)
    return figure
