"""A report as Markdown, and as what a terminal shows: the same tables and sentences."""

from __future__ import annotations

from collections.abc import Mapping

from callbacks.report.cells import Table
from callbacks.report.escape import markdown, printable
from callbacks.report.results import RunResults
from callbacks.report.tables import facts, judges, notes, rates, tables, warnings
from callbacks.report.tables_beside import perplexities, replies

WIDEST = 60
"""Columns of the terminal after which a cell is cut; the reports hold it whole."""


def document(results: RunResults, figures: Mapping[str, str]) -> str:
    """The Markdown report; `figures` maps a title to a path relative to the report."""
    about = "\n".join(f"- {name}: {markdown(text)}" for name, text in facts(results).items())
    parts = [f"# Report of {markdown(results.folder.name)} ({results.stage})", about]
    parts.append("\n".join(f"- Warning: {markdown(text)}" for text in warnings(results)))
    for table in tables(results):
        parts += [f"## {table.title}", table_text(table)]
    parts.append(" ".join(notes(results)))
    parts.append("\n".join(f"- {markdown(judge)}" for judge in judges(results)))
    parts += [f"![{markdown(title)}]({path})" for title, path in figures.items()]
    return "\n\n".join(part for part in parts if part) + "\n"


def terminal(results: RunResults) -> str:
    """Rates, replies and perplexities in aligned columns, who judged, and the warning signs, escaped for a
    terminal.

    Differences stay in the reports: with them no row would fit a terminal's width.
    """
    shown = [table for table in (replies(results), perplexities(results)) if table.rows]
    lines: list[str] = []
    for table in (rates(results), *shown) if rates(results).rows else shown or [rates(results)]:
        kept = [i for i, column in enumerate(table.columns) if column not in ("difference", "judge", "how")]
        rows = [[row[i] for i in kept] for row in table.rows]
        lines += [*([""] if lines else []), *_aligned(Table("", [table.columns[i] for i in kept], rows))]
    lines += [printable(judge, one_line=True) for judge in judges(results)]
    lines += [f"warning: {printable(text, one_line=True)}" for text in warnings(results)]
    return "\n".join(lines)


def table_text(table: Table) -> str:
    """A table as Markdown."""
    rows = [[markdown(cell.text) for cell in row] for row in table.rows]
    lines = [table.columns, ["---"] * len(table.columns), *rows]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


def _aligned(table: Table) -> list[str]:
    rows = [list(table.columns)]
    rows += [[_cut(printable(cell.text, one_line=True)) for cell in row] for row in table.rows]
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    return ["  ".join(map(str.ljust, row, widths)).rstrip() for row in rows]


def _cut(text: str) -> str:
    return text if len(text) <= WIDEST else text[: WIDEST - 1] + "…"
