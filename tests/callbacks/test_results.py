"""From rows on disk to numbers: the store, estimates, outcomes over a suite, RunResults."""

from __future__ import annotations

import json
import math
from pathlib import Path

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from callbacks.metrics.estimates import mean, newcombe_interval, paired_difference, rate, wilson_interval
from callbacks.metrics.names import WORST_CASE, WORST_CASE_TEXT, Metric
from callbacks.metrics.outcomes import BudgetCurve, cross_flags, success_by_budget, worst_case
from callbacks.report.load import export, load
from datamodules.line_files import pack
from datamodules.results import ResultsStore, read_measurements, read_rows
from datamodules.settings import describe, settings_digest
from lightning_modules.attacks.suffix.gcg import GCG
from lightning_modules.attacks.text.rewrites import Prefilling
from lightning_modules.models.fingerprint import fingerprint
from tests.conftest import tiny_model
from tests.support.rows import REFUSAL, measurement, row, stored, verdicts

# --- store


def test_rows_are_on_disk_and_the_later_one_counts(tmp_path: Path) -> None:
    store = ResultsStore(tmp_path)
    store.add([row("a"), row("b")])
    store.add([row("a", verdicts=verdicts(True)), row("b")])
    again = ResultsStore(tmp_path)
    assert [r.example for r in again] == ["a", "b"]
    assert again.get(row("a").identity) == row("a", verdicts=verdicts(True))
    assert again.get(row("c").identity) is None
    assert store.path.read_bytes().count(b"\n") == 3  # b was there already


def test_other_processes_rows_are_read(tmp_path: Path) -> None:
    ResultsStore(tmp_path, rank=1).add([row("b")])
    assert [r.example for r in ResultsStore(tmp_path, rank=0)] == ["b"]
    # What a padded distributed sampler would repeat counts once.
    ResultsStore(tmp_path, rank=0).add([row("b"), row("c")])
    assert sorted(r.example for r in read_rows(tmp_path)) == ["b", "c"]


def test_a_measurement_is_announced_once_and_by_the_first_process(tmp_path: Path) -> None:
    for rank in (0, 0, 1):
        store = ResultsStore(tmp_path, rank)
        store.announce([measurement(n=3), measurement(n=3)])
        assert [own.n for own in store.measurements] == [3]
    ResultsStore(tmp_path).announce([measurement(n=4)])
    assert [own.n for own in read_measurements(tmp_path)] == [4]
    path = tmp_path / "rows" / "measurements.jsonl"
    assert path.read_bytes().count(b"\n") == 2
    # Packed it is read as before, and what is announced later goes on behind it.
    pack(path, path.parent)
    path.unlink()
    assert [own.n for own in read_measurements(tmp_path)] == [4]
    ResultsStore(tmp_path).announce([measurement(n=5)])
    assert [own.n for own in read_measurements(tmp_path)] == [5]
    assert path.read_bytes().count(b"\n") == 1


def test_half_a_surrogate_pair_is_kept(tmp_path: Path) -> None:
    stored(tmp_path, row("a", reply="\ud800 \u2028 é"))
    assert read_rows(tmp_path)[0].reply == "\ud800 \u2028 é"


def test_identity_changes_with_weights_and_settings() -> None:
    model = tiny_model()
    before = fingerprint(model)
    assert before == fingerprint(tiny_model())
    with torch.no_grad():
        next(model.parameters()).view(-1)[0] += 1e-3
    assert fingerprint(model) != before
    assert settings_digest(GCG(width=64), 1) == settings_digest(GCG(width=64), 1)
    assert settings_digest(GCG(width=64), 1) != settings_digest(GCG(width=65), 1)
    assert "Prefilling" in describe(Prefilling(3))["class"]


def test_a_fingerprint_does_not_depend_on_the_number_of_threads() -> None:
    # Sums of floats do: a resumed evaluation on another machine would have attacked everything again.
    model, threads = torch.nn.Linear(300, 1000), torch.get_num_threads()
    try:
        found = set()
        for number in (1, 2, 3):
            torch.set_num_threads(number)
            found.add(fingerprint(model))
    finally:
        torch.set_num_threads(threads)
    assert len(found) == 1
    with torch.no_grad():
        weight = model.weight.view(-1)
        weight[[0, 1024]] = weight[[1024, 0]]  # moved within a column of the checksum
    assert fingerprint(model) not in found


# --- estimates


