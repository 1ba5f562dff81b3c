"""Parameters of a sweep that exist only where others have given values."""

from __future__ import annotations

import csv
from pathlib import Path
from typing import Any

import pytest
import yaml
from markupsafe import escape

from callbacks.judges.card import line
from callbacks.report.cells import MISSING
from callbacks.report.escape import markdown
from experiments.config.errors import ConfigError
from experiments.sweeps.definition import load_sweep
from experiments.sweeps.search import Search
from experiments.sweeps.space import Space, space_of
from experiments.sweeps.sweep_report import write_sweep
from experiments.sweeps.wandb_backend import wandb_sweep
from tests.support.sweeping import COLUMNS, Sweeping

GIVEN: dict[str, Any] = {
    "method": "grid",
    "metric": {"name": "eval/harmful/embedding/success_rate"},
    "config": ["x.yaml"],
    "columns": COLUMNS,
    # Out of order: what decides comes last.
    "parameters": {
        "a.steps": {"values": [1, 3]},
        "a.norm": {"value": "linf"},
        "rate": {"min": 1, "max": 2},
        "a": {"values": ["pgd", "one_step", "none"]},
        "method": {"values": ["cat", "npo"]},
    },
    "conditions": {"a.steps": {"a": "pgd"}, "a.norm": {"a": ["pgd", "one_step"]}, "a": {"method": "cat"}},
}


def given(folder: Path, **changes: Any) -> tuple[Any, Space]:
    path = folder / "sweep.yaml"
    path.write_text(yaml.safe_dump({**GIVEN, **changes}, sort_keys=False))
    sweep = load_sweep(path)
    return sweep, space_of(sweep)


def test_a_grid_has_every_combination_once_and_no_other(tmp_path: Path) -> None:
    sweep, space = given(tmp_path)
    search = Search(sweep, space, tmp_path, "study")
    found = [search.drawn(search.begin()) for _ in range(search.total)]
    expected: list[dict[str, Any]] = []
    for steps in (1, 3):
        for rate in (1, 2):
            expected.append({"method": "cat", "a": "pgd", "a.steps": steps, "rate": rate, "a.norm": "linf"})
    for rate in (1, 2):
        expected.append({"method": "cat", "a": "one_step", "rate": rate, "a.norm": "linf"})
        expected.append({"method": "cat", "a": "none", "rate": rate})
        expected.append({"method": "npo", "rate": rate})
    assert search.total == len(expected) == 10

    def sorted_(points: list[dict[str, Any]]) -> list[str]:
        return sorted(str(sorted(point.items())) for point in points)

    assert sorted_(found) == sorted_(expected)
    # A field of a class is set behind the class.
    assert all([*point].index("a") < [*point].index("a.norm") for point in found if "a.norm" in point)


@pytest.mark.parametrize("method", ["random", "bayes"])
def test_what_does_not_exist_is_not_drawn(method: str, tmp_path: Path) -> None:
    sweep, space = given(tmp_path, method=method, run_cap=14)
    search = Search(sweep, space, tmp_path, "study")
    for _ in range(14):
        trial = search.begin()
        values = search.drawn(trial)
        assert ("a" in values) == (values["method"] == "cat")
        assert ("a.steps" in values) == (values.get("a") == "pgd")
        assert ("a.norm" in values) == (values.get("a") in ("pgd", "one_step"))
        assert {*trial.params} == {*values} - {"a.norm"} and search.values_of(search.trials()[-1]) == values
        search.complete(trial, float(values["rate"]) + ("a" in values), {}, {})
    assert len({own.params.get("a.steps") for own in search.trials()}) > 1


def test_every_extreme_is_tried_where_it_exists(tmp_path: Path) -> None:
    _, space = given(tmp_path)
    by_key = {own.key: own for own in space.dimensions}
    corners = space.corners(by_key["a.steps"])
    assert [space.values(own)["a.steps"] for own in corners] == [1, 3]
    assert all(space.values(own) | {"a": "pgd", "method": "cat"} == space.values(own) for own in corners)
    # One that depends on npo and, through `a`, on cat.
    _, space = given(tmp_path, conditions={"a": {"method": "cat"}, "a.steps": {"a": "pgd", "method": "npo"}})
    with pytest.raises(ConfigError, match="conditions.a.steps: no trial fulfils it"):
        space.corners(next(own for own in space.dimensions if own.key == "a.steps"))


@pytest.mark.parametrize(
    ("conditions", "said"),
    [
        ([1], r"conditions: expected names with fields, got \[1\]"),
        ({"a.step": {"a": "pgd"}}, "conditions.a.step: expected one of .* did you mean 'a.steps'"),
        ({"a.steps": "pgd"}, "conditions.a.steps: expected another parameter with its values, got 'pgd'"),
        ({"a.steps": {"b": "pgd"}}, "conditions.a.steps.b: expected one of a.steps, "),
        ({"a.steps": {"a": "pdg"}}, 'conditions.a.steps.a: expected some of "pgd", .* got "pdg"'),
        ({"a.steps": {"a": []}}, "conditions.a.steps.a: expected some of .* got none"),
        ({"a.steps": {"rate": 1}}, "conditions.a.steps.rate: expected a parameter with `values`"),
        ({"a": {"a.steps": 1}, "a.steps": {"a": "pgd"}}, "conditions.a.steps: depends on itself, through a"),
        ({"a": {"a": "pgd"}}, "conditions.a: depends on itself, through a"),
    ],
)
def test_a_condition_that_cannot_be_is_told_in_one_line(conditions: Any, said: str, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=said) as caught:
        given(tmp_path, conditions=conditions)
    assert "\n" not in str(caught.value)


def test_weights_and_biases_cannot_say_a_condition(tmp_path: Path) -> None:
    sweep, _ = given(tmp_path)
    with pytest.raises(ConfigError, match="conditions: W&B's format has none; use --backend local"):
        wandb_sweep(str(tmp_path / "sweep.yaml"), sweep, tmp_path)


def test_trials_of_a_sweep_with_conditions_and_its_report(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    sweeping = Sweeping(tmp_path)
    engine = sweeping.engine(
        parameters={
            "vars.method": {"values": ["works", "works too"]},
            "vars.epsilon": {"min": 0.3, "max": 0.9, "q": 0.3, "distribution": "q_uniform"},
        },
        conditions={"vars.epsilon": {"vars.method": "works"}},
        figures=[{"x": "utility", "y": "embedding"}],
    )
    engine.run()
    assert len(sweeping.calls()) == 4 and engine.search.best() is not None
    text = write_sweep(engine.search, "x", sweeping.place)
    assert f"| works too | {MISSING} |" in text
    # What each judge's card says stands once under the tables, in both forms.
    page = (sweeping.place / "report.html").read_text()
    for judge in ("target_prefix@1", "exact_match@1"):
        assert text.count(f"- {markdown(line(judge))}") == page.count(str(escape(line(judge)))) == 1
    with (sweeping.place / "trials.csv").open() as stream:
        rows = [*csv.DictReader(stream)]
    assert [row["vars.epsilon"] for row in rows] == ["0.3", "0.6", "0.9", ""]
    assert (sweeping.place / "parallel.svg").is_file()
