"""MT-Bench: two turns, graded by a model behind a server that may fail, and resumed where it stood."""

from __future__ import annotations

import math
import shutil
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from callbacks.evaluations.mt_bench import MTBenchEvaluation
from callbacks.evaluations.schedule import Schedule
from callbacks.evaluations.session import Place, Session
from callbacks.judges.grader import grade
from callbacks.metrics.estimates import mean
from callbacks.report.load import export, load
from callbacks.report.results import Snapshot
from callbacks.report.tables import grade_groups, judges, means, rates, warnings
from callbacks.report.tables_beside import grades
from datamodules.result_lines import Measurement, Row
from datamodules.results import ResultsStore, read_rows
from experiments.commands.run import instantiate
from experiments.config.check import check
from experiments.config.compose import compose
from experiments.config.defaults import with_defaults
from lightning_modules.models import chat
from lightning_modules.models.chat import Endpoint, Unanswered
from lightning_modules.models.language_model import LanguageModel
from lightning_modules.models.requests import GREEDY, Decoding, Request
from tests.conftest import chat_model
from tests.support.judge_server import Answer, JudgeServer, serving
from tests.support.mt_bench_files import CATEGORIES, files
from tests.support.rows import measurement, row
from tests.support.suspicious import corpus, measured


@pytest.fixture(autouse=True)
def _no_proxies(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("http_proxy", "https_proxy", "HTTP_PROXY", "HTTPS_PROXY", "all_proxy", "ALL_PROXY"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setattr(chat, "FIRST_PAUSE", 0.01)


class Echo(LanguageModel):
    """Replies with what it was asked and how often; counts."""

    def __init__(self) -> None:
        model = chat_model()
        super().__init__(model.module, model.chat)
        self.asked: list[Request] = []

    def reply(self, prompts: Any, decoding: Decoding = GREEDY, seed: int = 0) -> list[str]:
        self.asked += prompts
        return [f"reply to {own.text} {{answer}} <|end|>" for own in prompts]


def endpoint(server: JudgeServer, **settings: Any) -> Endpoint:
    given: dict[str, Any] = {"timeout": 5.0, "max_retries": 1, "parallel": 4}
    return Endpoint(server.url, "some-judge", **(given | settings))


def run(folder: Path, server: JudgeServer, model: LanguageModel | None = None, **settings: Any) -> Snapshot:
    evaluation = MTBenchEvaluation(
        files(folder / "files"), endpoint(server, **settings), max_new_tokens=64, batch_size=2
    )
    return measured(folder / "run", model or Echo(), corpus(), evaluation)


def turn_of(messages: list[dict[str, str]]) -> int:
    return int(messages[0]["content"].removeprefix("system "))


def by_turn(messages: list[dict[str, str]]) -> str:
    """6 for writing's first turn, 8 for the others', and 2 less for the second turns."""
    first = 6 if "ask 81" in messages[1]["content"] else 8
    return f"Fine. Rating: [[{first - 2 * turn_of(messages)}]]"


def failing(key: str, turn: int, answer: Any) -> Answer:
    """Grades as `by_turn`, but for one turn of one conversation."""

    def answered(messages: list[dict[str, str]]) -> Any:
        own = f"ask {key}" in messages[1]["content"] and turn_of(messages) == turn
        return answer if own else by_turn(messages)

    return answered


def scores(folder: Path) -> dict[tuple[str, int], float | None]:
    """The grade of every row that has a verdict."""
    return {
        (row.example, row.repetition): entry["score"]  # type: ignore[misc]
        for row in read_rows(folder)
        for entry in row.verdicts.values()
    }


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


@pytest.mark.parametrize(
    "problem", [500, 429, b"<html>busy</html>", b'{"error": "no"}', b'{"choices": []}', 1.5]
)
def test_a_failure_is_tried_again(tmp_path: Path, problem: Any) -> None:
    left = [problem] * 2

    def answer(messages: list[dict[str, str]]) -> Any:
        return left.pop() if left else by_turn(messages)

    with serving(answer) as server:
        found = run(tmp_path, server, max_retries=2, timeout=0.5)
    assert found.complete
    assert sorted(scores(tmp_path / "run").values()) == [4, 6, 6, 6, 8, 8]  # type: ignore[type-var]


@pytest.mark.parametrize("problem", [500, 401, b"<html>busy</html>", b'{"choices": []}', 1.5])
def test_a_grading_that_cannot_be_had_is_said_and_asked_for_again(tmp_path: Path, problem: Any) -> None:
    model = Echo()
    with serving(failing("101", 1, problem)) as server:
        found = run(tmp_path, server, model, timeout=0.5)
        judge = read_rows(tmp_path / "run")[0].verdicts.keys()
        assert not found.complete
        own = found.gradings["mt_bench"]
        assert (own.asked, own.missing, own.unreadable) == (6, 1, 0)
        key = {metric.key: m.estimate for metric, m in found.measures.items()}
        assert key["utility/mt_bench/grade"].n == 2  # a conversation without both grades has no mean
        assert key["utility/mt_bench/grade_turn_1"].n == 3
        assert key["utility/mt_bench/grade_turn_2"] == mean([4, 6])
        said = [text for text in warnings(load(tmp_path / "run", "test")) if "mt bench" in text]
        assert len(said) == 1 and "1 of 6 gradings are missing (run the command again" in said[0]
        assert "some-judge" in said[0]
        asked, before = len(model.asked), len(server.requests)
        server.answer = by_turn
        again = run(tmp_path, server, model)
    assert again.complete and again.gradings["mt_bench"].missing == 0
    assert len(model.asked) == asked  # nothing was generated twice
    assert len(server.requests) == before + 1  # and nothing was graded twice
    assert {own for row in read_rows(tmp_path / "run") for own in row.verdicts} == set(judge)
    assert again.measures.keys() == found.measures.keys()


def test_an_unreadable_grade_is_counted_and_in_no_mean(tmp_path: Path) -> None:
    with serving(failing("81", 0, "I would rather not say.")) as server:
        found = run(tmp_path, server)
        asked = len(server.requests)
        run(tmp_path, server)
        assert len(server.requests) == asked  # it is an answer: the judge is not asked again
    assert found.complete
    assert scores(tmp_path / "run")["81", 0] is None
    key = {metric.key: m.estimate for metric, m in found.measures.items()}
    assert (key["utility/mt_bench/grade_turn_1"].n, key["utility/mt_bench/grade_turn_2"].n) == (2, 3)
    assert key["utility/mt_bench/grade_turn_1"] == mean([8, 8])
    (said,) = warnings(load(tmp_path / "run", "test"))
    assert "1 of 6 gradings are unreadable and in no mean" in said


def test_no_readable_grade_at_all_is_said(tmp_path: Path) -> None:
    with serving(lambda messages: "no") as server:
        found = run(tmp_path, server)
    assert not found.measures
    (said,) = warnings(load(tmp_path / "run", "test"))
    assert "6 of 6 gradings are unreadable" in said


def test_a_server_that_is_not_there_stops_the_run_and_costs_no_reply(tmp_path: Path) -> None:
    model = Echo()
    with serving(by_turn) as server:
        pass
    with pytest.raises(ConnectionError, match=r"some-judge.*none of 4 gradings.*the replies are on disk"):
        run(tmp_path, server, model, max_retries=0)
    rows = read_rows(tmp_path / "run")
    assert len(rows) == 4 and not any(row.verdicts for row in rows)
    with serving(by_turn) as other:
        found = measured(
            tmp_path / "run",
            model,
            corpus(),
            MTBenchEvaluation(files(tmp_path / "files"), endpoint(other), max_new_tokens=64, batch_size=2),
        )
    assert found.complete and len(model.asked) == 6


def test_a_killed_evaluation_goes_on_where_it_stood(tmp_path: Path) -> None:
    with serving(by_turn) as server:
        whole = run(tmp_path, server)
        path = tmp_path / "run" / "rows" / "rows_rank0.jsonl"
        content = path.read_bytes().splitlines(keepends=True)
        for kept in range(len(content) + 1):
            folder = tmp_path / f"kept{kept}"
            folder.mkdir()
            shutil.copytree(tmp_path / "run", folder / "run")
            (folder / "run" / "rows" / "rows_rank0.jsonl").write_bytes(b"".join(content[:kept]))
            again = measured(
                folder / "run",
                Echo(),
                corpus(),
                MTBenchEvaluation(
                    files(tmp_path / "files"), endpoint(server), max_new_tokens=64, batch_size=2
                ),
            )
            assert again.complete
            assert again.measures == whole.measures
            assert _rows(folder / "run") == _rows(tmp_path / "run")


def _rows(folder: Path) -> dict[Any, Row]:
    return {row.identity: replace(row, where="") for row in read_rows(folder)}


def test_another_judge_grades_the_same_replies(tmp_path: Path) -> None:
    model = Echo()
    with serving(by_turn) as one, serving(lambda messages: "[[3]]") as two:
        run(tmp_path, one, model)
        asked = len(model.asked)
        found = run(tmp_path, two, model)
    assert len(model.asked) == asked
    assert {m.judge.partition("+")[0] for m in found.measures.values()} == {f"grader:some-judge@{two.url}"}
    assert all(len(row.verdicts) == 2 for row in read_rows(tmp_path / "run"))
    assert found.measures.keys() and all(m.estimate.value == 3 for m in found.measures.values())


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


def test_answers_of_an_endpoint_one_by_one(monkeypatch: pytest.MonkeyPatch) -> None:
    seen: Callable[[list[dict[str, str]]], Any] = lambda messages: (
        500 if "bad" in messages[0]["content"] else "yes"
    )
    with serving(seen) as server:
        own = endpoint(server, max_retries=0)
        good, bad = own.answers([Request("good"), Request("bad")])
        assert good == "yes" and isinstance(bad, Unanswered)
        assert f"the endpoint {server.url} failed" in bad.reason and "$OPENAI_API_KEY" in bad.reason
        with pytest.raises(ConnectionError, match="check base_url, model"):
            own.replies([Request("good"), Request("bad")])
