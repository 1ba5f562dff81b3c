"""MT-Bench on a model that echoes, graded by a server that says what a test wants."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from callbacks.evaluations.mt_bench import MTBenchEvaluation
from callbacks.report.results import Snapshot
from datamodules.results import read_rows
from lightning_modules.models import chat
from lightning_modules.models.chat import Endpoint
from lightning_modules.models.language_model import LanguageModel
from lightning_modules.models.requests import GREEDY, Decoding, Request
from tests.conftest import chat_model
from tests.support.judge_server import Answer, JudgeServer
from tests.support.mt_bench_files import files
from tests.support.suspicious import corpus, measured


def reached_at_once(monkeypatch: pytest.MonkeyPatch) -> None:
    """The server on this machine is asked directly, and again without a long pause."""
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
