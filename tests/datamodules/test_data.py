"""The data module: nothing is lost silently, nothing overlaps."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from lightning import LightningModule, Trainer

from datamodules.adversarial import AdversarialData
from datamodules.evaluation import EvaluationSets
from datamodules.rows import BadRowError, ChatRow
from datamodules.sources.combinators import AnsweredRequests, Repeated
from datamodules.sources.tables import ChatTable
from datamodules.sources.tinychat.requests import REFUSALS
from datamodules.sources.tinychat.sources import TinyChatBenign, TinyChatHarmful
from datamodules.text.encoding import EncodingConfig
from datamodules.text.tokenizers import TokenizerConfig
from tests.support.source_files import write


class Idle(LightningModule):
    pass


def prepared(tmp_path: Path, stage: str = "fit", **fields: Any) -> AdversarialData:
    fields = {
        "harmful": [TinyChatHarmful("train")],
        "utility": [TinyChatBenign("train", 100)],
        "harmful_per_step": 2,
        "utility_per_step": 4,
        "encoding": EncodingConfig(160),
    } | fields
    data = AdversarialData(TokenizerConfig("tinychat:base"), **fields)
    data.trainer = Trainer(
        accelerator="cpu",
        logger=False,
        enable_checkpointing=False,
        default_root_dir=tmp_path,
        enable_progress_bar=False,
    )
    data.setup(stage)
    return data


def test_micro_batches_hold_fixed_counts_each_padded_to_its_own_length(tmp_path: Path) -> None:
    # Trap: adversarial rows padded to the utility rows' length.
    batches = list(prepared(tmp_path).train_dataloader())
    for batch in batches[:20]:
        assert batch.adversarial is not None
        assert batch.utility is not None
        assert (len(batch.adversarial), len(batch.utility)) == (2, 4)
        assert batch.adversarial.prompt_mask.any(0).all()
        assert batch.adversarial.harmful_mask.any(0).all()
        assert batch.utility.attention_mask.any(0).all()


def table(tmp_path: Path, *replies: str) -> ChatTable:
    rows = "\n".join(
        json.dumps({"prompt": f"question {i}", "reply": reply}) for i, reply in enumerate(replies)
    )
    return ChatTable(write(tmp_path / "rows.jsonl", rows))


def test_bad_rows_stop_the_run_or_are_listed(tmp_path: Path) -> None:
    utility = [table(tmp_path, "good", "", "word " * 200, "fine")]
    with pytest.raises(
        BadRowError,
        match=r"rows.jsonl:2: empty reply .*; mend the row, or set data.encoding.on_bad_row: skip",
    ):
        prepared(tmp_path, utility=utility)
    data = prepared(tmp_path, utility=utility, encoding=EncodingConfig(160, on_bad_row="skip"))
    listed = [json.loads(line) for line in (tmp_path / "skipped_rows.jsonl").read_text().splitlines()]
    assert [row["where"].rsplit(":")[-1] for row in listed] == ["2", "3"]
    assert "tokens are more than max_length 160" in listed[1]["reason"]
    assert data._training is not None
    assert len(data._training.rows["utility"]) == 2


def test_overlap_with_an_evaluation_set_is_refused_unless_allowed_by_name(tmp_path: Path) -> None:
    evaluation = EvaluationSets(
        harmless=[ChatTable(write(tmp_path / "e.txt", "Question  0!\nanother\n"), "lines")]
    )
    utility = [table(tmp_path, "good", "fine")]
    message = (
        r"data.evaluation.harmless overlaps the training data in 1 rows, first .*e.txt:1 = .*rows.jsonl:1"
    )
    with pytest.raises(ValueError, match=message + r".*data.allow_overlap: \[evaluation.harmless\]"):
        prepared(tmp_path, utility=utility, evaluation=evaluation)
    prepared(tmp_path, utility=utility, evaluation=evaluation, allow_overlap=["evaluation.harmless"])
    data = prepared(tmp_path, utility=utility, evaluation=evaluation, on_overlap="skip")
    assert data._training is not None
    assert [example.row.prompt for example in data._training.rows["utility"]] == ["question 1"]
    assert "also in evaluation.harmless" in (tmp_path / "skipped_rows.jsonl").read_text()


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"micro_batches": 3}, "data.harmful_per_step: expected a multiple of micro_batches 3, got 2"),
        ({"harmful": []}, "data.harmful: expected at least one source for harmful_per_step 2, got none"),
        ({"harmful_per_step": 0, "utility_per_step": 0}, "expected a positive count, got 0 for both"),
        ({"micro_batches": 2}, r"data.micro_batches: expected trainer.accumulate_grad_batches 1, got 2; set"),
        ({"encoding": EncodingConfig(3)}, "tokens are more than max_length 3"),
    ],
)
def test_impossible_settings(tmp_path: Path, fields: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        prepared(tmp_path, **fields)


def test_both_streams_may_be_weighed_and_answered(tmp_path: Path) -> None:
    source = Repeated(AnsweredRequests(TinyChatHarmful("validation"), "safe"), 2)
    rows = [row for row in source.rows() if isinstance(row, ChatRow)]
    assert len(rows) == 2 * len(list(TinyChatHarmful("validation").rows()))
    assert all(row.reply.startswith(REFUSALS) for row in rows)


def test_evaluation_subsets_are_evenly_spaced(tmp_path: Path) -> None:
    data = prepared(tmp_path, "test", evaluation=EvaluationSets(harmful=[TinyChatHarmful("validation")]))
    keys = [key for batch in data.loader("harmful", limit=5) for key in batch.keys]
    everything = [key for batch in data.loader("harmful") for key in batch.keys]
    assert keys == [everything[i * len(everything) // 5] for i in range(5)]
    ranks = [[k for b in data.loader("harmful", None, r, 2) for k in b.keys] for r in range(2)]
    assert sorted(ranks[0] + ranks[1]) == sorted(everything)
