"""What a study's report says beside its main table: categories, correlations, costs, curves."""

from __future__ import annotations

import csv
import html
import json
import math
import re
import shutil
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import yaml

from callbacks.metrics.hierarchical import SeedDifference, SeedRate
from callbacks.metrics.names import Metric
from callbacks.report.events import Events, events
from callbacks.report.measured import Measured
from datamodules.results import ResultsStore
from experiments.commands.study import StudyCall, study
from experiments.config.errors import ConfigError
from experiments.studies.answers import answers
from experiments.studies.categories import by_category, tail
from experiments.studies.comparison import Compared
from experiments.studies.correlation import correlation
from experiments.studies.definition import Claim, Column, Study, StudyRun
from experiments.studies.study_report import cells, exported
from tests.support.rows import measurement, row

BASE = "configs/experiment/methods_tinychat.yaml"
SUCCESS = {"quantity": "success_rate", "subject": "harmful", "attack": "gcg"}
LOSS = {"quantity": "loss_best", "subject": "harmful", "attack": "gcg"}
STUDY: dict[str, Any] = {
    "title": "Recorded",
    "runs": {
        **{f"run {i}": {"config": [BASE]} for i in range(4)},
        "read by others": {"config": [BASE], "trained": False, "reported": False},
    },
    "columns": {"GCG": SUCCESS, "GCG: loss": LOSS},
    "correlations": [{"x": "GCG", "y": "GCG: loss"}, {"x": "GCG", "y": "GCG"}],
    "categories": ["GCG"],
    "curves": ["gcg", "pgd"],
}


