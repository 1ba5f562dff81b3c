"""`thundercat predict` after a kill: what was replied is kept, and nothing that another model replied."""

from __future__ import annotations

import json
import logging
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import pytest

from lightning_modules.models.language_model import LanguageModel
from lightning_modules.pretrained import PretrainedModel
from tests.support.small_run import small_config

Run = Callable[..., tuple[int, str, str]]
PART = "predictions_rank0.jsonl.partial"


REMINDED = {
    "class_path": "lightning_modules.defences.reminder.Reminder",
    "init_args": {"system": "Be careful."},
}
PROMPTS = ("Add 1 and 2.", "Name a bird.", "Say hello.", "What is a hat?")


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


def words(folder: Path, *more: str, prompts: Sequence[str] = PROMPTS) -> list[str]:
    config, path = str(small_config(folder)), folder / "data" / "prompts.jsonl"
    path.parent.mkdir(exist_ok=True)
    path.write_text("".join(json.dumps({"prompt": prompt}) + "\n" for prompt in prompts))
    table = {
        "class_path": "datamodules.sources.tables.ChatTable",
        "init_args": {"path": str(path), "columns": {"prompt": "prompt"}},
    }
    model = {
        "class_path": "lightning_modules.pretrained.PretrainedModel",
        "init_args": {"base": {"name_or_path": "tinychat:aligned"}},
    }
    asked = [f"--model={json.dumps(model)}", f"--data.evaluation={json.dumps({'harmless': [table]})}"]
    asked.append("--data.evaluation.batch_size=1")
    return ["predict", "--config", config, *asked, *more]


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


@pytest.fixture
def whole(thundercat: Run, tmp_path: Path) -> Callable[..., list[dict[str, Any]]]:
    """The rows of a call that nothing stops, in a folder of its own."""

    def call(*more: str, prompts: Sequence[str] = PROMPTS) -> list[dict[str, Any]]:
        folder = tmp_path / "whole"
        folder.mkdir()
        status, _, err = thundercat(*words(folder, *more, prompts=prompts))
        assert status == 0, err
        return rows(folder)

    return call


def test_the_same_command_goes_on_behind_the_last_whole_batch(
    again: list[int],
    whole: Callable[..., list[dict[str, Any]]],
    thundercat: Run,
    tmp_path: Path,
    caplog: pytest.LogCaptureFixture,
) -> None:
    part = tmp_path / "run" / PART
    assert not (tmp_path / "run" / "predictions.jsonl").exists() and len(part.read_text().splitlines()) == 3
    caplog.set_level(logging.INFO)
    # A line that the kill cut off is replied to again; a process that is no more leaves nothing.
    part.write_text(part.read_text() + '{"asked": "abc", "rows": [{"ke')
    part.with_name(PART.replace("0", "1")).write_text("")
    status, _, err = thundercat(*words(tmp_path))
    assert status == 0, err
    assert "2 batches are there already" in caplog.text
    assert again == [1, 1] and not list(part.parent.glob("*.partial"))
    resumed = rows(tmp_path)
    assert resumed == whole() and len(resumed) == 4


@pytest.mark.parametrize(
    "change",
    [
        ["--model.predicted_tokens=3"],
        ["--trainer.precision=bf16-mixed"],
        ['--model.base.config={"rms_norm_eps": 1.0}'],
        [f"--model.defence={json.dumps(REMINDED)}"],
        ["--model.base.name_or_path=tinychat:helpful"],
    ],
    ids=["tokens", "precision", "configuration", "defence", "weights"],
)
def test_what_another_model_replied_is_dropped(
    change: list[str],
    again: list[int],
    whole: Callable[..., list[dict[str, Any]]],
    thundercat: Run,
    tmp_path: Path,
    caplog: pytest.LogCaptureFixture,
) -> None:
    caplog.set_level(logging.INFO)
    status, _, err = thundercat(*words(tmp_path, *change))
    assert status == 0, err
    assert "are there already" not in caplog.text
    assert "2 batches are dropped: another model, or one that replies in another way" in caplog.text
    assert sum(again) == 4 and rows(tmp_path) == whole(*change)


@pytest.mark.parametrize(
    ("change", "prompts", "kept", "said"),
    [
        (
            ["--trainer.limit_predict_batches=1"],
            PROMPTS,
            1,
            "1 batches are dropped: their prompts are not asked any",
        ),
        (
            ["--data.evaluation.batch_size=2"],
            PROMPTS,
            0,
            "2 batches are dropped: they reply to other prompts, or",
        ),
        ([], PROMPTS[:1], 1, "1 batches are dropped: their prompts are not asked any more"),
        ([], (PROMPTS[0], "Name a fish."), 1, "1 batches are dropped: they reply to other prompts"),
    ],
    ids=["fewer batches", "other batches", "fewer prompts", "another second prompt"],
)
def test_replies_to_what_is_not_asked_any_more_are_dropped(
    change: list[str],
    prompts: Sequence[str],
    kept: int,
    said: str,
    again: list[int],
    whole: Callable[..., list[dict[str, Any]]],
    thundercat: Run,
    tmp_path: Path,
    caplog: pytest.LogCaptureFixture,
) -> None:
    status, _, err = thundercat(*words(tmp_path, *change, prompts=prompts))
    assert status == 0, err
    assert said in caplog.text
    found, asked_again = rows(tmp_path), sum(again)
    assert asked_again == len(found) - kept and found == whole(*change, prompts=prompts)


def test_a_file_of_another_kind_is_replaced(
    whole: Callable[..., list[dict[str, Any]]], thundercat: Run, tmp_path: Path
) -> None:
    """Until now a line was a row."""
    part = tmp_path / "run" / PART
    part.parent.mkdir()
    part.write_text('{"key": "a", "prompt": "b", "reply": "c", "cut": false, "checkpoint": null}\n')
    status, _, err = thundercat(*words(tmp_path))
    assert status == 0, err
    assert rows(tmp_path) == whole()


class OwnReplies(PretrainedModel):
    """Replies in a way of its own, which no digest knows."""

    says = "first"

    def predict_step(self, batch: Any, batch_idx: int, dataloader_idx: int = 0) -> Any:
        if batch_idx == 2 and self.says == "first":
            raise Killed
        return [{"key": key, "reply": self.says} for key in batch.keys]


def test_a_module_that_replies_in_its_own_way_begins_again(
    thundercat: Run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    own = f"--model.class_path={__name__}.OwnReplies"
    with pytest.raises(Killed):
        thundercat(*words(tmp_path, own))
    monkeypatch.setattr(OwnReplies, "says", "second")
    status, _, err = thundercat(*words(tmp_path, own))
    assert status == 0, err
    assert [row["reply"] for row in rows(tmp_path)] == ["second"] * 4
