"""Benign prompts under attack, sampled replies and named sets: the numbers, the flag, and resumption."""

from __future__ import annotations

import json
import shutil
from dataclasses import replace
from pathlib import Path

import pytest

from callbacks.evaluations.benign import BenignUnderAttack
from callbacks.evaluations.blocks import BlockEvaluation
from callbacks.evaluations.refusal import RefusalEvaluation
from callbacks.evaluations.robustness import RobustnessEvaluation
from callbacks.evaluations.sampling import Sampling
from callbacks.evaluations.schedule import Schedule
from callbacks.evaluations.session import Place, Session
from callbacks.metrics.names import WORST_CASE, Metric
from callbacks.report.load import export, load
from callbacks.report.tables import rates, warnings
from datamodules.evaluation import Block
from datamodules.results import ResultsStore, read_measurements, read_rows
from datamodules.sources.replay import RedTeamReplay
from datamodules.sources.tinychat.sources import TinyChatBenign, TinyChatHarmful
from lightning_modules.attacks.base import Attack
from lightning_modules.attacks.embedding.pgd import EmbeddingPGD
from lightning_modules.attacks.embedding.soft_prompt import SoftPrompt
from lightning_modules.attacks.suffix.initial_suffix import InitialSuffix
from lightning_modules.attacks.text.rewrites import DirectRequest, Prefilling
from lightning_modules.attacks.training.mixture import Mixture
from tests.conftest import chat_model
from tests.support.rows import JUDGE, measurement, row
from tests.support.suspicious import Suspicious, corpus, measured

MARK = "x x"


def suite(sampling: Sampling | None = None, **attacks: Attack) -> RobustnessEvaluation:
    named: dict[str, Attack] = {"direct": DirectRequest(), "initial_suffix": InitialSuffix(8)}
    return RobustnessEvaluation(
        named | attacks, benign=BenignUnderAttack(limit=6), max_new_tokens=4, sampling=sampling
    )


def refused(attack: str) -> Metric:
    return Metric("over_refusal_rate", "harmless", attack)


def solved(attack: str) -> Metric:
    return Metric("exact_match", "utility", attack)


# --- the flag


def test_a_model_that_refuses_every_suffix_is_found_out(tmp_path: Path) -> None:
    data = corpus()
    found = measured(tmp_path, Suspicious(data, [MARK]), data, suite(), RefusalEvaluation())
    n = len(data.examples["harmless"])
    assert n == 10
    assert found.measures[refused("")].estimate.value == 0
    assert found.measures[refused("direct")].estimate.value == 0
    assert found.measures[refused("initial_suffix")].estimate.value == 1
    assert found.measures[refused("initial_suffix")].estimate.n == 6  # BenignUnderAttack.limit
    assert found.measures[solved("initial_suffix")].estimate.value == 0
    own = found.benign["initial_suffix"]
    assert own.refuses_what_carries_it
    assert own.fall is not None
    assert own.fall.difference == -1
    assert not found.benign["direct"].refuses_what_carries_it
    results = load(tmp_path, "test")
    (said,) = [text for text in warnings(results) if "refuses what carries it" in text]
    assert said.startswith("initial suffix: ")
    assert "100 % of 6 harmless prompts are refused" in said
    table = rates(results)
    by_title = {line[0].text: dict(zip(table.columns, line, strict=True)) for line in table.rows}
    line = by_title["initial suffix: target prefix (a trend, not success)"]
    assert line["benign refused under it"].text.startswith("100.0 % [")
    assert line["utility under it"].text.startswith("0.0 % [")
    assert by_title["direct: target prefix (a trend, not success)"]["utility under it"].text.startswith(
        "100.0 % ["
    )


def test_a_model_that_refuses_nothing_benign_is_not_flagged(tmp_path: Path) -> None:
    data = corpus()
    found = measured(tmp_path, Suspicious(data), data, suite())
    assert found.measures[refused("initial_suffix")].estimate.value == 0
    assert found.measures[solved("initial_suffix")].estimate.value == 1
    assert not any(own.refuses_what_carries_it for own in found.benign.values())
    assert not any("refuses what carries it" in text for text in warnings(load(tmp_path, "test")))


