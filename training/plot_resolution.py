"""Draw what `training.evaluate_resolution` found: `python -m training.plot_resolution RESULT.json PICTURE.png`.

Accuracy on the mixed set against mean encode time, fixed resolutions beside `--resolution auto`. Needs matplotlib.
"""

import argparse
import io
import json
from pathlib import Path

from matplotlib.figure import Figure

from mlx_fastvlm.fidelity.output import write_output

_APART = 4  # labels, in % of encode time


def draw(report: dict) -> Figure:
    """The curves of a report."""
    figure = Figure(figsize=(8, 4.5), layout="constrained")
    axes = figure.add_subplot()
    for kind, label, style in (
        ("fixed", "one resolution for all", "o--"),
        ("auto", "auto, by share of agreement", "s-"),
    ):
        rows = [(row["name"].split()[1], row["mixed"]) for row in report["rows"] if row["name"].startswith(kind)]
        rows.sort(key=lambda row: row[1]["encode_over_full"])
        times = [100 * mixed["encode_over_full"] for _, mixed in rows]
        shares = [100 * mixed["accuracy"] for _, mixed in rows]
        axes.plot(times, shares, style, label=label)
        labelled = -_APART
        for (name, _), x, y in zip(rows, times, shares, strict=True):
            if x >= labelled + _APART:
                axes.annotate(
                    name, (x, y), xytext=(4, -11 if kind == "fixed" else 6), textcoords="offset points", fontsize=8
                )
                labelled = x
    axes.set_title(f"Demo model, {report['questions']['mixed']:,} questions about scenes and easy-VQA pictures")
    axes.set_xlabel(f"mean encode time, % of that at {report['trained']} pixels")
    axes.set_ylabel("right answers, %")
    axes.grid(alpha=0.3)
    axes.legend(loc="lower right")
    return figure


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("report", type=Path, help="JSON that training.evaluate_resolution wrote with --output")
    parser.add_argument("picture", type=Path, help="PNG file to write")
    args = parser.parse_args()
    drawn = io.BytesIO()
    draw(json.loads(args.report.read_text())).savefig(drawn, format="png", dpi=150)
    write_output(args.picture, drawn.getvalue())


if __name__ == "__main__":
    main()