def recorded(place: Path) -> Path:
    """Run i: GCG wins i of the 8 fires and i / 2 of the 4 floods; its loss ends at 3 - i."""
    for i in range(4):
        folder = place / "runs" / f"run_{i}" / "seed0"
        store, plan = ResultsStore(folder), measurement(stage="test", attack="gcg", n=12)
        store.announce([plan])
        kinds = ["fire"] * 8 + ["flood"] * 4
        won = [k < i for k in range(8)] + [k < i // 2 for k in range(4)]
        store.add(row(str(k), plan, won[k], category=kinds[k], loss_curve=[4.0, 3.0 - i]) for k in range(12))
        cost = {"steps": 10, "adversarial_examples": 80, "passes": 960, "seconds": 5.0}
        cost |= {"attack_forward_per_example": 10.0 * i, "attack_backward_per_example": None}
        (folder / "cost.json").write_text(json.dumps(cost))
        (folder / "test_environment.json").write_text('{"git": {"revision": "abc", "modified": false}}')
    return place


def call(tmp_path: Path, place: Path, **changes: object) -> StudyCall:
    path = tmp_path / "beside.yaml"
    path.write_text(yaml.safe_dump(STUDY | changes))
    return StudyCall(str(path), out=str(tmp_path / "out"), recorded=str(place))


def test_recorded_rows_answer_another_study(
    tmp_path: Path, in_root: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    place = recorded(tmp_path / "report")
    (tmp_path / "out").mkdir()
    mine = tmp_path / "out" / "figure_of_mine.svg"
    mine.write_text("of nobody's study")
    stale = [tmp_path / "out" / name for name in ("figure_7.svg", "curve_1.svg")]
    for path in stale:
        path.write_text("of another study")
    assert study(call(tmp_path, place)) == 0
    assert not any(path.exists() for path in stale) and mine.exists()
    said = capsys.readouterr().out
    assert "read by others" not in said
    # 3 of 8; flood has 4 examples, which are too few for a category.
    assert "## GCG, by category; of fewer than 5 examples, left out: flood (4)" in said
    assert "| run | fire (n = 8) | CVaR: mean of the worst 25 % of categories |" in said
    # Wilson's z^2 / (8 + z^2) where nothing happened.
    assert "| run 0 | 0 [0, 32] | 0 |" in said and "\n| run 3 | 38 [" in said
    # Successes 0, 1, 3, 4 of 12 against losses 3, 2, 1, 0.
    assert "| GCG: loss against GCG | 4 | -0.99 [-1.00, -0.59] | p = 0.010 | -1.00 | p < 0.001 |" in (
        said.replace("&lt;", "<")
    )
    assert "| run 2 | 10 | 8 | 20 | - | 960 | 0.5 | - |" in said
    curve = (tmp_path / "out" / "curve_0.svg").read_text()
    assert "run 3" in curve
    # What was recorded stays where it is, as it was.
    assert not (tmp_path / "out" / "runs").exists()
    with pytest.raises(
        ConfigError, match="--recorded: no run 'run 0' in .*nowhere.* by --only the runs that"
    ):
        study(call(tmp_path, tmp_path / "nowhere"))
    # A folder that lacks runs of the study says which; its page is drawn in place from its rows.
    shutil.rmtree(place / "runs" / "run_3")
    before = {path: path.read_bytes() for path in place.rglob("*.*")}
    assert study(replace(call(tmp_path, place), out=str(place), only=["run 0", "run 2"])) == 0
    report = (place / "report.md").read_text()
    assert "| run 3 | not recorded |" in report and "| run 2 | 25 [" in report
    # So does one that lacks seeds: a mean over fewer is not the study's.
    assert study(replace(call(tmp_path, place, seeds=[0, 3]), only=["run 0"])) == 0
    report = (tmp_path / "out" / "report.md").read_text()
    assert "| run 0 | 0 [" in report and "| run 0, seed 3 | not recorded |" in report
    assert {path: path.read_bytes() for path in before} == before
    with pytest.raises(ConfigError, match="--recorded: .*no 'u' .utility/exact_match."):
        columns = {"u": {"quantity": "exact_match", "subject": "utility"}}
        asked = call(tmp_path, place, columns=columns, correlations=[], categories=[])
        study(replace(asked, only=["run 0", "run 2"]))


@pytest.mark.parametrize("option", ["dry_run", "report_only"])
def test_recorded_rows_are_reported_or_nothing_is(option: str, tmp_path: Path, in_root: Path) -> None:
    place = recorded(tmp_path / "report")
    with pytest.raises(ConfigError, match=f"--recorded: .*, got --{option} beside it; leave one of them"):
        study(replace(call(tmp_path, place), **{option: True}))
    assert not (tmp_path / "out").exists()


def test_every_cell_of_every_table_is_in_a_file_for_other_programs(tmp_path: Path, in_root: Path) -> None:
    claims = [{"question": "More?", "first": "run 1", "second": "run 3", "columns": ["GCG", "GCG: loss"]}]
    runs = {name: dict(own) for name, own in STUDY["runs"].items()}
    runs["run 1"]["paper"] = {"forward": 2565, "passes": 165632000}
    assert study(call(tmp_path, recorded(tmp_path / "report"), claims=claims, runs=runs)) == 0
    with (tmp_path / "out" / "tables.csv").open(newline="", encoding="utf-8") as stream:
        lines = [*csv.DictReader(stream)]
    report = (tmp_path / "out" / "report.md").read_text(encoding="utf-8")
    for title, body in re.findall(r"^## (.*)\n\n\|.*\n\| ---.*\n((?:\|.*\n)+)", report, re.MULTILINE):
        own = [line["text"] for line in lines if line["table"] == title]
        shown = [text for line in body.splitlines() for text in line.strip("| ").split(" | ")]
        assert own == [html.unescape(text) for text in shown] and len(own) > 4
    assert all(own["low"] and own["high"] for own in lines if re.search(r"\[[-+]?[\d.]+, ", own["text"]))
    found = {(own["table"], own["name"], own["column"]): own for own in lines}
    assert len({table for table, _, _ in found}) == report.count("## ") == 5
    r = found["Correlations", "GCG: loss against GCG", "Pearson's r"]
    # Successes less their mean -2, -1, 1, 2; losses 1.5, 0.5, -0.5, -1.5.
    assert float(r["value"]) == pytest.approx(-7 / math.sqrt(10 * 5))
    assert float(r["low"]) < -0.99 < float(r["high"]) < -0.5
    more = [own for own in lines if (own["table"], own["column"]) == ("Questions", "difference")]
    assert [float(own["value"]) for own in more] == pytest.approx([3 / 12, -2.0])
    assert all(float(own["low"]) <= float(own["value"]) <= float(own["high"]) for own in more)
    cost = {column: own["text"] for (table, name, column), own in found.items() if name == "run 1"}
    assert (cost["paper: forward"], cost["paper: passes in all"]) == ("2,565", "165,632,000")
    assert found["Cost of training", "run 2", "paper: forward"]["text"] == cost["paper: backward"] == "-"


@pytest.mark.parametrize("field", ["correlations", "categories"])
def test_what_is_asked_beside_the_table_must_be_a_column(field: str, tmp_path: Path) -> None:
    wrong = {"correlations": [{"x": "GCG", "y": "PGD"}], "categories": ["PGD"]}
    with pytest.raises(ConfigError, match=rf"{field}.0(.y)?: expected one of GCG, GCG: loss, got 'PGD'"):
        study(call(tmp_path, tmp_path, **{field: wrong[field]}))


def test_success_by_a_judge_beside_the_deciding_one_is_told_by_category(tmp_path: Path) -> None:
    """Fire 2 of 4, flood 0 of 4; the trend by prefix says nothing of it. The worst is the highest."""
    judge = "success@abc"
    plan = measurement(stage="test", attack="gcg", judges=[judge], n=8)
    won = {str(k): k < 2 for k in range(8)}
    rows = [row(key, plan, category="fire" if int(key) < 4 else "flood") for key in won]
    for own in rows:
        own.verdicts[judge]["verdict"] = won[own.example]
    happened = {
        event.metric: event for event in events([Measured(plan, {own.example: [own] for own in rows})])
    }
    columns = {
        "success": Column("judged_rate", "harmful", "gcg", judge=judge),
        "nobody's": Column("refusal_rate", "harmful"),
    }
    asked = Study(
        title="t", runs={}, columns=columns, categories=["success", "nobody's"], smallest_category=2
    )
    told, none = by_category(asked, {"cat": Compared({}, {}, 0.0, {0: happened})})
    assert told.columns[1:-1] == ["fire (n = 4)", "flood (n = 4)"]
    assert [cell.text[:2] for cell in told.rows[0][1:]] == ["50", "0 ", "50"]
    assert none.title == "nobody's, by category: no run has examples of two or more"


def test_the_worst_categories_are_those_where_the_quantity_is_worst() -> None:
    # A quarter of five is two: 90 and 50 %, or 10 and 20 %.
    own = (0.1, 0.5, 0.9, 0.3, 0.2)
    assert tail(own, Metric("success_rate", "harmful", "gcg")) == pytest.approx(0.7)
    assert tail(own, Metric("refusal_rate", "harmful")) == pytest.approx(0.15)
    assert tail(own, Metric("served_rate", "harmful")) is None
    assert tail((), Metric("accuracy", "utility")) is None


def test_a_category_counts_as_many_examples_as_the_run_with_the_fewest_has_of_it() -> None:
    metric = Metric("refusal_rate", "harmful")

    def run(**sizes: int) -> Compared:
        kinds = {f"{kind}{k}": kind for kind, size in sizes.items() for k in range(size)}
        return Compared(
            {}, {}, 0.0, {0: {metric: Events(metric, "j", dict.fromkeys(kinds, True), categories=kinds)}}
        )

    told = {"title": "t", "runs": {}, "columns": {"refuses": Column("refusal_rate", "harmful")}}
    own = Study(**told, categories=["refuses"], smallest_category=3)
    few, many = run(fire=4, flood=2, ash=4), run(fire=6, flood=6)
    for runs in ({"few": few, "many": many}, {"many": many, "few": few}):
        (table,) = by_category(own, runs)
        assert table.title.endswith("of fewer than 3 examples, left out: ash (0), flood (2)")
        assert table.columns[1:-1] == ["fire (n = 4)"]


def test_a_category_is_told_over_all_seeds_and_from_so_many_examples_on() -> None:
    metric = Metric("refusal_rate", "harmful")
    kinds = {str(k): "fire" if k < 6 else "flood" for k in range(9)}
    wins = {0: range(9), 1: range(6)}  # the second seed refuses no flood
    happened = {
        seed: {metric: Events(metric, "j", {key: int(key) in own for key in kinds}, categories=kinds)}
        for seed, own in wins.items()
    }
    runs = {"cat": Compared({}, {}, 0.0, happened)}
    told = {"title": "t", "runs": {}, "columns": {"refuses": Column("refusal_rate", "harmful")}}
    (table,) = by_category(Study(**told, categories=["refuses"], smallest_category=3), runs)
    assert table.title == "refuses, by category"
    # Flood: one seed all, the other nothing; their mean is drawn as 0, 1/2 and 1.
    assert [cell.text for cell in table.rows[0]] == ["cat", "100 [61, 100]", "50 [0, 100]", "50"]
    assert [cell.interval for cell in table.rows[0][1:]] == [
        (pytest.approx(0.61, abs=0.005), 1.0),
        (0.0, 1.0),
        None,
    ]
    (table,) = by_category(Study(**told, categories=["refuses"], smallest_category=7), runs)
    assert table.title.endswith("of fewer than 7 examples, left out: fire (6), flood (3)")
    assert [cell.text for cell in table.rows[0]] == ["cat", "-"]


def test_a_correlation_needs_points_that_vary() -> None:
    assert correlation([1, 2, 3], [1, 2, 3]) is None
    assert correlation([1, 2, 3, 4], [1, 1, 1, 1]) is None
    # Hand-made: r = 8 / 10 for ranks 1..5 with two neighbours exchanged twice.
    found = correlation([1, 2, 3, 4, 5], [2, 1, 4, 3, 5])
    assert found is not None and (found.n, found.r, found.rank) == (5, pytest.approx(0.8), pytest.approx(0.8))
    # Fisher: tanh(atanh(0.8) -+ 1.96 / sqrt(2)).
    assert (found.low, found.high) == (pytest.approx(-0.2798, abs=1e-3), pytest.approx(0.9862, abs=1e-3))


def test_a_checkpoint_on_the_way_is_not_said_to_have_cost_nothing() -> None:
    runs = {"cat": StudyRun(["a.yaml"]), "early": StudyRun(checkpoint_of="cat", step=5)}
    rows = {name: Compared({}, {}, 120.0 if name == "cat" else 0.0) for name in runs}
    own = Study(title="t", runs=runs, columns={})
    assert [row[-1].text for row in cells(own, rows).rows] == ["120", "-"]
    assert [run["passes"] for run in exported(own, rows).values()] == [120.0, None]


def test_a_loss_is_measured_as_its_attack_is() -> None:
    """Losses of another budget had been compared in silence: they are no events of their own."""
    loss, won = Metric("loss_best", "harmful", "gcg"), Metric("success_rate", "harmful", "gcg")

    def one(settings: str) -> Compared:
        attacked = {0: {won: Events(won, "judge", {"a": True, "b": False}, settings=settings)}}
        means = {"loss": SeedRate(1.0, 0.0, 2.0, (1.0,), 2)}
        return Compared({}, means, 0.0, attacked, losses={0: {loss: {"a": 1.0, "b": 2.0}}})

    columns = {"loss": Column("loss_best", "harmful", "gcg")}
    for settings, alike in (("500 steps", True), ("10 steps", False)):
        runs = {"x": one("500 steps"), "y": one(settings)}
        (answer,) = answers(runs, [Claim("?", "x", "y", ["loss"])], columns)
        assert answer.measured_alike is alike


def test_losses_are_compared_example_by_example_over_all_seeds() -> None:
    """Changes 1, 2, 3: mean 2, s = 1, t = 4.303 of two degrees of freedom: 2 +- 4.303 / sqrt(3)."""
    metric = Metric("loss_best", "harmful", "gcg")
    first, second = {"a": 0.0, "b": 5.0, "c": 9.0}, {"c": 12.0, "a": 1.0, "b": 7.0}

    def one(*by_seed: dict[str, float]) -> Compared:
        means = {"loss": SeedRate(1.0, 0.0, 2.0, (1.0,) * len(by_seed), 3)}
        return Compared({}, means, 0.0, losses={seed: {metric: own} for seed, own in enumerate(by_seed)})

    def difference(before: Compared, after: Compared) -> SeedDifference:
        claim = Claim("?", "x", "y", ["loss"])
        columns = {"loss": Column("loss_best", "harmful", "gcg")}
        (answer,) = answers({"x": before, "y": after}, [claim], columns)
        return answer.difference

    paired = difference(one(first), one(second))
    assert paired.value == pytest.approx(2.0)
    assert (paired.low, paired.high) == pytest.approx((2 - 2.4841, 2 + 2.4841), abs=1e-3)
    # Two seeds alike say what one does; two that differ say less.
    alike = difference(one(first, first), one(second))
    assert (alike.value, alike.low, alike.high) == pytest.approx((paired.value, paired.low, paired.high))
    apart = difference(one(first, {"a": 2.0, "b": 7.0, "c": 11.0}), one(second))
    assert apart.value == pytest.approx(1.0)
    assert apart.high - apart.low > paired.high - paired.low
    for other in ({"a": 1.0, "b": 7.0}, {"a": 1.0, "b": 7.0, "d": 12.0}):
        assert difference(one(first), one(other)).value == pytest.approx(0.0)
