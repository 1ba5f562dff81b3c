"""Refusal directions of a study's runs side by side: from their layers' rows to a line a run."""

from __future__ import annotations

from pathlib import Path

import pytest

from callbacks.report.directions import MEAN
from datamodules.results import ResultsStore
from experiments.studies.comparison import read
from experiments.studies.definition import Column
from experiments.studies.directions import direction_curves, direction_tables
from tests.support.rows import measurement, row

DIRECTION = "refusal_direction@1"
COLUMN = Column("direction", "harmful", block="direction")


def ran(folder: Path, *cosines: float) -> Path:
    """A run whose layers have turned so far; the mean is their own."""
    own = measurement(
        "direction", stage="test", judge=DIRECTION, block="direction", n=len(cosines) + 1, call="c"
    )
    store = ResultsStore(folder)
    store.announce([own])
    names = [*(f"layer {layer:03d}" for layer in range(len(cosines))), MEAN]
    for name, cosine in zip(names, (*cosines, sum(cosines) / len(cosines)), strict=True):
        scores = {"cosine": cosine, "low": cosine - 0.1, "high": cosine + 0.1, "along": 2.0}
        scores |= {"length": 3.0, "rank_before": 4.0, "rank": 5.0}
        verdicts = {f"{key}@1": {"verdict": False, "score": value} for key, value in scores.items()}
        verdicts |= {DIRECTION: {"verdict": False, "score": cosine}}
        store.add([row(name, own, verdicts=verdicts, counts={"harmful": 40, "harmless": 60})])
    return folder


def test_a_row_and_a_line_a_run_over_its_seeds(tmp_path: Path) -> None:
    runs = {
        "before": {0: ran(tmp_path / "a", 1.0, 1.0, 1.0)},
        "after": {0: ran(tmp_path / "b", 0.8, 0.2, 0.6), 1: ran(tmp_path / "c", 1.0, 0.2, 0.2)},
    }
    found = read(runs, {"c": COLUMN})
    (table,) = direction_tables(found)
    before, after = ([cell.order for cell in line] for line in table.rows)
    assert before[1:] == [1.0, 1.0, 2.0, 3.0, 4.0, 5.0]
    assert after[1:3] == [pytest.approx(0.5), pytest.approx(0.2)]
    assert table.rows[1][2].text == "0.2 (layer 1)"
    (drawing,) = direction_curves(found).values()
    lines = drawing.figure.axes[0].get_lines()
    assert [float(y) for y in lines[1].get_ydata()] == pytest.approx([0.9, 0.2, 0.4])
