"""Harmless requests in a harmful form, and a model's own replies to them as utility data."""

from __future__ import annotations

import csv
import json
from collections import Counter
from pathlib import Path

import pytest

from datamodules.rows import ChatRow
from datamodules.settings import settings_digest
from datamodules.sources.base import collecting_passes
from datamodules.sources.combinators import RefusalsAsHarm, Repeated
from datamodules.sources.harmbench import HarmBench
from datamodules.sources.harmless_requests import HarmlessRequests
from datamodules.sources.harmless_texts import FORMS, MATTERS, QUESTIONS
from datamodules.sources.tables import ChatTable, HarmfulTable
from datamodules.text.encoding import Encoder, EncodingConfig
from tests.conftest import tinychat_format


def prompts(split: str, num_forms: int) -> list[str]:
    rows = list(HarmlessRequests(split, num_forms).rows())  # type: ignore[arg-type]
    assert all(isinstance(row, ChatRow) for row in rows)
    return [row.prompt for row in rows if isinstance(row, ChatRow)]


def test_splits_share_no_matter_no_form_and_no_question() -> None:
    assert not set(FORMS["train"]) & set(FORMS["validation"])
    assert not set(MATTERS["train"]) & set(MATTERS["validation"])
    assert not set(QUESTIONS["train"]) & set(QUESTIONS["validation"])
    for split in ("train", "validation"):
        assert all(form.count("{}") == 1 for form in FORMS[split])  # type: ignore[index]
    assert not set(prompts("train", 16)) & set(prompts("validation", 6))


@pytest.mark.parametrize("num_forms", [1, 2, 4, 16])
def test_forms_and_matters_occur_about_equally_often(num_forms: int) -> None:
    found = prompts("train", num_forms)
    assert len({*found}) == len(found) == num_forms * len(MATTERS["train"]) + len(QUESTIONS["train"])
    used = Counter(
        form
        for form in FORMS["train"]
        for text in found
        if text in {form.format(m) for m in MATTERS["train"]}
    )
    assert len(used) == len(FORMS["train"])
    assert max(used.values()) - min(used.values()) <= num_forms


def test_more_forms_than_there_are_is_refused() -> None:
    with pytest.raises(ValueError, match=r"HarmlessRequests\.num_forms: expected at most 6, got 7"):
        HarmlessRequests("validation", 7)


def test_no_test_prompt_is_among_them(public_data: Path) -> None:
    known = set((public_data / "data/harmless40/prompts.txt").read_text().splitlines())
    with (public_data / "data/xstest/xstest_prompts.csv").open() as stream:
        known |= {row["prompt"] for row in csv.DictReader(stream)}
    own = {*prompts("train", 16), *prompts("validation", 6)}
    assert not {text.strip(" ?.").lower() for text in known} & {text.strip(" ?.").lower() for text in own}


def test_a_reply_that_was_cut_off_is_learned_without_an_end(tmp_path: Path) -> None:
    path = tmp_path / "predictions.jsonl"
    rows = [
        {"key": "a", "prompt": "Name a fruit.", "reply": "An apple is one", "cut": True, "checkpoint": None},
        {"key": "b", "prompt": "Name a fruit.", "reply": "An apple is one", "cut": False, "checkpoint": None},
        {"key": "c", "prompt": "Name a fruit.", "reply": "An apple is one"},
    ]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    chat = tinychat_format()
    source = ChatTable(str(path), format="predictions")
    cut, whole, old = Encoder(chat, EncodingConfig(64)).chats(source.rows())
    assert [example.row.key for example in (cut, whole, old)] == ["a", "b", "c"]
    assert whole.reply == cut.reply + chat.end_of_turn
    assert old.reply == whole.reply
    assert cut.labels[-1] == cut.reply[-1]


def test_a_model_s_own_replies_cost_a_pass_each_in_whatever_source_they_are(tmp_path: Path) -> None:
    path = tmp_path / "predictions.jsonl"
    path.write_text("".join(f'{{"key": "{i}", "prompt": "p", "reply": "r"}}\n' for i in range(3)))
    source = ChatTable(str(path), format="predictions", limit=1)
    assert len([*source.rows()]) == 1
    path.unlink()
    # All three were generated, however many are used.
    repeated = Repeated(RefusalsAsHarm(source, ["No."]), 2)
    assert collecting_passes([source, repeated]) == 3 + 3
    path.write_text('{"prompt": "p", "reply": "r"}\n')
    assert collecting_passes([ChatTable(str(path)), HarmfulTable(str(path))]) == 0


def harmbench(folder: Path) -> tuple[str, str]:
    lines = ["Behavior,FunctionalCategory,BehaviorID", "Do a,standard,a", "Sing b,copyright,b"]
    (folder / "behaviors.csv").write_text("\n".join([*lines, "Do c,standard,c", "Do d,standard,d"]) + "\n")
    targets = {name: [f"Sure, {name} {i}" for i in range(3)] for name in "abcd"}
    (folder / "targets.json").write_text(json.dumps(targets, indent=1))
    return str(folder / "behaviors.csv"), str(folder / "targets.json")


def test_harmbench_by_functional_category(tmp_path: Path) -> None:
    source = HarmBench(*harmbench(tmp_path), limit=2, functional="standard", max_targets=2)
    keys = [row.key for row in source.rows() if not hasattr(row, "reason")]  # type: ignore[union-attr]
    assert keys == ["a/0", "a/1", "c/0", "c/1"]
    with pytest.raises(ValueError, match=r"no behaviour of .* is 'contextual'; there are \['copyright'"):
        list(HarmBench(*harmbench(tmp_path), functional="contextual").rows())


def test_reading_a_source_changes_no_setting(tmp_path: Path) -> None:
    """What it has counted is remembered; an evaluation that describes it would otherwise be another one at
    its end than at its beginning, and find none of its rows."""
    path = tmp_path / "predictions.jsonl"
    path.write_text(json.dumps({"prompt": "p", "reply": "r", "key": "k", "cut": False}) + "\n")
    source = ChatTable(str(path), format="predictions")
    before = settings_digest(source)
    assert len(list(source.rows())) == 1 and source.collecting_passes == 1
    assert settings_digest(source) == before
    assert settings_digest(ChatTable(str(path), format="predictions", limit=1)) != before
