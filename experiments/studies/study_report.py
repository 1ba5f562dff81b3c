"""A study's table, answers and figures, as Markdown, a page and files for other programs."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from dataclasses import asdict
from pathlib import Path
from typing import Any

from callbacks.judges.card import lines
from callbacks.metrics.hierarchical import SeedRate
from callbacks.report.cells import MISSING, Cell, Table, p_value
from callbacks.report.drawing import Drawing, Point, save, scatter
from callbacks.report.escape import markdown
from callbacks.report.markdown import table_text
from callbacks.report.page import study_page
from callbacks.report.signs import words
from callbacks.report.under_attack import FALL, REFUSED
from callbacks.run_folder.provenance import environment_facts
from experiments.studies.answers import Answer, answers
from experiments.studies.archive import RUNS, archive, revisions
from experiments.studies.categories import by_category
from experiments.studies.certificates import certificate_curves, certificate_tables, threat
from experiments.studies.comparison import Compared, read
from experiments.studies.correlation import correlations
from experiments.studies.costs import cost_table, curves
from experiments.studies.definition import Study, TradeOff
from experiments.studies.directions import direction_curves, direction_tables
from experiments.studies.spreadsheet import write_cells, write_tables

STEMS = ("figure", "curve", "certified", "direction")
"""Of the files of figures, before their numbers."""
COLORS = ("#4c86c6", "#d1605e", "#5a9e6f", "#9b6fb5", "#c98a2b", "#6b7a8f")
INTERVALS = (
    "Means over seeds, rates in percent; in brackets 95 % intervals over seeds and examples (bootstrap of "
    "both, never narrower than one seed's own; of what is no rate, from the lowest to the highest of the "
    "seeds' own); in parentheses each seed's value, where they differ. Passes are forward and backward "
    "passes of single examples in training, the reference's and those of collecting the data included."
)


ROWS_BESIDE = (
    "Every run's rows, compressed JSON lines (`thundercat compare runs/*/seed*` in this folder shows them)"
)


def write_study(
    study: Study,
    runs: Mapping[str, Mapping[int, Path]],
    out: Path,
    missing: Mapping[str, str] | None = None,
    links: Mapping[str, str] | None = None,
    copies: bool = True,
) -> str:
    """Write report.md, report.html, cells.csv, tables.csv, results.json, environment.json, figures and raw
    rows.

    Args:
        study: columns, questions and figures.
        runs: name -> seed -> folder, of the runs that are finished.
        out: folder that is written to.
        missing: runs of the study that are not among `runs`, and why.
        links: what the page leads to, text -> path relative to it.
        copies: put the raw rows beside the report; they are read where they are otherwise.

    Returns: the Markdown report. Raises: ValueError without runs, or where a run lacks a column.
    """
    if not runs:
        raise ValueError("expected finished runs, got none")
    out.mkdir(parents=True, exist_ok=True)
    runs = archive(runs, out) if copies else runs
    rows = read(runs, study.columns)
    found = answers(rows, study.claims, study.columns, study.untrained)
    facts = environment_facts() | {"revisions_of_runs": revisions(runs)}
    (out / "environment.json").write_text(json.dumps(facts, indent=2) + "\n", encoding="utf-8")
    results = {"schema": 3, "title": study.title, "runs": exported(study, rows)}
    # For programs: a third smaller than with spaces.
    text = json.dumps(results, separators=(",", ":"))
    (out / "results.json").write_text(text + "\n", encoding="utf-8")
    write_cells(out / "cells.csv", rows)
    drawings = {f"figure_{number}": draw(rows, own) for number, own in enumerate(study.figures)}
    drawings |= curves(study, runs) | certificate_curves(rows) | direction_curves(rows)
    for old in (path for stem in STEMS for path in out.glob(f"{stem}_[0-9]*.svg")):
        old.unlink()  # of an earlier study, or of fewer figures: nothing of it is in this report
    for stem, drawing in drawings.items():
        save(drawing, out / f"{stem}.svg")
    tables = tables_of(study, runs, rows, found)
    if missing:
        lost = [[Cell(name), Cell(reason)] for name, reason in missing.items()]
        tables.append(Table("Not reported", ["run", "why"], lost))
    write_tables(out / "tables.csv", tables)
    signs = [*threat(rows), *carrying(rows), *judges(study, rows)]
    text = document(study, tables, signs, {own.title: f"{stem}.svg" for stem, own in drawings.items()})
    (out / "report.md").write_text(text, encoding="utf-8")
    beside = {**(links or {}), **({ROWS_BESIDE: RUNS} if (out / RUNS).is_dir() else {})}
    page = study_page(study.title, [study.about, INTERVALS, *signs], tables, drawings, beside)
    (out / "report.html").write_text(page, encoding="utf-8")
    return text


def tables_of(
    study: Study, runs: Mapping[str, Mapping[int, Path]], rows: Mapping[str, Compared], found: list[Answer]
) -> list[Table]:
    """All tables of a report, in their order; `runs` are where the costs are read."""
    tables = [cells(study, rows)] + ([replies(study, found, rows)] if study.claims else [])
    tables += certificate_tables(rows) + direction_tables(rows)
    further = (settings(study, rows), correlations(study, rows), cost_table(study, runs))
    tables += [own for own in further if own is not None]
    return tables + by_category(study, rows)


def document(study: Study, tables: list[Table], signs: list[str], figures: Mapping[str, str]) -> str:
    """The Markdown report; `signs` are what must be known of the numbers: who judged, what is misleading."""
    parts = [f"# {markdown(study.title)}", study.about.strip(), INTERVALS]
    for table in tables:
        parts += [f"## {table.title}", table_text(table)]
    parts.append(verdicts_line(study))
    parts.append("\n".join(f"- {markdown(sign)}" for sign in signs))
    parts += [f"![{markdown(title)}]({path})" for title, path in figures.items()]
    return "\n\n".join(part for part in parts if part) + "\n"


def verdicts_line(study: Study) -> str:
    if not study.claims:
        return ""
    return (
        "The second run's value minus the first's, in points, with a 95 % interval. Where all of their seeds "
        "were judged on the same examples they are compared pair by pair (n pairs): with one seed each by "
        "Newcombe's interval and the exact McNemar p (losses: Student's; perplexities: a block bootstrap), "
        "with several by Student's interval over examples and seeds, rates never narrower than one seed's n "
        "allows; otherwise joined from the two intervals. A training with one seed is taken to vary as the "
        "other run's seeds do; where both have one, the answer is of these trainings alone (\"one training "
        'each"), and no difference is told where the exact p is 0.05 or more. '
        f'"Equivalent" is said where all of the interval lies within {100 * study.margin:.0f} points, "not '
        'distinguishable" where it holds 0 and more than that. The last column is the smallest true '
        "difference that would have been found in four of five repetitions."
    )


def carrying(rows: Mapping[str, Compared]) -> list[str]:
    """The runs whose models refuse, or fail, benign prompts for what an attack leaves on them: its success on
    harmful requests says little about harm there."""
    found = []
    for name, own in rows.items():
        signs = [f"{words(attack)} ({seeds} of {len(own.by_seed)})" for attack, seeds in own.carrying.items()]
        if signs:
            found.append(f"{name}: {', '.join(signs)}")
    title = (
        f"Refuses what carries it (done to benign prompts, {100 * REFUSED:.0f} % or more are refused, or "
        f"utility falls by {100 * FALL:.0f} points or more; in so many of its seeds):"
    )
    return [title, *found] if found else []


def judges(study: Study, rows: Mapping[str, Compared]) -> list[str]:
    """A line on every judge that has decided a column: what its card says, or that it has none."""
    metrics = [column.metric for column in study.columns.values()]
    told = [own for run in rows.values() for own in run.by_seed.values()]
    return lines(own[metric].judge for metric in metrics for own in told if metric in own)


def _passes(study: Study, name: str, own: Compared) -> float | None:
    """Of a checkpoint on the way none are counted: its training's counters are of the whole."""
    return None if study.runs[name].checkpoint_of else own.passes


