"""In which fields the configurations of runs differ."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from callbacks.report.cells import Cell, Table
from callbacks.run_folder.loggers import flat
from experiments.compare.runs import Run

OWN_PLACE = {"trainer.default_root_dir"}
"""Differs between any two runs and says nothing."""
NOT_SET = "(not set)"
SIDE_BY_SIDE = 6
"""Runs that have a column each; of more, a row a value names its runs."""


@dataclass(frozen=True)
class Differing:
    """A field that not all runs have alike."""

    key: str
    values: Sequence[str]
    """Of every run, in their order."""


def differing(runs: Sequence[Run]) -> list[Differing]:
    """Fields in which runs that have recorded a configuration differ, in the configuration's order; the
    others say nothing about them."""
    flats = [
        {key: _text(value) for key, value in flat(dict(run.results.configuration)).items()}
        if run.results.configuration
        else None
        for run in runs
    ]
    recorded = [own for own in flats if own is not None]
    keys = dict.fromkeys(key for own in recorded for key in own if key not in OWN_PLACE)
    return [
        Differing(key, ["" if own is None else own.get(key, NOT_SET) for own in flats])
        for key in keys
        if len({own.get(key, NOT_SET) for own in recorded}) > 1
    ]


def configuration_table(runs: Sequence[Run], fields: Sequence[Differing]) -> Table:
    """A row a field, a column a run; of many runs a row a value."""
    title = "Configuration differences"
    if len(runs) <= SIDE_BY_SIDE:
        rows = [[Cell(field.key), *map(Cell, field.values)] for field in fields]
        return Table(title, ("field", *(run.name for run in runs)), rows)
    rows = []
    for field in fields:
        for value in dict.fromkeys(field.values):
            own = [run.name for run, other in zip(runs, field.values, strict=True) if other == value]
            rows.append([Cell(field.key), Cell(value), Cell(str(len(own)), len(own)), Cell(", ".join(own))])
    return Table(title, ("field", "value", "n", "runs"), rows)


def _text(value: Any) -> str:
    return value if isinstance(value, str) else json.dumps(value, default=str)
