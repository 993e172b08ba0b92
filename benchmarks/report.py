"""What the benchmarks show: medians with their spread, tables for people, JSON for machines."""

from __future__ import annotations

import json
import statistics
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from mlx_fastvlm.replace_file import replace_file


@dataclass(frozen=True)
class Summary:
    """Repeated measurements of one quantity. The median stands for them, minimum and maximum show how sure it is."""

    samples: tuple[float, ...]

    @classmethod
    def of(cls, samples: Sequence[float]) -> Summary:
        """Collect one or more samples. Raises ValueError if there are none."""
        if not samples:
            raise ValueError("there is nothing to summarize")
        return cls(tuple(samples))

    @property
    def median(self) -> float:
        return statistics.median(self.samples)

    @property
    def low(self) -> float:
        return min(self.samples)

    @property
    def high(self) -> float:
        return max(self.samples)

    def to_dict(self) -> dict[str, Any]:
        """The JSON form; the samples stay in the order they were taken."""
        return {"median": self.median, "min": self.low, "max": self.high, "samples": list(self.samples)}

    def cells(self, scale: float = 1.0, digits: int = 1) -> list[str]:
        """Median and "min-max" as two table cells, multiplied by `scale`."""
        low, high = (f"{value * scale:,.{digits}f}" for value in (self.low, self.high))
        return [f"{self.median * scale:,.{digits}f}", f"{low}-{high}"]


def as_factor(ratio: Summary, more: str, less: str) -> str:
    """A ratio in words: "3.10 times {more} (2.90-3.30)", or, below 1, the other way round with {less}."""
    if ratio.median >= 1:
        word = more
    else:
        ratio, word = Summary.of([1 / sample for sample in ratio.samples]), less
    median, spread = ratio.cells(digits=2)
    return f"{median} times {word} ({spread})"


def ratios(samples: Summary, base: Summary) -> Summary:
    """Sample over sample: each pair was taken in the same round, so drift of the machine cancels."""
    return Summary.of([a / b for a, b in zip(samples.samples, base.samples, strict=True)])


def plain(values: Mapping[str, Any]) -> dict[str, Any]:
    """`values` for JSON: summaries as dicts, at every depth."""
    return {
        key: value.to_dict() if isinstance(value, Summary) else plain(value) if isinstance(value, Mapping) else value
        for key, value in values.items()
    }


def format_table(header: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """A plain text table: the first column flush left, the others flush right."""
    widths = [max(len(row[column]) for row in [header, *rows]) for column in range(len(header))]

    def line(row: Sequence[str]) -> str:
        cells = [row[0].ljust(widths[0]), *(cell.rjust(width) for cell, width in zip(row[1:], widths[1:], strict=True))]
        return "  ".join(cells).rstrip()

    return "\n".join([line(header), "  ".join("-" * width for width in widths), *map(line, rows)])


def save_json(path: Path, value: object) -> None:
    """Write `value` to `path`, whose folder exists; a reader sees the old file or the new one. Raises OSError."""
    replace_file(path, (json.dumps(value, indent=2, ensure_ascii=False) + "\n").encode())