@pytest.mark.parametrize(("refusals", "lost", "flagged"), [(1, 1, False), (2, 0, True), (0, 2, True)])
def test_the_flag_is_raised_from_a_fifth_on(tmp_path: Path, refusals: int, lost: int, flagged: bool) -> None:
    plans = {
        (subject, attack): measurement(
            quantity, subject=subject, attack=attack, n=10, settings=f"{subject}{attack}", judge=JUDGE
        )
        for subject, quantity in (("harmless", "over_refusal_rate"), ("utility", "exact_match"))
        for attack in ("", "gcg")
    }
    store = ResultsStore(tmp_path)
    store.announce(plans.values())
    for (subject, attack), plan in plans.items():
        for i in range(10):
            event = (i >= lost if attack else True) if subject == "utility" else bool(attack) and i < refusals
            store.add([row(f"{subject}{i}", plan, event)])
    (found,) = load(tmp_path).snapshots
    own = found.benign["gcg"]
    assert own.refused is not None
    assert own.fall is not None
    assert (own.refused.value, own.fall.difference) == (refusals / 10, -lost / 10)
    assert own.refuses_what_carries_it is flagged
    exported = export(load(tmp_path))["after"]["benign"]["gcg"]
    assert json.loads(json.dumps(exported))["refuses_what_carries_it"] is flagged


def test_what_is_done_to_benign_prompts_is_no_attack_on_harmful_ones(tmp_path: Path) -> None:
    data = corpus()
    found = measured(tmp_path, Suspicious(data, [MARK]), data, suite())
    assert set(found.attacks) == {"direct", "initial_suffix"}
    worst = found.measures[Metric("success_rate", "harmful", WORST_CASE)]
    assert worst.estimate.n == len(data.examples["harmful"])
    assert not [m for m in found.measures if m.quantity == "success_rate" and m.subject != "harmful"]
    # A benign task that was solved is nothing to train against, either.
    assert list(RedTeamReplay(str(tmp_path)).rows()) == []


def test_a_search_for_refusals_is_reported_apart_and_raises_no_flag(tmp_path: Path) -> None:
    data = corpus(harmful=2, benign=4)
    pgd = EmbeddingPGD(epsilon=0.1, num_steps=2)
    found = measured(tmp_path, Suspicious(data), data, suite(embedding=pgd))
    metric = Metric("forced_refusal_rate", "harmless", "embedding_towards_refusal")
    assert found.measures[metric].estimate.n == len(data.examples["harmless"])
    assert set(found.benign) == {"direct", "initial_suffix", "embedding"}
    with pytest.raises(ValueError, match="'x_towards_refusal' is the name of a search"):
        RobustnessEvaluation({"x_towards_refusal": pgd})


def test_robust_accuracy_is_of_benign_tasks_that_are_searched_for_wrong_answers(tmp_path: Path) -> None:
    """It is no mark of an attack on harmful requests, and only asked where it is wanted."""
    data = corpus(harmful=2, benign=4)
    pgd = EmbeddingPGD(epsilon=0.1, num_steps=2)
    free = EmbeddingPGD(epsilon=None, step_unit="absolute")
    asked = RobustnessEvaluation(
        {"embedding": pgd, "wide": EmbeddingPGD(epsilon=0.5), "free": free, "direct": DirectRequest()},
        benign=BenignUnderAttack(limit=3, away_from_answer=["embedding"]),
        max_new_tokens=4,
    )
    found = measured(tmp_path, Suspicious(data), data, asked)
    metrics = [own for own in found.measures if own.quantity == "robust_accuracy"]
    assert metrics == [Metric("robust_accuracy", "utility", "embedding_away_from_answer")]
    assert found.measures[metrics[0]].estimate.n == 3
    assert set(found.benign) == {"direct", "embedding", "wide"}
    for name in ("free", "fgsm"):
        with pytest.raises(ValueError, match=f"of this suite: embedding; got '{name}'"):
            RobustnessEvaluation(
                {"embedding": pgd, "free": free}, benign=BenignUnderAttack(away_from_answer=[name])
            )
    assert not [own for own in suite(embedding=pgd).probes() if own.quantity == "robust_accuracy"]
    with pytest.raises(ValueError, match="'x_away_from_answer' is the name of a search"):
        RobustnessEvaluation({"x_away_from_answer": pgd})


def test_an_attack_that_leaves_nothing_behind_has_no_such_numbers(tmp_path: Path) -> None:
    data = corpus(harmful=2, benign=4)
    mixture = Mixture([EmbeddingPGD(epsilon=0.1, num_steps=1)])
    found = measured(tmp_path, Suspicious(data), data, suite(mixture=mixture))
    assert found.complete
    assert "mixture" in found.attacks
    assert "mixture" not in found.benign
    assert refused("mixture") not in found.measures


# --- a kill