def cells(study: Study, rows: Mapping[str, Compared]) -> Table:
    """A row per run."""
    passes = {name: _passes(study, name, own) for name, own in rows.items()}
    table = [
        [
            Cell(name),
            *(_cell(own.cell(label), label in own.means) for label in study.columns),
            Cell(MISSING, math.nan) if (spent := passes[name]) is None else Cell(f"{spent:.0f}", spent),
        ]
        for name, own in rows.items()
    ]
    sizes = {label: _sizes(rows, label) for label in study.columns}
    columns = [f"{label} (n = {sizes[label]})" if sizes[label] else label for label in study.columns]
    return Table("Results", ["run", *columns, "passes"], table)


def _sizes(rows: Mapping[str, Compared], label: str) -> str:
    found = sorted({own.num_examples for row in rows.values() if (own := row.cell(label)) is not None})
    return "-".join(map(str, (found[0], found[-1])[: len(found)])) if found else ""


def _cell(own: SeedRate | None, is_mean: bool) -> Cell:
    if own is None:
        return Cell(MISSING)
    shown = _value if is_mean else _percent
    text = f"{shown(own.value)} [{shown(own.low)}, {shown(own.high)}]"
    if len({*own.by_seed}) > 1:
        text += " (" + ", ".join(shown(value) for value in own.by_seed) + ")"
    return Cell(text, own.value, (own.low, own.high))


