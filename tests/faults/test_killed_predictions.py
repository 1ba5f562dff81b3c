"""`thundercat predict` after a kill: what was replied is kept, and nothing that another model replied."""

from __future__ import annotations

import json
import logging
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from lightning_modules.models.language_model import LanguageModel
from tests.support.small_run import evaluated, small_config

Run = Callable[..., tuple[int, str, str]]
PART = "predictions_rank0.jsonl.partial"


class Killed(BaseException):
    """As a kill, which nothing catches."""


class Asked:
    """Stands before the model: how many prompts each generation was of."""

    def __init__(self) -> None:
        self.sizes: list[int] = []
        self.killed_behind: int | None = None


@pytest.fixture
def asked(monkeypatch: pytest.MonkeyPatch) -> Asked:
    seen, reply = Asked(), LanguageModel.reply

    def counted(self: LanguageModel, *given: Any) -> list[str]:
        if len(seen.sizes) == seen.killed_behind:
            raise Killed
        replies = reply(self, *given)
        seen.sizes.append(len(replies))
        return replies

    monkeypatch.setattr(LanguageModel, "reply", counted)
    return seen


def words(folder: Path, *more: str, prompts: int = 4) -> list[str]:
    config = str(small_config(folder))
    return ["predict", "--config", config, evaluated(prompts), "--data.evaluation.batch_size=1", *more]


def rows(folder: Path) -> list[dict[str, Any]]:
    lines = (folder / "run" / "predictions.jsonl").read_text(encoding="utf-8").splitlines()
    return [json.loads(line) for line in lines]


@pytest.fixture
def again(thundercat: Run, tmp_path: Path, asked: Asked) -> list[int]:
    """A call was killed behind two of its four replies; of what comes next the sizes."""
    asked.killed_behind = 2
    with pytest.raises(Killed):
        thundercat(*words(tmp_path))
    asked.killed_behind = None
    asked.sizes.clear()
    return asked.sizes


def test_the_same_command_goes_on_behind_the_last_whole_batch(
    again: list[int], thundercat: Run, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    part = tmp_path / "run" / PART
    assert not (tmp_path / "run" / "predictions.jsonl").exists() and len(part.read_text().splitlines()) == 3
    caplog.set_level(logging.INFO)
    # A line that the kill cut off is replied to again.
    part.write_text(part.read_text() + '{"asked": "abc", "rows": [{"ke')
    status, _, err = thundercat(*words(tmp_path))
    assert status == 0, err
    assert "2 batches are there already" in caplog.text
    assert again == [1, 1] and not part.exists()
    resumed = rows(tmp_path)
    (tmp_path / "whole").mkdir()
    assert thundercat(*words(tmp_path / "whole"))[0] == 0
    assert resumed == rows(tmp_path / "whole") and len(resumed) == 4


@pytest.mark.parametrize("change", ["--seed_everything=1", "--trainer.precision=bf16-true"])
def test_what_another_model_replied_is_not_gone_on_with(
    change: str, again: list[int], thundercat: Run, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.INFO)
    status, _, err = thundercat(*words(tmp_path, change))
    assert status == 0, err
    assert "are there already" not in caplog.text
    assert again == [1, 1, 1, 1] and len(rows(tmp_path)) == 4


def test_replies_to_prompts_that_are_not_asked_any_more_are_dropped(
    again: list[int], thundercat: Run, tmp_path: Path
) -> None:
    status, _, err = thundercat(*words(tmp_path, prompts=3))
    assert status == 0, err
    asked_for = {row["prompt"] for row in rows(tmp_path)}
    (tmp_path / "whole").mkdir()
    assert thundercat(*words(tmp_path / "whole", prompts=3))[0] == 0
    assert rows(tmp_path) == rows(tmp_path / "whole") and len(asked_for) == 3 and 1 <= len(again) - 3 <= 3
