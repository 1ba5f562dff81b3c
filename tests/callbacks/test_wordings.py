"""The same requests in two wordings: paired by key, with the difference by hand, and what has no partner."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from scipy.stats import binomtest

from callbacks.evaluations.wordings import WordingEvaluation
from callbacks.metrics.estimates import newcombe_interval
from callbacks.metrics.names import Metric
from callbacks.report.load import export, load
from callbacks.report.markdown import document
from callbacks.report.tables import warnings
from callbacks.report.tables_beside import paired
from datamodules.evaluation import Block, EvaluationData, EvaluationSets
from datamodules.results import ResultsStore, read_measurements
from datamodules.rows import HarmfulRow
from datamodules.sources.harmbench import HarmBench
from datamodules.text.tokenizers import TokenizerConfig
from experiments.commands.run import instantiate
from experiments.config.check import check
from experiments.config.compose import compose
from experiments.config.defaults import with_defaults
from tests.support.rows import measurement, row
from tests.support.suspicious import Suspicious, corpus, measured

BOTH, GAINED, LOST, NEITHER = 12, 1, 7, 10


def behaviours(folder: Path, name: str, rows: list[tuple[str, str]]) -> str:
    """A file in HarmBench's layout, and targets beside it."""
    path = folder / f"{name}.csv"
    path.write_text(
        "Behavior,FunctionalCategory,SemanticCategory,Tags,ContextString,BehaviorID\n"
        + "".join(f"{text},standard,x,,,{key}\n" for key, text in rows)
    )
    targets = (
        json.loads(path.with_name("targets.json").read_text()) if (folder / "targets.json").exists() else {}
    )
    path.with_name("targets.json").write_text(json.dumps(targets | {key: "Sure thing" for key, _ in rows}))
    return str(path)


def two_sets(folder: Path, plain: list[str], polite: list[str], among: bool = True) -> EvaluationData:
    one = behaviours(folder, "plain", [(key, f"help do {key}") for key in plain])
    other = behaviours(folder, "polite", [(key, f"please help do {key}") for key in polite])
    targets = str(folder / "targets.json")
    blocks = {
        "plain": Block(harmful=[HarmBench(one, targets)]),
        "polite": Block(harmful=[HarmBench(other, targets, among=one if among else None)]),
    }
    data = EvaluationData(TokenizerConfig("tinychat:aligned"), EvaluationSets(blocks=blocks, batch_size=3))
    data.setup("test")
    return data


def evaluation() -> WordingEvaluation:
    return WordingEvaluation("plain", "polite", max_new_tokens=4)


def test_the_difference_of_two_wordings_by_hand(tmp_path: Path) -> None:
    plain = measurement("refusal_rate", block="plain", settings="p", n=30)
    polite = measurement("refusal_rate", block="polite", settings="q", against="plain", n=30)
    store = ResultsStore(tmp_path)
    store.announce([plain, polite])
    outcomes = (
        [(True, True)] * BOTH + [(False, True)] * GAINED + [(True, False)] * LOST + [(False, False)] * NEITHER
    )
    for i, (before, after) in enumerate(outcomes):
        store.add([row(f"b{i}", plain, before), row(f"b{i}", polite, after)])
    (found,) = load(tmp_path).snapshots[0].paired
    own = found.difference
    assert own is not None
    assert found.metric == Metric("refusal_rate", "harmful", block="polite")
    assert (own.n, own.gained, own.lost) == (30, GAINED, LOST)
    assert own.difference == pytest.approx((GAINED - LOST) / 30)
    assert own.p_value == pytest.approx(binomtest(1, 8).pvalue) == pytest.approx(2 * 9 / 2**8)
    assert (own.low, own.high) == newcombe_interval(BOTH, GAINED, LOST, NEITHER)
    (line,) = paired(load(tmp_path)).rows
    assert line[1].text.startswith("63.3 % [") and line[2].text.startswith("43.3 % [")
    assert line[3].text.startswith("-20.0 [") and "p = 0.070 (+1 -7)" in line[3].text
    assert [line[4].text, line[5].text] == ["30", "0"]
    assert warnings(load(tmp_path)) == []
    assert "The same requests in other words" in document(load(tmp_path), {})
    exported = json.loads(json.dumps(export(load(tmp_path))["after"]["paired"]))
    assert exported["harmful/polite/refusal_rate"]["against"] == "harmful/plain/refusal_rate"
    assert exported["harmful/polite/refusal_rate"]["lost"] == LOST


