"""Sources: public files in their layouts, and files that are none of them."""

from __future__ import annotations

import json
from collections import Counter
from pathlib import Path

import pytest

from datamodules.rows import ChatRow, HarmfulRow, RowProblem
from datamodules.sources.files import local_file
from datamodules.sources.harmbench import HarmBench
from datamodules.sources.tables import ChatTable, HarmfulTable
from tests.support.source_files import write


def test_harmbench_layout(tmp_path: Path) -> None:
    behaviors = write(
        tmp_path / "b.csv",
        'Behavior,Category,ContextString,BehaviorID\n"do a\nthing",c,,one\nother,c,ctx,two\nthird,c,,three\n',
    )
    targets = write(
        tmp_path / "t.json", json.dumps({"one": ["Sure, a", "", "Sure, b"], "other": "Sure, o"}, indent=1)
    )
    replies = write(
        tmp_path / "s.csv", 'Behavior,Safe_Response\n"do a\nthing",No.\nother,Never.\nthird,No.\n'
    )
    rows = list(HarmBench(behaviors, targets, replies).rows())
    good = [row for row in rows if isinstance(row, HarmfulRow)]
    assert [(r.key, r.target, r.safe_reply) for r in good] == [
        ("one/0", "Sure, a", "No."),
        ("one/2", "Sure, b", "No."),
        ("two/0", "Sure, o", "Never."),
    ]
    assert good[2].prompt == "ctx\n\n---\n\nother"
    problems = [str(row) for row in rows if isinstance(row, RowProblem)]
    assert problems == [
        f"{targets}:2 one[1]: expected a non-empty target, got ''",
        f"{behaviors}:5: no target for 'three' in {targets}",
    ]


def test_public_files(public_data: Path) -> None:
    folder = public_data / "data"
    bench = folder / "harmbench"
    training = HarmBench(
        str(bench / "behavior_datasets/extra_behavior_datasets/adv_training_behaviors.csv"),
        str(bench / "optimizer_targets/extra_targets/adv_training_targets.json"),
        str(folder / "cat_official/adv_training_behaviors_safe_responses.csv"),
    )
    kinds = Counter(type(row).__name__ for row in training.rows())
    assert kinds == {"HarmfulRow": 1189, "RowProblem": 11}
    advbench = list(HarmfulTable(str(folder / "advbench/harmful_behaviors.csv")).rows())
    assert Counter(type(row).__name__ for row in advbench) == {"HarmfulRow": 520}
    safe = list(
        ChatTable(
            str(folder / "xstest/xstest_prompts.csv"), columns={"prompt": "prompt"}, where={"label": "safe"}
        ).rows()
    )
    assert len(safe) == 250
    assert len(list(ChatTable(str(folder / "harmless40/prompts.txt"), "lines").rows())) == 40
    dolly = list(ChatTable(str(folder / "dolly/databricks-dolly-15k.jsonl"), "dolly", limit=50).rows())
    assert len(dolly) == 50
    assert all(isinstance(row, ChatRow) for row in dolly)
    alpaca = list(ChatTable(str(folder / "alpaca/alpaca_5000.json"), "alpaca", limit=20).rows())
    assert isinstance(alpaca[0], ChatRow)


def test_bad_table_rows_are_named_with_file_and_line(tmp_path: Path) -> None:
    lines = [{"q": "a", "a": "b"}, {"q": "a"}, {"q": 3, "a": "b"}, {"q": "a", "a": " "}]
    path = write(tmp_path / "t.jsonl", "\n".join(json.dumps(line) for line in lines))
    rows = list(ChatTable(path, columns={"prompt": "q", "reply": "a"}).rows())
    assert isinstance(rows[0], ChatRow)
    assert [str(row) for row in rows[1:]] == [
        f"{path}:2: missing column 'a' (for reply); the row has ['q']",
        f"{path}:3: expected text in column 'q', got int",
        f"{path}:4: empty reply (column 'a')",
    ]


def test_ultrachat_and_alpaca_formats(tmp_path: Path) -> None:
    chats = write(
        tmp_path / "u.json",
        [
            {"messages": [{"role": "user", "content": "hi"}, {"role": "assistant", "content": "yo"}]},
            {"messages": []},
        ],
    )
    first, second = ChatTable(chats, "ultrachat").rows()
    assert isinstance(first, ChatRow)
    assert (first.prompt, first.reply) == ("hi", "yo")
    assert isinstance(second, RowProblem)
    tasks = write(tmp_path / "a.json", [{"instruction": "Add", "input": "1 2", "output": "3"}])
    (row,) = ChatTable(tasks, "alpaca").rows()
    assert isinstance(row, ChatRow)
    assert row.prompt == "Add\n\n1 2"


@pytest.mark.parametrize(
    ("path", "message"),
    [
        ("nowhere.csv", "data file 'nowhere.csv' does not exist; set the path, or THUNDERCAT_DATA"),
        ("hf://owner/name/file.json", "expected hf://owner/name@revision/path with a pinned revision"),
    ],
)
def test_unusable_paths(path: str, message: str) -> None:
    with pytest.raises((ValueError, FileNotFoundError), match=message):
        local_file(path)


def test_malformed_files_are_named(tmp_path: Path) -> None:
    broken_line = write(tmp_path / "b.jsonl", '{"prompt": "a"}\n{"prompt":')
    with pytest.raises(ValueError, match=r"b.jsonl:2: not valid JSON"):
        list(ChatTable(broken_line, columns={"prompt": "prompt"}).rows())
    with pytest.raises(ValueError, match=r"o.json: expected a JSON list, got dict"):
        list(ChatTable(write(tmp_path / "o.json", {"a": 1})).rows())
    with pytest.raises(ValueError, match=r"n.json:1: expected a JSON object as row, got int"):
        list(ChatTable(write(tmp_path / "n.json", [3])).rows())
    with pytest.raises(ValueError, match=r"expected a csv, json, jsonl, parquet or txt file, got .*x.doc"):
        list(ChatTable(write(tmp_path / "x.doc", "a")).rows())
    with pytest.raises(ValueError, match=r"ChatTable.columns: expected keys \['prompt'\] and optionally"):
        ChatTable("x.csv", columns={"promt": "a"})


def test_hub_files_are_fetched_at_their_revision(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    calls = []

    def fake(repository: str, file: str, repo_type: str, revision: str) -> str:
        calls.append((repository, file, repo_type, revision))
        return write(tmp_path / "x.txt", "hello\n")

    monkeypatch.setattr("huggingface_hub.hf_hub_download", fake)
    assert [
        row.prompt
        for row in ChatTable("hf://me/set@abc123/sub/x.txt", "lines").rows()
        if isinstance(row, ChatRow)
    ] == ["hello"]
    assert calls == [("me/set", "sub/x.txt", "dataset", "abc123")]
