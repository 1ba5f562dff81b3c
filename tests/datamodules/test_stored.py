"""Encoded rows on disk: what is trained on is what would be in memory, whatever ended the encoding."""

from __future__ import annotations

import json
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from lightning import Trainer

from datamodules import stored
from datamodules.adversarial import AdversarialData
from datamodules.batch import TrainingBatch
from datamodules.evaluation import EvaluationSets
from datamodules.rows import BadRowError
from datamodules.sources.tables import ChatTable
from datamodules.text.encoding import EncodingConfig
from datamodules.text.tokenizers import TokenizerConfig

pytest.importorskip("pyarrow")
ROWS = 53
LEFT_OUT = (7, 30)
"""A row without a prompt, and one that is evaluated on."""
SHOWN = "What is 300 plus 1?"


class Killed(BaseException):
    """Nobody catches it."""


@pytest.fixture(autouse=True)
def small_parts(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(stored, "CHUNK", 4)
    monkeypatch.setattr(stored, "PART_CHUNKS", 2)


def records() -> list[dict[str, Any]]:
    """Conversations of one and of two turns, with two rows that must be left out."""
    rows: list[list[dict[str, str]]] = []
    for i in range(ROWS):
        turns = [(f"What is {10 * i} plus 1?", f"The sum is {10 * i + 1}{', and no more' * (i % 3)}.")]
        turns += [("And plus 2?", "That is more.")] * (i % 2)
        if i == LEFT_OUT[0]:
            turns = [("", "Nothing.")]
        said = [
            (role, text) for turn in turns for role, text in zip(("user", "assistant"), turn, strict=True)
        ]
        rows.append([{"role": role, "content": text} for role, text in said])
    return [{"messages": row} for row in rows]


def written(path: Path, rows: list[dict[str, Any]]) -> str:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return str(path)


def data(folder: Path, store: str | None, **fields: Any) -> AdversarialData:
    """Not set up."""
    utility: Any = [ChatTable(str(folder / "chats.jsonl"), "messages")]
    shown = written(folder / "shown.jsonl", [{"prompt": SHOWN, "reply": "301"}])
    fields = {
        "utility": utility,
        "evaluation": EvaluationSets(utility=[ChatTable(shown)]),
        "encoding": EncodingConfig(on_bad_row="skip"),
        "on_overlap": "skip",
    } | fields
    found = AdversarialData(
        TokenizerConfig("tinychat:base"),
        harmful_per_step=0,
        utility_per_step=6,
        utility_store=store,
        **fields,
    )
    found.trainer = Trainer(
        accelerator="cpu", logger=False, enable_checkpointing=False, default_root_dir=folder,
        enable_progress_bar=False,
    )  # fmt: skip
    return found


def batches(own: AdversarialData) -> Iterator[TrainingBatch]:
    own.setup("fit")
    yield from own.train_dataloader()


def assert_same(one: AdversarialData, other: AdversarialData) -> None:
    count = 0
    for a, b in zip(batches(one), batches(other), strict=True):
        assert a.utility is not None
        assert b.utility is not None
        assert torch.equal(a.utility.input_ids, b.utility.input_ids)
        assert torch.equal(a.utility.labels, b.utility.labels)
        assert torch.equal(a.utility.attention_mask, b.utility.attention_mask)
        assert a.utility.num_scored == b.utility.num_scored
        count += len(a.utility.input_ids)
    assert count == 54  # an epoch of 51 rows, in whole steps


def left_out(folder: Path) -> list[str]:
    return sorted((folder / "skipped_rows.jsonl").read_text().splitlines())


def test_rows_on_disk_are_those_in_memory_also_after_a_kill(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    written(tmp_path / "chats.jsonl", records())
    assert_same(data(tmp_path, None), data(tmp_path, str(tmp_path / "store")))
    (whole,) = (tmp_path / "store").iterdir()
    in_memory = data(tmp_path, None)
    in_memory.setup("fit")
    alone = left_out(tmp_path)
    assert len(alone) == 2

    # Killed in the fourth of seven parts: the three before it are not encoded again.
    asked: list[int] = []
    kills = [3]
    ordinary = stored._write_part

    def killed(folder: Path, number: int, *rest: Any) -> int:
        asked.append(number)
        if number in kills:
            kills.remove(number)
            raise Killed
        return ordinary(folder, number, *rest)

    monkeypatch.setattr(stored, "_write_part", killed)
    other = str(tmp_path / "other")
    with pytest.raises(Killed):
        data(tmp_path, other).setup("fit")
    (folder,) = Path(other).iterdir()
    assert folder.name == whole.name
    assert not (folder / "complete.json").exists()
    assert_same(data(tmp_path, other), data(tmp_path, None))
    assert asked == [0, 1, 2, 3, 3, 4, 5, 6]
    assert left_out(tmp_path) == alone
    for file in whole.iterdir():
        assert (folder / file.name).read_bytes() == file.read_bytes()

    # Complete, it is read and not written; another recipe's rows are others.
    asked.clear()
    data(tmp_path, other).setup("fit")
    assert not asked
    data(tmp_path, other, encoding=EncodingConfig(on_bad_row="skip", system="Be brief.")).setup("fit")
    assert asked == list(range(7))
    assert len(list(Path(other).iterdir())) == 2

    # A part that was cut, or of which a single byte has changed, is named.
    part = folder / "part_000002.arrow"
    content = part.read_bytes()
    middle = len(content) // 2
    for damaged in (content[:-9], content[:middle] + bytes([content[middle] ^ 1]) + content[middle + 1 :]):
        part.write_bytes(damaged)
        with pytest.raises(ValueError, match=rf"data.utility_store: {part} is damaged .*; remove {folder} "):
            data(tmp_path, other).setup("fit")


def test_what_is_refused_in_memory_is_refused_on_its_way_to_disk(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    store = str(tmp_path / "store")
    written(tmp_path / "chats.jsonl", records())
    with pytest.raises(BadRowError, match=r"bad row: .*chats.jsonl:8: .*on_bad_row: skip"):
        data(tmp_path, store, encoding=EncodingConfig()).setup("fit")
    with pytest.raises(ValueError, match=r"data.evaluation.utility overlaps .*chats.jsonl:31"):
        data(tmp_path, store, on_overlap="error").setup("fit")
    twice: Any = [ChatTable(written(tmp_path / "keys.jsonl", [_keyed("a"), _keyed("b"), _keyed("a")]),
                            columns={"prompt": "prompt", "reply": "reply", "key": "id"})]  # fmt: skip
    with pytest.raises(ValueError, match=r"two rows have the key 'a': .*keys.jsonl:1 and .*keys.jsonl:3"):
        data(tmp_path, store, utility=twice).setup("fit")
    empty: Any = [ChatTable(written(tmp_path / "empty.jsonl", []))]
    with pytest.raises(ValueError, match=r"data.utility.0: ChatTable of .* yields no row"):
        data(tmp_path, store, utility=empty).setup("fit")
    monkeypatch.setitem(sys.modules, "pyarrow", None)
    with pytest.raises(ValueError, match="data.utility_store: needs pyarrow; pip install pyarrow"):
        data(tmp_path, str(tmp_path / "new")).setup("fit")


def _keyed(key: str) -> dict[str, str]:
    return {"id": key, "prompt": f"Say {key}.", "reply": key}
