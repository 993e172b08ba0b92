"""Generated blocks of the documentation's pages, between their marks: tables that a test compares with the code."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from pathlib import Path

from mlx_fastvlm.replace_file import replace_file

from .command import BenchmarkError

Row = Mapping[str, str]  # column → cell


def renew(page: Path, blocks: Mapping[str, str]) -> None:
    """Write the page with its blocks renewed, see `fill`. Raises BenchmarkError if there is no such page or mark."""
    if not page.is_file():
        raise BenchmarkError(f"There is no file {page}.")
    replace_file(page, fill(page.read_text(encoding="utf-8"), blocks).encode())


def fill(text: str, blocks: Mapping[str, str]) -> str:
    """The page with every generated block renewed.

    Args:
        text: Markdown with `<!-- begin NAME -->` and `<!-- end NAME -->` around each block.
        blocks: NAME → what stands between the marks.

    Raises:
        BenchmarkError: a mark is missing.
    """
    for name, block in blocks.items():
        begin, end = f"<!-- begin {name} -->", f"<!-- end {name} -->"
        start, stop = text.find(begin), text.find(end)
        if start < 0 or stop < start:
            raise BenchmarkError(f"The page has no {begin} … {end}; put both marks where the block belongs.")
        text = f"{text[:start]}{begin}\n{block}\n{text[stop:]}"
    return text


def markdown_table(rows: Sequence[Row]) -> str:
    """Rows as a Markdown table: the first column flush left, numbers flush right."""
    columns = list(rows[0])
    rules = ["---"] + ["---:" if _numeric(rows[0][column]) else "---" for column in columns[1:]]
    lines = [columns, rules, *([row[column] for column in columns] for row in rows)]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


def _numeric(cell: str) -> bool:
    return re.match(r"[+−-]?\d", cell) is not None
