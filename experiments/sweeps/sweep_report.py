"""A sweep's table, best trial, importances and figures, as Markdown, a page and files for other programs."""

from __future__ import annotations

import csv
import json
import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from optuna.importance import PedAnovaImportanceEvaluator, get_param_importances
from optuna.trial import FrozenTrial, TrialState

from callbacks.judges.card import lines
from callbacks.report.cells import MISSING, Cell, Table
from callbacks.report.drawing import Drawing, save
from callbacks.report.escape import markdown
from callbacks.report.load import load
from callbacks.report.markdown import table_text
from callbacks.report.page import study_page
from experiments.sweeps.best import BEST, copy_resolved, remove_best, write_best
from experiments.sweeps.definition import is_broken
from experiments.sweeps.figures import parallel, trade_off
from experiments.sweeps.search import CELLS, ERROR, FOLDER, Search, feasible, quiet
from experiments.sweeps.trials import TRIALS

NAMES = {
    TrialState.COMPLETE: "complete",
    TrialState.FAIL: "failed",
    TrialState.PRUNED: "ended early",
    TrialState.RUNNING: "not finished",
    TrialState.WAITING: "not begun",
}
FEWEST = 4
"""Complete trials below which importances say nothing."""


def write_sweep(search: Search, title: str, place: Path) -> str:
    """Write report.md, report.html, trials.csv, figures, and best.yaml and best_config.yaml where there is a
    best trial.

    Returns: the Markdown report.
    """
    best = search.best()
    _write_csv(search, place / "trials.csv")
    drawings: dict[str, Drawing] = {}
    for number, figure in enumerate(search.sweep.figures):
        drawing = trade_off(search, figure)
        if drawing is not None:
            drawings[f"pareto_{number}"] = drawing
    coordinates = parallel(search)
    if coordinates is not None:
        drawings["parallel"] = coordinates
    for stem, drawing in drawings.items():
        save(drawing, place / f"{stem}.svg")
    notes = _notes(search, best)
    tables = [trials_table(search, best)]
    if best is not None:
        values = search.values_of(best)
        assert values is not None
        write_best(search.sweep, values, f"Trial {best.number} of {title}", place / BEST)
        copy_resolved(place / TRIALS / best.user_attrs[FOLDER], place)
        tables.insert(0, best_table(search, best, place))
    else:
        remove_best(place)
    importances = importance_table(search)
    tables += [importances] if importances is not None else []
    signs = judges(search, best, place)
    name = search.sweep.name or f"Sweep {title}"
    (place / "report.html").write_text(study_page(name, [*notes, *signs], tables, drawings), encoding="utf-8")
    parts = [f"# {markdown(name)}", *map(markdown, notes)]
    for table in tables:
        parts += [f"## {table.title}", table_text(table)]
    parts.append("\n".join(f"- {markdown(sign)}" for sign in signs))
    parts += [f"![{markdown(own.title)}]({stem}.svg)" for stem, own in drawings.items()]
    document = "\n\n".join(part for part in parts if part) + "\n"
    (place / "report.md").write_text(document, encoding="utf-8")
    return document


def _notes(search: Search, best: FrozenTrial | None) -> list[str]:
    sweep = search.sweep
    asked = "; ".join(own.text for own in sweep.constraints)
    kept = (
        f"Under the constraints ({asked}), judged by the point estimates, "
        if asked
        else "Without constraints, "
    )
    chosen = (
        f"trial {best.number} is the best" if best is not None else "no trial is the best: none keeps them"
    )
    rule = f"{sweep.metric.goal} {sweep.objective}"
    states = [NAMES[own.state] for own in search.trials()]
    counts = ", ".join(f"{states.count(state)} {state}" for state in dict.fromkeys(states))
    return [
        sweep.description.strip(),
        f"{kept}{chosen} on validation ({sweep.method}, {rule}). {len(states)} of {search.total} trials: "
        f"{counts}. The best of many looks better on the rows that it was chosen on than it is: test rows "
        "say what it is worth.",
    ]


def judges(search: Search, best: FrozenTrial | None, place: Path) -> list[str]:
    """A line on every judge that has decided a cell: what its card says, or that it has none."""
    measured = [own.user_attrs.get(CELLS, {}) for own in search.trials()]
    if best is not None:
        measured.append(_tested(search, place / TRIALS / best.user_attrs[FOLDER]))
    # Trials that an earlier version measured do not say who judged them.
    return lines(cell.get("judge", "") for found in measured for cell in found.values())


