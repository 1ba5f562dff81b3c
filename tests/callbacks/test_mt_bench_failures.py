"""MT-Bench where its judge fails, changes or is not there: what is said, asked for again and kept."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from callbacks.evaluations.mt_bench import MTBenchEvaluation
from callbacks.metrics.estimates import mean
from callbacks.report.load import load
from callbacks.report.tables import warnings
from datamodules.result_lines import Row
from datamodules.results import read_rows
from lightning_modules.models.chat import Unanswered
from lightning_modules.models.requests import Request
from tests.support.judge_server import serving
from tests.support.mt_bench import Echo, by_turn, endpoint, failing, reached_at_once, run, scores
from tests.support.mt_bench_files import files
from tests.support.suspicious import corpus, measured


@pytest.fixture(autouse=True)
def _reached(monkeypatch: pytest.MonkeyPatch) -> None:
    reached_at_once(monkeypatch)


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
