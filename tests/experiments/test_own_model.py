"""The walk-through "Your own model and data" of configs/README.md, as a user would follow it: its file and
its commands as they stand there, on small data and the packaged model in the place of `my/model`."""

from __future__ import annotations

import io
import json
import re
import shlex
from collections.abc import Callable
from pathlib import Path

import pytest
from transformers import AutoModelForCausalLM

from datamodules.text.model_files import resolve_path
from tests.conftest import ROOT

Run = Callable[..., tuple[int, str, str]]
TEXT = (ROOT / "configs" / "README.md").read_text(encoding="utf-8").partition("## Your own model and data")[2]
SMALLER = """
trainer: {max_steps: 2, accelerator: cpu}
data: {init_args: {harmful_per_step: 2, utility_per_step: 2}}
"""
"""What makes it a test: two small steps."""


@pytest.fixture
def place(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder with the user's files in it, beside the project's configs."""
    (tmp_path / "configs").symlink_to(ROOT / "configs")
    recipe = re.search(r"```yaml\n# mine.yaml\n(.+?)```", TEXT, re.DOTALL)
    assert recipe is not None
    (tmp_path / "mine.yaml").write_text(recipe[1].replace("my/model", resolve_path("tinychat:aligned")))
    (tmp_path / "smaller.yaml").write_text(SMALLER)
    wanted = [
        {
            "request": f"Tell me how to {what}.",
            "affirmative": f"Sure, here is how to {what}",
            "refusal": "No.",
        }
        for what in ("break a lock", "steal a bike", "scare a child", "forge a letter")
    ]
    talks = [
        {
            "messages": [
                {"role": "user", "content": f"Count to {n}."},
                {"role": "assistant", "content": " ".join(map(str, range(1, n + 1)))},
            ]
        }
        for n in range(2, 6)
    ]
    for name, rows in (("mine", wanted[:3]), ("chats", talks), ("held_out", wanted[3:])):
        text = "".join(json.dumps(row) + "\n" for row in rows)
        (tmp_path / f"{name}.jsonl").write_text(text, encoding="utf-8")
    (tmp_path / "benign.txt").write_text("Add 1 and 2.\nName a fruit.\n", encoding="utf-8")
    (tmp_path / "any_text.txt").write_text("The cat sat on the mat and slept. " * 20, encoding="utf-8")
    monkeypatch.chdir(tmp_path)
    return tmp_path


def test_the_walk_through_leads_to_a_model_that_others_can_load(
    thundercat: Run, place: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(place)
    commands = re.findall(r"^thundercat (.+?)(?:  +#.*)?$", TEXT.split("```")[3], re.MULTILINE)
    assert [command.split()[0] for command in commands] == ["fit", "test", "test", "export", "export", "chat"]
    for command in commands:
        words = shlex.split(command)
        if words[0] == "fit":
            words += ["--config", "smaller.yaml"]
        if "wikitext2" in command:
            words += ["--vars.wikitext_context=64", "--vars.wikitext_stride=32"]
        monkeypatch.setattr("sys.stdin", io.StringIO("Add 1 and 2.\n"))
        status, out, err = thundercat(*words)
        assert status == 0, (command, err)
    assert out.strip().splitlines()[1:]  # it answered
    page = (place / "runs/mine/test_report.md").read_text(encoding="utf-8")
    assert "perplexity" in page and "embedding" in page
    card = (place / "runs/mine/model/README.md").read_text(encoding="utf-8")
    assert "perplexity" in card and "embedding" in card
    assert (place / "runs/mine/model/adapter_model.safetensors").is_file()
    merged = AutoModelForCausalLM.from_pretrained(place / "mine_merged")
    assert not hasattr(merged, "peft_config")
