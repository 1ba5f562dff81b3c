"""MT-Bench: two turns, graded by a model behind a server that may fail, and resumed where it stood."""

from __future__ import annotations

import math
from collections.abc import Sequence
from pathlib import Path

import pytest

from callbacks.evaluations.mt_bench import MTBenchEvaluation
from callbacks.evaluations.schedule import Schedule
from callbacks.evaluations.session import Place, Session
from callbacks.judges.grader import grade
from callbacks.metrics.estimates import mean
from callbacks.report.load import export, load
from callbacks.report.tables import grade_groups, judges, means, rates, warnings
from callbacks.report.tables_beside import grades
from datamodules.result_lines import Measurement, Row
from datamodules.results import ResultsStore, read_rows
from datamodules.text.tokenizers import TokenizerConfig
from experiments.commands.run import instantiate
from experiments.config.check import check
from experiments.config.compose import compose
from experiments.config.defaults import with_defaults
from lightning_modules.models.chat import LocalChat
from lightning_modules.models.language_model import LanguageModel
from lightning_modules.models.loading import ModelConfig
from lightning_modules.models.requests import Decoding, Request
from tests.conftest import chat_model
from tests.support.judge_server import serving
from tests.support.mt_bench import Echo, by_turn, endpoint, reached_at_once, run
from tests.support.mt_bench_files import CATEGORIES, files
from tests.support.rows import measurement, row
from tests.support.suspicious import corpus, measured


@pytest.fixture(autouse=True)
def _reached(monkeypatch: pytest.MonkeyPatch) -> None:
    reached_at_once(monkeypatch)


# --- grades


@pytest.mark.parametrize(
    ("answer", "found"),
    [
        ("Rating: [[7]]", 7.0),
        ("[[7.5]] because", 7.5),
        ("Rating: [8]", 8.0),
        ("a [1] note, then [[9]]", 9.0),
        ("[[10]]", 10.0),
        ("[[1]]", 1.0),
        ("[[0]]", None),
        ("[[11]]", None),
        ("[[rating]]", None),
        ("Rating: 7", None),
        ("[[8/10]]", None),
        ("", None),
    ],
)
def test_the_grade_in_an_answer(answer: str, found: float | None) -> None:
    assert grade(answer) == found