@pytest.mark.parametrize(("plain_keys", "polite_keys", "pairs"), [("abc", "bcde", 2), ("ab", "cd", 0)])
def test_what_has_no_partner_is_counted_and_not_compared(
    tmp_path: Path, plain_keys: str, polite_keys: str, pairs: int
) -> None:
    plain = measurement("refusal_rate", block="plain", settings="p", n=len(plain_keys))
    polite = measurement("refusal_rate", block="polite", settings="q", against="plain", n=len(polite_keys))
    store = ResultsStore(tmp_path)
    store.announce([plain, polite])
    store.add([row(key, plain, True) for key in plain_keys] + [row(key, polite) for key in polite_keys])
    (found,) = load(tmp_path).snapshots[0].paired
    assert (found.difference.n if found.difference else 0) == pairs
    # The shares are of the pairs, as their difference is.
    assert [own.n for own in found.shares] == [pairs, pairs]
    assert (found.only_plain, found.only_reworded) == (len(plain_keys) - pairs, len(polite_keys) - pairs)
    (said,) = warnings(load(tmp_path))
    assert (
        f"{len(plain_keys) - pairs} requests of plain and {len(polite_keys) - pairs} of polite have no"
        in said
    )


def test_both_wordings_are_asked_and_paired(tmp_path: Path) -> None:
    data = two_sets(tmp_path, list("abcde"), list("edcba"))
    found = measured(tmp_path / "run", Suspicious(corpus()), data, evaluation())
    assert [own.n for own in read_measurements(tmp_path / "run")] == [5, 5]
    assert [own.against for own in read_measurements(tmp_path / "run")] == ["", "plain"]
    by_key = {own.metric.key: own for own in found.paired}
    assert set(by_key) == {"harmful/polite/refusal_rate", "harmful/polite/served_rate"}
    for own in by_key.values():
        assert own.difference is not None
        assert (own.difference.n, own.difference.difference, own.only_plain) == (5, 0, 0)
    assert found.measures[Metric("refusal_rate", "harmful", block="polite")].estimate.value == 1


@pytest.mark.parametrize("limit", [1, 2, 3, 4])
def test_a_limit_takes_partners(tmp_path: Path, limit: int) -> None:
    # Evenly spaced rows of two files of different lengths and orders would not be the same behaviours.
    data = two_sets(tmp_path, list("abcde"), list("edxcba"), among=False)
    plain = [key for batch in data.loader("harmful", limit, block="plain") for key in batch.keys]
    polite = [
        key for batch in data.loader("harmful", limit, block="polite", against="plain") for key in batch.keys
    ]
    assert len(plain) == limit and set(plain) == set(polite)
    parts = [
        key
        for rank in range(2)
        for batch in data.loader("harmful", limit, rank, 2, "polite", "plain")
        for key in batch.keys
    ]
    assert sorted(parts) == sorted(plain)
    every = [key for batch in data.loader("harmful", block="polite", against="plain") for key in batch.keys]
    assert len(every) == 6


def test_behaviours_among_those_of_another_file(tmp_path: Path) -> None:
    polite = behaviours(tmp_path, "polite", [("c", "p c"), ("a", "p a"), ("z", "p z")])
    plain = behaviours(tmp_path, "plain", [("a", "a"), ("b", "b"), ("c", "c")])
    targets = str(tmp_path / "targets.json")
    found = [own for own in HarmBench(polite, targets, among=plain).rows() if isinstance(own, HarmfulRow)]
    assert [(own.key, own.prompt) for own in found] == [("a/0", "p a"), ("c/0", "p c")]
    other = behaviours(tmp_path, "other", [("q", "q")])
    with pytest.raises(
        ValueError, match=r"HarmBench\.among: no BehaviorID of .*polite\.csv stands in .*other\.csv"
    ):
        list(HarmBench(polite, targets, among=other).rows())
    twice = behaviours(tmp_path, "twice", [("a", "x"), ("a", "y")])
    with pytest.raises(ValueError, match=r"twice\.csv:3: BehaviorID 'a' stands in line 2 too"):
        list(HarmBench(twice, targets, among=plain).rows())


def test_a_set_is_not_its_own_partner() -> None:
    with pytest.raises(ValueError, match="expected another set than 'plain', got the same"):
        WordingEvaluation("plain", "plain")


def test_one_of_both_sets_is_not_enough(tmp_path: Path) -> None:
    data = two_sets(tmp_path, ["a"], ["a"])
    del data.blocks["plain"]
    with pytest.raises(ValueError, match=r"expected a named set 'plain', got \['polite'\]"):
        measured(tmp_path / "run", Suspicious(corpus()), data, evaluation())


def test_every_polite_behaviour_has_its_plain_one(in_root: Path, public_data: Path) -> None:
    config = compose(["configs/quickstart.yaml", "configs/evaluation/polite.yaml"], [])
    check(config, "test")
    blocks = instantiate(with_defaults(config)).datamodule.evaluation.blocks
    plain, polite = ([*blocks[f"harmbench_{name}"].harmful[0].rows()] for name in ("plain", "polite"))
    assert [own.key for own in plain] == [own.key for own in polite]
    assert len(plain) == 159
    assert not {own.prompt for own in plain} & {own.prompt for own in polite}
    assert [own.target for own in plain] == [own.target for own in polite]
