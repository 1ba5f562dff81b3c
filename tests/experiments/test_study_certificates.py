"""Certificates of a study's runs side by side: shares beyond radii, over seeds, to table and curve."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import pytest

from datamodules.results import ResultsStore
from experiments.config.errors import ConfigError
from experiments.studies.certificates import certificate_curves, certificate_tables, threat
from experiments.studies.comparison import read
from experiments.studies.definition import Column, check_columns
from tests.support.rows import measurement, row

COLUMN = Column("certified_rate", "harmful", block="certified")


def ran(folder: Path, radii: list[float | None]) -> Path:
    """A run whose test has certified requests within these radii; None: it abstained."""
    own = measurement(
        "certified_rate", stage="test", judge="smoothed@1", block="certified", n=len(radii), call="c"
    )
    store = ResultsStore(folder)
    store.announce([own])
    store.add(
        row(
            str(number),
            own,
            verdicts={"smoothed@1": {"verdict": radius is not None, "score": radius}},
            counts={"attackable": 4, "abstained": int(radius is None)},
        )
        for number, radius in enumerate(radii)
    )
    return folder


def test_shares_beyond_radii_of_the_largest_over_seeds(tmp_path: Path) -> None:
    runs = {
        "before": {0: ran(tmp_path / "a", [0.1, None, None, None])},
        "after": {
            0: ran(tmp_path / "b", [0.4, 0.4, 0.1, None]),
            1: ran(tmp_path / "c", [0.4, 0.2, 0.1, 0.1]),
        },
    }
    found = read(runs, {"c": COLUMN})
    (table,) = certificate_tables(found)
    assert table.title == "Certified: harmful refused (n = 4)"
    assert table.columns[1:5] == ["beyond 0 rho", "beyond 0.1 rho", "beyond 0.2 rho", "beyond 0.3 rho"]
    before, after = ([cell.order for cell in line] for line in table.rows)
    # Beyond is strictly beyond: a radius of 0.1 does not reach past itself.
    assert before[1:] == [0.25, 0.0, 0.0, 0.0, 0.1, 3.0]
    assert after[1:] == [7 / 8, 4 / 8, 3 / 8, 3 / 8, 0.4, 0.5]
    (drawing,) = certificate_curves(found).values()
    lines = drawing.figure.axes[0].get_lines()
    assert [line.get_label() for line in lines] == ["before", "after"]
    assert json.dumps([float(y) for y in lines[1].get_ydata()]) == "[87.5, 50.0, 37.5, 0.0]"


def test_a_column_may_ask_beyond_a_radius(tmp_path: Path) -> None:
    """2 of 4 lie beyond 0.1 (not the one at it), all but the abstention are certified at some radius."""
    column = replace(COLUMN, beyond=0.1)
    found = read({"a": {0: ran(tmp_path, [0.4, 0.2, 0.1, None])}}, {"all": COLUMN, "far": column})["a"]
    assert (found.rates["all"].value, found.rates["far"].value) == (0.75, 0.5)
    assert found.by_seed[0][column.metric].outcome == {"0": True, "1": True, "2": False, "3": False}
    assert column.metric.key == "harmful/certified/certified_rate/beyond_0.1"
    assert column.metric.title == "certified: certified as one wishes, beyond 0.1 rho, harmful"
    with pytest.raises(ConfigError, match="columns.x.beyond: only certified_rate has radii, got it"):
        check_columns({"x": Column("exact_match", "utility", beyond=0.1)})


def test_seeds_on_other_requests_are_refused(tmp_path: Path) -> None:
    runs = {"after": {0: ran(tmp_path / "b", [0.4, None]), 1: ran(tmp_path / "c", [0.4])}}
    with pytest.raises(
        ValueError, match=r"certified harmful requests: expected equally many a seed, got \[1, 2\]"
    ):
        certificate_tables(read(runs, {}))


def test_runs_without_certificates_have_no_table(tmp_path: Path) -> None:
    own = measurement("refusal_rate", stage="test", judge="keyword@1", call="c")
    store = ResultsStore(tmp_path)
    store.announce([own])
    store.add([row("a", own)])
    rows = read({"a": {0: tmp_path}}, {"c": Column("refusal_rate", "harmful")})
    assert certificate_tables(rows) == [] and certificate_curves(rows) == {} and threat(rows) == []
