"""What a trial has measured on validation, inside its `fit`, read from its rows."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from callbacks.report.load import load
from callbacks.report.results import Snapshot
from datamodules.results import ROWS
from experiments.studies.definition import Column
from experiments.sweeps.definition import Sweep


class Unmeasured(ValueError):
    """The sweep asks for what its evaluations do not measure: no trial of it can be counted."""


@dataclass(frozen=True)
class Cell:
    """One column of one trial."""

    after: float
    low: float
    high: float
    n: int
    before: float | None = None
    """Before training, where it was measured in the same way."""
    is_rate: bool = True
    judge: str = ""
    """`name@revision` of what decided it."""


def cells(sweep: Sweep, folder: Path) -> dict[str, Cell]:
    """Column -> what a finished trial has measured; an optional column may be missing.

    Raises: Unmeasured naming a column that was not measured; ValueError where its value is no number.
    """
    try:
        results = load(folder, "fit")
    except FileNotFoundError as error:
        raise Unmeasured(f"{error}; no evaluation of `config` has measured anything") from error
    assert results.after is not None
    if results.after.step == 0:
        raise Unmeasured("its last evaluation was before training; set schedule.at_end of the evaluations")
    found = {}
    for label, column in sweep.columns.items():
        after = results.after.measures.get(column.metric)
        if after is None or math.isnan(after.estimate.value):
            if column.optional:
                continue
            if after is not None:
                raise ValueError(f"{label!r} ({column.metric.key}) is not a number at the end of training")
            raise Unmeasured(
                f"no {label!r} ({column.metric.key}) among its results of `fit`; add the evaluation that "
                "measures it to `config`, or make the column optional"
            )
        before = _value(results.before, column)
        before = None if before is None or math.isnan(before) else before
        own = after.estimate
        found[label] = Cell(own.value, own.low, own.high, own.n, before, own.kind == "rate", after.judge)
    return found


def excesses(sweep: Sweep, own: Mapping[str, Cell]) -> dict[str, float]:
    """Constraint -> how far it is broken; 0 or less where it is kept. Raises: ValueError."""
    found = {}
    for constraint in sweep.constraints:
        cell = own.get(constraint.column)
        if cell is None or (constraint.against_start and cell.before is None):
            when = "before training" if cell is not None else "at the end"
            raise ValueError(f"{constraint.text}: the column was not measured {when}")
        found[constraint.text] = constraint.excess(cell.before, cell.after)
    return found


def periodic(sweep: Sweep, folder: Path) -> list[float]:
    """The metric at the evaluations after the start that are whole, in their order; none so far is []."""
    try:
        results = load(folder, "fit")
    except (FileNotFoundError, ValueError):  # nothing yet, or a line that is being written
        return []
    column = sweep.columns[sweep.objective]
    whole = [own for own in results.snapshots if own.step and own.complete]
    values = [_value(own, column) for own in sorted(whole, key=lambda own: own.step)]
    return [value for value in values if value is not None]


def stamp(folder: Path) -> int:
    """Changes with every row that is written."""
    return sum(path.stat().st_size for path in folder.glob(f"{ROWS}/*.jsonl"))


def _value(snapshot: Snapshot | None, column: Column) -> float | None:
    measure = snapshot.measures.get(column.metric) if snapshot is not None else None
    return None if measure is None else measure.estimate.value