def trials_table(search: Search, best: FrozenTrial | None) -> Table:
    """A row a trial, as they were begun."""
    keys = [own.key for own in search.space.dimensions]
    labels = list(search.sweep.columns)
    rows = []
    for own in search.trials():
        values = search.values_of(own)
        found = own.user_attrs.get(CELLS, {})
        rows.append(
            [
                Cell(str(own.number), own.number),
                Cell(state_of(own, best)),
                *(_setting(values[key]) if values and key in values else Cell(MISSING) for key in keys),
                *(_cell(found.get(label)) for label in labels),
                Cell(own.user_attrs.get(FOLDER, MISSING)),
            ]
        )
    return Table("Trials (validation)", ["trial", "state", *keys, *labels, "folder"], rows)


def state_of(own: FrozenTrial, best: FrozenTrial | None = None) -> str:
    """What became of a trial, as a reader sees it."""
    if own.state == TrialState.COMPLETE:
        if best is not None and own.number == best.number:
            return "best"
        broken = [text for text, excess in own.constraints.items() if is_broken(excess)]
        return f"breaks: {'; '.join(broken)}" if broken else "keeps the constraints"
    if own.state == TrialState.FAIL:
        return f"{NAMES[own.state]}: {own.user_attrs.get(ERROR, '')}"
    return NAMES[own.state]


def best_table(search: Search, best: FrozenTrial, place: Path) -> Table:
    """The best trial on validation, before and after, and on test where it was evaluated."""
    folder = place / TRIALS / best.user_attrs[FOLDER]
    tested = _tested(search, folder)
    rows = [
        [Cell(label), _point(cell, "before"), _cell(cell), _cell(tested.get(label))]
        for label, cell in best.user_attrs[CELLS].items()
    ]
    title = f"Trial {best.number}, the best"
    return Table(title, ["column", "validation, before", "validation, after", "test, after"], rows)


def _tested(search: Search, folder: Path) -> dict[str, Mapping[str, Any]]:
    try:
        after = load(folder, "test").after
    except FileNotFoundError:
        return {}
    found: dict[str, Mapping[str, Any]] = {}
    for label, column in search.sweep.columns.items():
        measure = after.measures.get(column.metric) if after is not None else None
        if measure is not None:
            own = measure.estimate
            found[label] = {
                "after": own.value,
                "low": own.low,
                "high": own.high,
                "n": own.n,
                "is_rate": own.kind == "rate",
                "judge": measure.judge,
            }
    return found


def importance_table(search: Search) -> Table | None:
    """How much each parameter mattered for the metric; None where too few trials tell."""
    if len(search.ranked()) < FEWEST:
        return None
    try:
        with quiet():
            found = get_param_importances(search.study, evaluator=PedAnovaImportanceEvaluator())
    except (ValueError, RuntimeError):
        return None
    rows = [[Cell(key), Cell(f"{share:.2f}", share)] for key, share in found.items() if math.isfinite(share)]
    title = "Importance of parameters (PED-ANOVA: shares of what sets the best trials apart)"
    return Table(title, ["parameter", "importance"], rows) if rows else None


def _setting(value: Any) -> Cell:
    if isinstance(value, bool) or not isinstance(value, int | float):
        return Cell(value if isinstance(value, str) else json.dumps(value))
    return Cell(f"{value:.4g}", value)


def _cell(own: Mapping[str, Any] | None) -> Cell:
    if own is None:
        return Cell(MISSING, math.nan)
    by, unit = (100, " %") if own["is_rate"] else (1, "")
    value, low, high = (by * own[name] for name in ("after", "low", "high"))
    return Cell(f"{value:.4g}{unit} [{low:.3g}, {high:.3g}] (n = {own['n']})", value)


def _point(own: Mapping[str, Any], name: str) -> Cell:
    if own[name] is None:
        return Cell(MISSING, math.nan)
    return Cell(f"{100 * own[name]:.4g} %" if own["is_rate"] else f"{own[name]:.4g}", own[name])


def _write_csv(search: Search, path: Path) -> None:
    """Every trial, a line each; values as they are, rates between 0 and 1."""
    keys, labels = [own.key for own in search.space.dimensions], list(search.sweep.columns)
    parts = ("before", "after", "low", "high", "n")
    columns = [f"{label}: {part}" for label in labels for part in parts]
    with path.open("w", newline="", encoding="utf-8") as stream:
        lines = csv.writer(stream, lineterminator="\n")
        lines.writerow(["trial", "state", "feasible", *keys, *columns, "error", "folder"])
        for own in search.trials():
            values, found = search.values_of(own), own.user_attrs.get(CELLS, {})
            complete = own.state == TrialState.COMPLETE
            lines.writerow(
                [
                    own.number,
                    own.state.name.lower(),
                    feasible(own) if complete else "",
                    *(json.dumps(values[key]) if values and key in values else "" for key in keys),
                    *(found.get(label, {}).get(part, "") for label in labels for part in parts),
                    own.user_attrs.get(ERROR, ""),
                    own.user_attrs.get(FOLDER, ""),
                ]
            )