def test_wilson_interval_by_hand() -> None:
    # n = 10, 8 successes, z = 1.96: centre (0.8 + 0.19208) / 1.38416 = 0.71674, half-width 0.22660 (Wilson
    # 1927).
    assert wilson_interval(8, 10) == pytest.approx((0.49016, 0.94332), abs=2e-5)
    # A mean over three seeds of 8, 8 and 9: centre (0.83333 + 0.19208) / 1.38416 = 0.74082, half-width
    # 1.96 / 1.38416 * sqrt(0.13889 / 10 + 0.0096040) = 0.21702.
    assert wilson_interval(25 / 3, 10) == pytest.approx((0.52380, 0.95784), abs=2e-5)
    assert wilson_interval(0, 0) == (0.0, 1.0)
    assert wilson_interval(0, 20)[0] == 0.0
    assert math.isnan(rate([]).value)


@given(st.integers(0, 150), st.integers(1, 150))
def test_wilson_interval_holds_the_share(thirds: int, more: int) -> None:
    trials = (thirds + more + 2) // 3
    share = thirds / 3 / trials
    low, high = wilson_interval(thirds / 3, trials)
    assert 0 <= low <= share <= high <= 1
    # Its bounds are where the score test just rejects: |share - p| = z sqrt(p (1 - p) / n).
    for bound in (low, high):
        spread = 1.959964 * math.sqrt(bound * (1 - bound) / trials)
        assert abs(share - bound) == pytest.approx(spread, abs=1e-6)


def test_mean_with_interval_by_hand() -> None:
    # 1, 2, 3: mean 2, s = 1, half-width 1.95996 / sqrt 3.
    value = mean([1.0, 2.0, 3.0])
    assert value.value == 2.0
    assert value.high - 2.0 == pytest.approx(1.959964 / math.sqrt(3), abs=1e-6)
    assert (value.n, value.kind) == (3, "mean")
    assert (mean([4.0]).low, mean([4.0]).high) == (4.0, 4.0)


def test_paired_difference_by_the_papers_example() -> None:
    # Newcombe 1998, table III: 36 both, 12 only after, 2 only before, 0 neither gives 0.0569 to 0.3404.
    assert newcombe_interval(36, 12, 2, 0) == pytest.approx((0.0569, 0.3404), abs=5e-5)
    before = {str(i): i < 38 for i in range(50)} | {"only before": True}
    after = {str(i): i < 36 or i >= 38 for i in range(50)} | {"only after": True}
    found = paired_difference(before, after)
    assert found is not None
    assert (found.n, found.gained, found.lost, found.difference) == (50, 12, 2, 0.2)
    # Two-sided binomial, 2 or fewer and 12 or more of 14: 2 (1 + 14 + 91) / 2^14.
    assert found.p_value == pytest.approx(2 * 106 / 2**14)
    assert paired_difference({"a": True}, {"b": True}) is None
    same = paired_difference({"a": True, "b": False}, {"a": True, "b": False})
    assert same is not None
    assert (same.difference, same.p_value) == (0.0, 1.0)


@given(st.lists(st.tuples(st.booleans(), st.booleans()), min_size=1, max_size=30))
def test_the_paired_interval_holds_the_difference(pairs: list[tuple[bool, bool]]) -> None:
    before = {str(i): b for i, (b, _) in enumerate(pairs)}
    after = {str(i): a for i, (_, a) in enumerate(pairs)}
    found = paired_difference(before, after)
    assert found is not None
    assert -1 - 1e-9 <= found.low <= found.difference <= found.high <= 1 + 1e-9
    assert 0 <= found.p_value <= 1


# --- outcomes over a suite


def test_worst_case_counts_what_all_attacks_tried() -> None:
    assert worst_case([{"a": True, "b": False, "c": False}, {"b": True, "a": False}]) == {
        "a": True,
        "b": True,
    }
    assert worst_case([]) == {}


def test_success_by_budget_grows_to_the_rate() -> None:
    success = {"a": True, "b": True, "c": False, "d": True}
    spent = {"a": 10.0, "b": 40.0, "c": 99.0, "d": 20.0}
    assert success_by_budget(success, spent, points=3) == BudgetCurve([10.0, 20.0, 40.0], [0.25, 0.5, 0.75])
    assert success_by_budget({"a": False}, {"a": 1.0}) == BudgetCurve([], [])


def test_a_black_box_that_beats_every_white_box_is_flagged() -> None:
    success = {"gcg": {"a": False, "b": True, "c": False}, "noise": {"a": True, "b": True, "c": False}}
    assert cross_flags(success, {"gcg"}) == {"black_box_beats_white_box": 1}
    assert cross_flags({"noise": success["noise"]}, set()) == {}


# --- RunResults


