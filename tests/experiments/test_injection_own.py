"""Prompt injection on a user's own documents, as the recipe's header says it."""

from __future__ import annotations

import json
from pathlib import Path

from callbacks.report.load import load
from datamodules.rows import ChatRow
from datamodules.sources.tinychat.lists import TinyChatLists
from experiments.cli import main


def test_own_documents_are_trained_on_and_judged_on_the_split_that_is_named(tmp_path: Path) -> None:
    rows = [row for row in TinyChatLists("train", 60).rows() if isinstance(row, ChatRow)]
    documents = tmp_path / "mine.jsonl"
    lines = ({"instruction": row.prompt, "document": row.data, "answer": row.reply} for row in rows)
    documents.write_text("".join(json.dumps(line) + "\n" for line in lines))
    options = [
        *("--config", "configs/experiment/injection_own.yaml", f"--vars.documents={documents}"),
        *("--model.base.name_or_path=tinychat:aligned", f"--trainer.default_root_dir={tmp_path / 'run'}"),
        *("--vars.at_start=false", "--vars.benign_limit=2", "--vars.injection_limit=2"),
    ]
    assert main(["fit", *options, "--trainer.max_steps=1"]) == 0
    assert main(["test", *options, "--vars.split=test", "--ckpt_path=last"]) == 0
    styles = {}
    for stage in ("fit", "test"):
        samples = load(tmp_path / "run", stage).after.samples
        styles[stage] = {row.category for row in samples if row.subject == "harmful"}
    assert styles["fit"] == {"escape"}
    assert styles["test"] and styles["test"] <= {"fake_completion", "combined"}