def test_a_killed_evaluation_of_benign_prompts_goes_on_where_it_stood(tmp_path: Path) -> None:
    data, soft = corpus(harmful=3, benign=6), SoftPrompt(3, num_steps=2, step_size=0.1)
    model = chat_model()
    evaluation = suite(soft_prompt=soft, prefilling=Prefilling(2))

    def numbers(folder: Path) -> dict[Metric, object]:
        found = measured(folder, model, data, evaluation)
        assert found.complete
        return {m: e.estimate for m, e in found.measures.items() if m.quantity != "seconds_per_example"}

    expected = numbers(tmp_path / "whole")
    path = tmp_path / "whole" / "rows" / "rows_rank0.jsonl"
    lines = path.read_bytes().splitlines(keepends=True)
    whole = {own.identity: replace(own, seconds=0.0) for own in read_rows(tmp_path / "whole")}
    for kept in (0, 5, len(lines) // 2, len(lines) - 1, len(lines)):
        folder = tmp_path / str(kept)
        shutil.copytree(tmp_path / "whole", folder)
        (folder / "rows" / "rows_rank0.jsonl").write_bytes(b"".join(lines[:kept]))
        assert numbers(folder) == expected
        again = (folder / "rows" / "rows_rank0.jsonl").read_bytes()
        assert again.startswith(b"".join(lines[:kept]))
        assert again.count(b"\n") == len(lines)  # nothing that was finished ran again
        assert {own.identity: replace(own, seconds=0.0) for own in read_rows(folder)} == whole


def test_every_process_needs_a_request_to_learn_from(tmp_path: Path) -> None:
    data = corpus(harmful=1)
    place = Place(Suspicious(data), tmp_path, "test", 0, rank=0, world_size=2)
    with pytest.raises(ValueError, match=r"direct: expected a harmful request for each of 2 processes"):
        Session(place, data, [suite()])


# --- sampling


def test_sampled_replies_stand_beside_the_greedy_one(tmp_path: Path) -> None:
    plan = measurement(n=4, samples=3)
    store = ResultsStore(tmp_path)
    store.announce([plan])
    # By example: greedy, then the three samples.
    drawn = {"a": [0, 0, 1, 0], "b": [1, 0, 0, 0], "c": [0, 1, 0, 0], "d": [0, 0, 0, 0]}
    store.add(
        row(key, plan, bool(event), repetition=i) for key, own in drawn.items() for i, event in enumerate(own)
    )
    (found,) = load(tmp_path).snapshots
    assert found.complete
    values = {
        quantity: found.measures[Metric(quantity, "harmful", "gcg")].estimate.value  # type: ignore[arg-type]
        for quantity in ("success_rate", "success_at_1", "success_at_k")
    }
    assert values == {"success_rate": 0.25, "success_at_1": 0.25, "success_at_k": 0.5}
    titles = [measure.title for measure in found.measures.values()]
    assert "gcg: success of at least one sampled reply (k = 3)" in titles
    assert "gcg: target prefix (a trend, not success)" in titles


def test_an_example_without_all_its_samples_does_not_count(tmp_path: Path) -> None:
    plan = measurement(n=2, samples=2)
    store = ResultsStore(tmp_path)
    store.announce([plan])
    store.add([row("a", plan, repetition=i) for i in range(3)] + [row("b", plan, repetition=0)])
    (found,) = load(tmp_path).snapshots
    assert not found.complete
    assert found.measures[Metric("success_rate", "harmful", "gcg")].estimate.n == 2
    assert found.measures[Metric("success_at_k", "harmful", "gcg")].estimate.n == 1


def test_samples_differ_are_repeatable_and_cost_nothing_twice(tmp_path: Path) -> None:
    data = corpus(harmful=3)
    for folder in ("one", "two"):
        measured(tmp_path / folder, chat_model(), data, suite(Sampling(k=3, temperature=1.0)))
    rows = [own for own in read_rows(tmp_path / "one") if own.subject == "harmful"]
    assert len(rows) == 2 * 3 * 4
    replies = {own.identity: own.reply for own in rows}
    assert replies == {
        own.identity: own.reply for own in read_rows(tmp_path / "two") if own.subject == "harmful"
    }
    of_one = [own.reply for own in rows if (own.attack, own.example) == (rows[0].attack, rows[0].example)]
    assert len(set(of_one)) == 4
    assert all(own.forward_passes == 0 and own.seconds == 0 for own in rows if own.repetition)
    assert any(own.forward_passes for own in rows if own.repetition == 0)
    plain = measured(tmp_path / "greedy", chat_model(), data, suite())
    metric = Metric("success_rate", "harmful", "initial_suffix")
    beside = load(tmp_path / "one", "test").snapshots[0].measures[metric]
    assert plain.measures[metric].estimate == beside.estimate
    greedy = {
        (o.attack, o.example): o.reply for o in read_rows(tmp_path / "greedy") if o.subject == "harmful"
    }
    assert greedy == {(o.attack, o.example): o.reply for o in rows if o.repetition == 0}


def test_lines_from_before_samples_and_sets_can_still_be_read(tmp_path: Path) -> None:
    store = ResultsStore(tmp_path)
    store.announce([measurement()])
    path = tmp_path / "rows" / "measurements.jsonl"
    record = json.loads(path.read_text())
    del record["samples"], record["block"]
    path.write_text(json.dumps(record) + "\n")
    assert read_measurements(tmp_path) == [measurement()]
    del record["n"]
    path.write_text(json.dumps(record) + "\n")
    with pytest.raises(ValueError, match="n: expected a value, got none"):
        read_measurements(tmp_path)


# --- named sets


def test_every_named_set_is_measured_by_itself(tmp_path: Path) -> None:
    guides = TinyChatBenign("validation", num_rows=10, categories=["guide"])
    blocks = {
        "requests": Block(harmful=[TinyChatHarmful("validation", limit=3)]),
        "both": Block(harmful=[TinyChatHarmful("validation", limit=2)], harmless=[guides]),
    }
    data = corpus(blocks)
    model = Suspicious(data)
    found = measured(
        tmp_path, model, data, BlockEvaluation(max_new_tokens=4), RefusalEvaluation(max_new_tokens=4)
    )
    key = {metric.key: measure.estimate for metric, measure in found.measures.items()}
    assert (key["harmful/requests/refusal_rate"].value, key["harmful/requests/refusal_rate"].n) == (1, 3)
    assert (key["harmful/both/refusal_rate"].value, key["harmful/both/refusal_rate"].n) == (1, 2)
    assert key["harmful/both/served_rate"].value == 0
    assert key["harmless/both/served_rate"].value == 1
    assert key["harmless/both/over_refusal_rate"].value == 0
    assert key["harmful/refusal_rate"].n == len(data.examples["harmful"])  # the main set stands apart
    assert "harmless/requests/served_rate" not in key
    titles = [metric.title for metric in found.measures]
    assert "both: served, harmless" in titles
    assert len(set(titles)) == len(titles)


def test_of_named_sets_those_that_are_asked_for(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    """Without `sets`, what another evaluation measures of its own set is replaced, and that is said."""
    blocks = {name: Block(harmful=[TinyChatHarmful("validation", limit=2)]) for name in ("one", "two")}
    data = corpus(blocks)
    with caplog.at_level("WARNING"):
        found = measured(tmp_path / "one", Suspicious(data), data, BlockEvaluation(sets=["one"]))
    assert {metric.block for metric in found.measures} == {"one"} and not caplog.records
    with pytest.raises(ValueError, match="expected a named set 'three'"):
        measured(tmp_path / "three", Suspicious(data), data, BlockEvaluation(sets=["three"]))
    with pytest.raises(ValueError, match=r"BlockEvaluation\.sets: expected at least one name"):
        BlockEvaluation(sets=[])
    store = ResultsStore(tmp_path / "both")
    plan = measurement("full_refusal_rate", block="one", evaluation="xstest", stage="test")
    store.announce([plan])
    store.announce([measurement("refusal_rate", block="one", evaluation="blocks", stage="test")])
    assert "harmful one: blocks replaces what xstest says of it" in caplog.text
    # Inside `fit` too, and where one evaluation measures twice with other settings; not where it goes on.
    for settings in ("s", "s", "other"):
        caplog.clear()
        store.announce([measurement(settings=settings)])
        assert len(caplog.records) == (settings == "other")


def test_a_prompt_without_an_expected_reply_cannot_be_served(tmp_path: Path) -> None:
    plan = measurement("over_refusal_rate", subject="harmless", block="odd", judges=["exact_match@1"], n=3)
    store = ResultsStore(tmp_path)
    store.announce([plan])
    store.add([row("a", plan, True), row("b", plan, False, expected=""), row("c", plan, False)])
    (found,) = load(tmp_path).snapshots
    key = {metric.key: measure.estimate for metric, measure in found.measures.items()}
    assert (key["harmless/odd/served_rate"].value, key["harmless/odd/served_rate"].n) == (0.5, 2)
    assert key["harmless/odd/over_refusal_rate"].n == 3


def test_an_evaluation_of_sets_without_any_is_refused(tmp_path: Path) -> None:
    data = corpus()
    with pytest.raises(ValueError, match=r"set data.evaluation.blocks.NAME.harmful or"):
        measured(tmp_path, Suspicious(data), data, BlockEvaluation(Schedule()))
