"""Puts generated tables between the marks of a Markdown page."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence

from .command import BenchmarkError


def fill_docs(text: str, tables: Mapping[str, Sequence[Mapping[str, str]]]) -> str:
    """The page with every table renewed.

    Args:
        text: Markdown with `<!-- begin NAME -->` and `<!-- end NAME -->` around each table.
        tables: NAME → rows, column → cell.

    Raises:
        BenchmarkError: a mark is missing.
    """
    for name, rows in tables.items():
        begin, end = f"<!-- begin {name} -->", f"<!-- end {name} -->"
        start, stop = text.find(begin), text.find(end)
        if start < 0 or stop < start:
            raise BenchmarkError(f"The page has no {begin} … {end}; put both marks where the table belongs.")
        text = f"{text[:start]}{begin}\n{markdown_table(rows)}\n{text[stop:]}"
    return text


def markdown_table(rows: Sequence[Mapping[str, str]]) -> str:
    """Rows as a Markdown table: the first column flush left, numbers flush right."""
    columns = list(rows[0])
    rules = ["---"] + ["---:" if _numeric(rows[0][column]) else "---" for column in columns[1:]]
    lines = [columns, rules, *([row[column] for column in columns] for row in rows)]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


def _numeric(cell: str) -> bool:
    return re.match(r"[+−-]?\d", cell) is not None