def _percent(value: float) -> str:
    return f"{100 * value:.0f}"


def _value(value: float) -> str:
    return f"{value:.4g}"


def replies(study: Study, found: list[Answer], rows: Mapping[str, Compared]) -> Table:
    """A row per question and column; one for a question whose runs are not there."""
    columns = ["question", "column", "first", "second", "difference", "says", "could have shown"]
    table = []
    for own in found:
        shown, scale, unit = (_percent, 100, " points") if own.is_rate else (_value, 1, "")
        low, middle, high = (
            f"{scale * part:+.0f}" if own.is_rate else f"{part:+.3g}"
            for part in (own.difference.low, own.difference.value, own.difference.high)
        )
        p = "" if own.paired is None else f", {p_value(own.paired.p_value)}"
        p += f" ({own.pairs} pairs)" if own.pairs else ""
        limits = "; one training each" if own.single else ""
        limits += "" if own.measured_alike else "; measured in different ways"
        sign = " %" if own.is_rate else ""
        table.append(
            [
                Cell(own.claim.question),
                Cell(own.label),
                Cell(f"{own.claim.first} {shown(own.first.value)}{sign}", own.first.value),
                Cell(f"{own.claim.second} {shown(own.second.value)}{sign}", own.second.value),
                Cell(
                    f"{middle} [{low}, {high}]{p}",
                    own.difference.value,
                    (own.difference.low, own.difference.high),
                ),
                Cell(own.says(study.margin) + limits),
                Cell(_detectable(own.difference.detectable, scale, unit), own.difference.detectable),
            ]
        )
    for claim in study.claims:
        lost = [name for name in (claim.first, claim.second) if name not in rows]
        if lost:
            says = f"not answered: no {' and no '.join(lost)}"
            asked = claim.question, ", ".join(claim.columns), claim.first, claim.second
            table.append([*map(Cell, (*asked, MISSING, says, MISSING))])
    return Table("Questions", columns, table)


def _detectable(own: float, scale: int, unit: str) -> str:
    return f"{scale * own:.3g}{unit}" if math.isfinite(own) else "nothing"


def settings(study: Study, rows: Mapping[str, Compared]) -> Table | None:
    """What a search chose, a row per run that it chose something for; None where it chose nothing."""
    told = [[Cell(name), Cell(own)] for name in rows if (own := study.runs[name].setting)]
    return Table("Settings", ["run", "chosen"], told) if told else None


def draw(rows: Mapping[str, Compared], figure: TradeOff) -> Drawing:
    """One column against another, a point per run with both intervals."""
    points = []
    for number, (name, own) in enumerate(rows.items()):
        x, y = own.cell(figure.x), own.cell(figure.y)
        if x is None or y is None:
            continue
        by_x, by_y = (1 if label in own.means else 100 for label in (figure.x, figure.y))
        points.append(
            Point(
                by_x * x.value,
                by_y * y.value,
                name,
                (by_x * x.low, by_x * x.high),
                (by_y * y.low, by_y * y.high),
                color=COLORS[number % len(COLORS)],
            )
        )
    picture = scatter(points, figure.x, figure.y)
    return Drawing(
        f"{figure.y} against {figure.x}", "A point a run, with 95 % intervals; rates in percent.", picture
    )


def exported(study: Study, rows: Mapping[str, Compared]) -> dict[str, Any]:
    """What results.json holds of the runs; `passes` are null where none are counted, as of a checkpoint."""
    found = {}
    for name, own in rows.items():
        rates, means = (
            {label: asdict(cell) for label, cell in cells.items()} for cells in (own.rates, own.means)
        )
        found[name] = {
            "setting": study.runs[name].setting or None,
            "rates": rates,
            "means": means,
            "passes": _passes(study, name, own),
        }
    return found