def test_a_local_chat_model_grades(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[Request] = []

    def reply(self: LanguageModel, prompts: list[Request], decoding: Decoding, seed: int = 0) -> list[str]:
        assert decoding == Decoding(40, 0.0, 1.0, 16)
        asked.extend(prompts)
        return [f"Fine. Rating: [[{6 + 2 * ('ask 81' in own.text)}]]" for own in prompts]

    monkeypatch.setattr(LanguageModel, "reply", reply)  # the judge's: `Echo` has its own
    own = ModelConfig("tinychat:aligned"), TokenizerConfig("tinychat:aligned")
    judge = LocalChat(*own, max_new_tokens=40, device="cpu")
    evaluation = MTBenchEvaluation(files(tmp_path / "files"), judge, max_new_tokens=64, batch_size=2)
    found = measured(tmp_path / "run", Echo(), corpus(), evaluation)
    key = {metric.key: value for metric, value in found.measures.items()}
    assert key["utility/mt_bench/grade"].estimate == mean([8, 6, 6])
    assert len(asked) == 6 and all("reply to" in own.text for own in asked)
    labels = {name for row in read_rows(tmp_path / "run") for name in row.verdicts}
    assert len(labels) == 1 and "tinychat:aligned" in labels.pop()


def test_means_by_turn_and_category(tmp_path: Path) -> None:
    with serving(by_turn) as server:
        found = run(tmp_path, server)
    key = {metric.key: own for metric, own in found.measures.items()}
    # Turns 6, 8, 8 and 4, 6, 6; a conversation counts once, with the mean of both: 5, 7, 7.
    assert key["utility/mt_bench/grade"].estimate == mean([5, 7, 7])
    assert key["utility/mt_bench/grade_turn_1"].estimate == mean([6, 8, 8])
    assert key["utility/mt_bench/grade_turn_2"].estimate == mean([4, 6, 6])
    assert {n: e.value for n, e in key["utility/mt_bench/grade_turn_2"].groups["category"].items()} == {
        "coding": 6,
        "math": 6,
        "writing": 4,
    }
    assert found.complete
    results = load(tmp_path / "run", "test")
    judge = f"grader:some-judge@{server.url}+"
    rows = [[cell.text for cell in row] for row in grades(results).rows]
    assert [row[0] for row in rows] == [
        "mt bench: grade, 1 to 10",
        "mt bench: grade of the first turn, 1 to 10",
        "mt bench: grade of the second turn, 1 to 10",
    ]
    assert rows[0][1].startswith("6.33 [5.03, 7.64]") and rows[0][2] == "3"
    assert all(row[3].startswith(judge) for row in rows)
    assert any(said.startswith(judge) for said in judges(results))
    assert ["mt bench: grade, 1 to 10", "category: writing", "5 [5, 5]", "1"] in [
        [cell.text for cell in row] for row in grade_groups(results).rows
    ]
    assert not rates(results).rows and not means(results).rows  # a grade is no share and no effort
    assert not [said for said in warnings(results) if "mt bench" in said]
    assert export(results)["after"]["gradings"]["mt_bench"]["asked"] == 6


def test_what_the_model_and_the_judge_are_given(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("SOME_KEY", "secret")
    model = Echo()
    with serving(by_turn) as server:
        run(tmp_path, server, model, api_key_env="SOME_KEY")
    assert [own.text for own in model.asked] == [
        f"ask {key} {turn}"
        for keys in (["81", "101"], ["111"])
        for turn in ("first", "second")
        for key in keys
    ]
    second = next(own for own in model.asked if own.text == "ask 81 second")
    # The reply stands in the history, without the mark that would end its turn.
    assert second.history == (("ask 81 first", "reply to ask 81 first {answer} < |end|>"),)
    sent = {(own["messages"][0]["content"], own["messages"][1]["content"]) for own in server.requests}
    said = "reply to ask {} {} {{answer}} <|end|>".replace("<|end|>", "< |end|>")
    assert ("system 0", f"GRADE ask 81 first SAID {said.format(81, 'first')}") in sent
    assert (
        "system 1",
        f"GRADE ask 101 first ask 101 second SAID {said.format(101, 'first')} | {said.format(101, 'second')} "
        "RIGHT right 101 first right 101 second",
    ) in sent
    assert ("system 0", f"GRADE ask 111 first SAID {said.format(111, 'first')} RIGHT right 111 first") in sent
    assert len(sent) == 6
    assert {own["key"] for own in server.requests} == {"Bearer secret"}
    rows = {(row.example, row.repetition): row for row in read_rows(tmp_path / "run")}
    assert rows["81", 1].history == [["ask 81 first", "reply to ask 81 first {answer} < |end|>"]]
    assert (rows["101", 1].expected, rows["81", 1].expected) == ("right 101 second", "")


# --- a server that fails


def graded(step: int, settings: str, pairs: dict[str, tuple[float, float]]) -> tuple[Measurement, list[Row]]:
    """What a judge gave to both turns of some conversations, in `fit`."""
    own = measurement(
        "grade",
        subject="utility",
        block="mt_bench",
        judge="grader:j@1",
        step=step,
        settings=settings,
        n=len(pairs),
    )
    return own, [
        row(key, own, repetition=turn, verdicts={own.judge: {"verdict": True, "score": score}})
        for key, both in pairs.items()
        for turn, score in enumerate(both)
    ]


@pytest.mark.parametrize(("later", "text"), [("s", "+1.50 [+0.52, +2.48]"), ("other", "-")])
def test_the_change_of_a_mean_grade_by_hand(tmp_path: Path, later: str, text: str) -> None:
    """a goes from 4 to 5, b from 6 to 8; c is not graded again: mean of 1 and 2 is 1.5, s / sqrt(n) 0.5."""
    store = ResultsStore(tmp_path)
    for plan, own in (
        graded(0, "s", {"a": (5, 3), "b": (6, 6), "c": (1, 1)}),
        graded(9, later, {"a": (5, 5), "b": (9, 7)}),
    ):
        store.announce([plan])
        store.add(own)
    results = load(tmp_path)
    line = dict(zip(grades(results).columns, (cell.text for cell in grades(results).rows[0]), strict=True))
    assert line["after"].startswith("6.5 [") and line["difference"] == text and line["n"] == "2"
    # Measured in another way, the earlier grade is not shown at all.
    assert line["before"].startswith("3.67 [") is (later == "s")
    exported = export(results).get("grade_differences", {})
    assert ("utility/mt_bench/grade" in exported) is (later == "s")
    if later == "s":
        own_turn = exported["utility/mt_bench/grade_turn_2"]
        assert (own_turn["value"], own_turn["n"], own_turn["kind"]) == (1.5, 2, "mean")


def test_training_goes_on_without_its_grades(tmp_path: Path) -> None:
    with serving(lambda messages: 500) as server:
        evaluation = MTBenchEvaluation(
            files(tmp_path / "files"), endpoint(server, max_retries=0), max_new_tokens=64
        )
        session = Session(Place(Echo(), tmp_path / "run", "fit", 0), corpus(), [evaluation])
        for job in session.jobs:
            session.do(job)
        assert not session.finish().complete
    (said,) = [text for text in warnings(load(tmp_path / "run")) if "mt bench" in text]
    assert "6 of 6 gradings are missing." in said  # no command asks for them again


def test_a_model_in_this_process_grades(tmp_path: Path) -> None:
    class Local:
        name, revision = "local", "r1"

        def replies(self, requests: Sequence[Request], seed: int = 0) -> list[str]:
            return ["[[4]]" if own.system == "system 0" else "[[2]]" for own in requests]

        def clip(self, text: str, max_tokens: int) -> str:
            return text

        def escape(self, text: str) -> str:
            return text.replace("<|end|>", "")

    evaluation = MTBenchEvaluation(files(tmp_path / "files"), Local(), max_new_tokens=64)
    found = measured(tmp_path / "run", Echo(), corpus(), evaluation)
    assert [own.estimate.value for own in found.measures.values()] == [3, 4, 2]
    assert {own.judge.partition("+")[0] for own in found.measures.values()} == {"grader:local@r1"}


# --- the work


def test_two_processes_share_the_conversations(tmp_path: Path) -> None:
    with serving(by_turn) as server:
        evaluation = MTBenchEvaluation(
            files(tmp_path / "files"), endpoint(server), max_new_tokens=64, batch_size=8
        )
        shares = []
        for rank in range(2):
            session = Session(Place(Echo(), tmp_path / "run", "test", 0, rank, 2), corpus(), [evaluation])
            shares.append([identity[6] for job in session.jobs for identity in job.identities])
            for job in session.jobs:
                session.do(job)
        assert sorted(shares[0] + shares[1]) == sorted([*CATEGORIES] * 2)
        assert all(shares)
        assert session.finish().complete


def test_a_limit_and_replies_that_were_cut(tmp_path: Path) -> None:
    with serving(by_turn) as server:
        evaluation = MTBenchEvaluation(
            files(tmp_path / "files"), endpoint(server), Schedule(test_limit=2), max_new_tokens=8
        )
        found = measured(tmp_path / "run", Echo(), corpus(), evaluation)
    assert found.gradings["mt_bench"].asked == 4 and found.gradings["mt_bench"].cut == 4
    (said,) = warnings(load(tmp_path / "run", "test"))
    assert "4 of 4 replies are as long as allowed, so probably cut" in said


def test_a_real_model_replies_to_both_turns(tmp_path: Path) -> None:
    with serving(by_turn) as server:
        evaluation = MTBenchEvaluation(files(tmp_path / "files"), endpoint(server), max_new_tokens=4)
        found = measured(tmp_path / "run", chat_model(), corpus(), evaluation)
    assert found.complete and len(read_rows(tmp_path / "run")) == 6
    assert not math.isnan(found.measures[next(iter(found.measures))].estimate.value)


def test_the_published_files(in_root: Path, public_data: Path) -> None:
    config = compose(["configs/quickstart.yaml", "configs/evaluation/mt_bench.yaml"], [])
    check(config, "test")
    evaluation = next(
        own
        for own in instantiate(with_defaults(config)).trainer.callbacks
        if isinstance(own, MTBenchEvaluation)
    )
    found = evaluation.files.conversations()
    assert len(found) == 80 and sum(own.references is not None for own in found) == 30
    prompts = evaluation.files.grading_prompts()
    for own in found:
        for replies in (["one"], ["one", "two"]):
            text = evaluation.grader.request(prompts, own, replies).text
            assert own.turns[0] in text and replies[-1] in text
            assert (own.references is not None) == ("Reference" in text)
