"""A study's numbers as CSV, for other programs: none is rounded, and a rate is a share."""

from __future__ import annotations

import csv
import math
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path

from callbacks.report.cells import Table
from experiments.studies.comparison import Compared


def write_cells(path: Path, rows: Mapping[str, Compared]) -> None:
    """Every number of the main table with its interval, n and seeds, a line each."""
    lines: list[list[object]] = [["run", "column", "kind", "value", "low", "high", "n", "by_seed"]]
    for name, own in rows.items():
        for kind, found in (("rate", own.rates), ("mean", own.means)):
            for label, cell in found.items():
                by_seed = " ".join(map(repr, cell.by_seed))
                numbers = cell.value, cell.low, cell.high, cell.num_examples
                lines.append([name, label, kind, *numbers, by_seed])
    _write(path, lines)


def write_tables(path: Path, tables: Sequence[Table]) -> None:
    """Every cell of every table, a line each: its row by number (from 1) and by its first cell's text, what
    the report shows there, and its number with its interval, where it has them."""
    lines: list[list[object]] = [["table", "row", "name", "column", "text", "value", "low", "high"]]
    for table in tables:
        for number, row in enumerate(table.rows, start=1):
            for column, cell in zip(table.columns, row, strict=True):
                value = "" if cell.order is None or math.isnan(cell.order) else cell.order
                low, high = cell.interval or ("", "")
                lines.append([table.title, number, row[0].text, column, cell.text, value, low, high])
    _write(path, lines)


def _write(path: Path, lines: Iterable[Sequence[object]]) -> None:
    with path.open("w", newline="", encoding="utf-8") as stream:
        csv.writer(stream, lineterminator="\n").writerows(lines)