def finished(folder: Path) -> None:
    """A `fit` that was evaluated before and after: two attacks, one of them on fewer rows, and utility."""
    store = ResultsStore(folder)
    for step in (0, 5):
        gcg = measurement(step=step, model=f"m{step}", refusal=REFUSAL, n=4)
        embedding = measurement(step=step, model=f"m{step}", attack="embedding", n=2)
        utility = measurement("exact_match", step=step, model=f"m{step}", subject="utility", n=2, judge="e@1")
        store.announce([gcg, embedding, utility])
        store.add(
            row(
                name,
                gcg,
                verdicts=verdicts(step == 0 or name == "d"),
                category="fraud" if name < "c" else "theft",
                loss_curve=[2.0, 1.0 if name < "c" else None],
                forward_passes=3,
                backward_passes=1,
                flags={"loss_not_reduced": name == "a"},
            )
            for name in "abcd"
        )
        store.add(row(name, embedding, step == 0, attacked=None) for name in "ab")
        store.add(row(name, utility, True) for name in "xy")


def test_run_results_are_computed_from_rows(tmp_path: Path) -> None:
    finished(tmp_path)
    results = load(tmp_path)
    before, after = results.before, results.after
    assert before is not None
    assert after is not None
    assert ([own.step for own in results.snapshots], after.model, after.complete) == ([0, 5], "m5", True)
    success = Metric("success_rate", "harmful", "gcg")
    measure = after.measures[success]
    assert (measure.estimate.value, measure.estimate.n, measure.judge) == (0.25, 4, "target_prefix@1")
    assert {name: own.value for name, own in measure.groups["category"].items()} == {"fraud": 0, "theft": 0.5}
    assert after.measures[Metric("success_rate", "harmful", WORST_CASE)].estimate.n == 2
    assert Metric("success_rate", "harmful", WORST_CASE_TEXT) not in after.measures  # one typed attack alone
    refused = after.measures[Metric("not_refused_rate", "harmful", "gcg")]
    assert (refused.estimate.value, refused.judge) == (0.25, REFUSAL)
    assert after.measures[Metric("passes_per_example", "harmful", "gcg")].estimate.value == 4
    assert after.measures[Metric("loss_best", "harmful", "gcg")].estimate.value == 1.5
    facts = after.attacks["gcg"]
    assert (facts.typed, facts.loss_curve, facts.flags) == (True, [2.0, 1.0], {"loss_not_reduced": 1})
    assert facts.budgets["passes"] == BudgetCurve([4.0], [0.25])
    assert not after.attacks["embedding"].typed
    difference = {own.metric: own for own in results.differences}[success]
    assert (difference.difference, difference.n, difference.lost, difference.gained) == (-0.75, 4, 3, 0)
    assert difference.p_value == 0.25


def test_a_cut_short_evaluation_is_not_complete(tmp_path: Path) -> None:
    plan = measurement(n=3)
    store = ResultsStore(tmp_path)
    store.announce([plan])
    store.add([row("a", plan), row("b", plan)])
    (own,) = load(tmp_path).snapshots
    assert not own.complete
    assert own.measures[Metric("success_rate", "harmful", "gcg")].estimate.n == 2


def test_a_later_measurement_replaces_an_earlier_one(tmp_path: Path) -> None:
    store = ResultsStore(tmp_path)
    for settings, right in (("old", True), ("new", False)):
        plan = measurement(settings=settings)
        store.announce([plan])
        store.add([row("a", plan, right)])
    (own,) = load(tmp_path).snapshots
    assert own.measures[Metric("success_rate", "harmful", "gcg")].estimate.value == 0
    assert own.attacks["gcg"].settings == "new"


def test_several_replies_to_one_example_count_once(tmp_path: Path) -> None:
    plan = measurement(n=1)
    store = ResultsStore(tmp_path)
    store.announce([plan])
    store.add(row("a", plan, i == 2, repetition=i, queries=5) for i in range(4))
    (own,) = load(tmp_path).snapshots
    estimate = own.measures[Metric("success_rate", "harmful", "gcg")].estimate
    assert (estimate.value, estimate.n) == (1, 1)
    assert own.measures[Metric("queries_per_example", "harmful", "gcg")].estimate.value == 20


def test_the_export_is_json_of_schema_3(tmp_path: Path) -> None:
    finished(tmp_path)
    content = json.loads(json.dumps(export(load(tmp_path)), allow_nan=False))
    assert (content["schema"], content["steps"], content["before"]["step"]) == (3, [0, 5], 0)
    assert content["after"]["measures"]["harmful/gcg/success_rate"]["n"] == 4
    assert content["differences"]["harmful/gcg/success_rate"]["lost"] == 3
    with pytest.raises(FileNotFoundError, match="rows: no results of `test`; run `thundercat test`"):
        load(tmp_path, "test")
