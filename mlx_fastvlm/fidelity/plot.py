"""The picture of a comparison: size on disk against top-1 agreement, one point a model. Needs matplotlib."""

from __future__ import annotations

import io
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from mlx_fastvlm.errors import OptionError
from mlx_fastvlm.fidelity.output import check_writable, write_output
from mlx_fastvlm.fidelity.results import Fidelity

if TYPE_CHECKING:
    from matplotlib.figure import Figure


def plot_fidelity(results: Sequence[Fidelity], path: Path) -> Path:
    """Draw one or several results, reference included, as a PNG file.

    Args:
        results: usually several candidates against the same reference.
        path: file to write, ending in .png; aside first and then renamed.

    Raises:
        OptionError: there is nothing to draw, or see `check_plot`.
    """
    if not results:
        raise OptionError("There are no fidelity results to draw.")
    check_plot(path)
    drawn = io.BytesIO()
    _draw(results).savefig(drawn, format="png", dpi=150)
    return write_output(path, drawn.getvalue())


def check_plot(path: Path) -> None:
    """Refuse a plot that could not be drawn, before anything is measured for it.

    Raises:
        OptionError: `path` does not end in .png or cannot be written, or matplotlib is missing.
    """
    if path.suffix.lower() != ".png":
        raise OptionError(f"{path} does not end in .png; plots are PNG files.")
    check_writable(path)
    try:
        import matplotlib.figure  # noqa: F401 - imported where it is needed: it takes half a second
    except ImportError:
        raise OptionError("A plot needs matplotlib: pip install 'mlx-fastvlm[plot]'.") from None


def _draw(results: Sequence[Fidelity]) -> Figure:
    from matplotlib.figure import Figure

    # A reference that several results share is one point.
    references = list(dict.fromkeys((result.reference.name, result.reference.weight_bytes, 1.0) for result in results))
    candidates = [
        (result.candidate.name, result.candidate.weight_bytes, result.next_token.top1_agreement) for result in results
    ]
    figure = Figure(figsize=(8, 5), layout="constrained")
    axes = figure.add_subplot()
    for label, marker, points in (("reference", "s", references), ("candidates", "o", candidates)):
        _, sizes, agreements = zip(*points, strict=True)
        axes.scatter([size / 1e6 for size in sizes], [100 * value for value in agreements], marker=marker, label=label)
    # Names stand in a column beside the picture, in the order of the points' heights: neighbors never cover each other.
    everyone = sorted({*references, *candidates}, key=lambda point: (point[2], -point[1]))
    for place, (name, size, agreement) in enumerate(everyone):
        axes.annotate(
            name,
            (size / 1e6, 100 * agreement),
            xytext=(1.03, (place + 0.5) / len(everyone)),
            textcoords="axes fraction",
            va="center",
            fontsize=8,
            arrowprops={"arrowstyle": "-", "linewidth": 0.4, "color": "0.6"},
        )
    lowest = 100 * min(agreement for *_, agreement in everyone)
    room = 0.1 * max(100 - lowest, 1)
    axes.set_xlim(0, max(size for _, size, _ in everyone) / 1e6 * 1.15)
    limits = max(lowest - room, 0), 100 + room  # room for the reference's own mark, but no tick beyond 100%
    axes.set_ylim(*limits)
    axes.set_yticks([tick for tick in axes.get_yticks() if limits[0] <= tick < 100 + 1e-6])
    axes.set_xlabel("weights on disk, MB")
    axes.set_ylabel("top-1 agreement with the reference, %")
    axes.grid(alpha=0.3)
    axes.legend(loc="lower left")
    return figure
