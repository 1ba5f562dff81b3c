"""Sources, encoding, sampling and the data module: nothing is lost silently, nothing overlaps, every order is
a pure function."""

from __future__ import annotations

import json
from collections import Counter
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from lightning import LightningModule, Trainer

from datamodules.adversarial import AdversarialData
from datamodules.batch import AdversarialBatch, TrainingBatch
from datamodules.division import Division
from datamodules.evaluation import EvaluationSets
from datamodules.rows import BadRowError, ChatRow, HarmfulRow, RowProblem, example_id
from datamodules.sources.combinators import AnsweredRequests, Repeated
from datamodules.sources.files import local_file
from datamodules.sources.harmbench import HarmBench
from datamodules.sources.tables import ChatTable, HarmfulTable
from datamodules.sources.tinychat.requests import REFUSALS
from datamodules.sources.tinychat.sources import TinyChatBenign, TinyChatHarmful
from datamodules.streams import ATTACKED, StepSampler, Stream
from datamodules.text.encoding import EncodingConfig
from datamodules.text.tokenizers import TokenizerConfig
from tests.conftest import ragged_batch


def write(path: Path, content: Any) -> str:
    path.write_text(content if isinstance(content, str) else json.dumps(content), encoding="utf-8")
    return str(path)


# --- batches


def broken(**changes: torch.Tensor) -> AdversarialBatch:
    batch = ragged_batch()
    return AdversarialBatch(**({name: getattr(batch, name) for name in batch.__dataclass_fields__} | changes))


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        (
            {"prompt_mask": ragged_batch().prompt_mask.long()},
            "expected prompt_mask of dtype bool, got torch.int64",
        ),
        ({"prompt_mask": ragged_batch().prompt_mask.flip(1)}, "expected prompt_mask left-padded"),
        (
            {"harmful_mask": torch.zeros_like(ragged_batch().harmful_mask)},
            "expected harmful_mask right-padded with at least one token",
        ),
        (
            {"attackable_mask": torch.ones_like(ragged_batch().prompt_mask)},
            "expected attackable_mask within prompt_mask",
        ),
        (
            {"attackable_mask": torch.zeros_like(ragged_batch().prompt_mask)},
            "at least one attackable token per row",
        ),
        ({"safe_ids": torch.zeros(3, 1, dtype=torch.long)}, "expected safe_ids and safe_mask of one shape"),
    ],
)
def test_batch_invariants(changes: dict[str, torch.Tensor], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        broken(**changes).validate()


def test_batches_move_as_a_whole() -> None:
    moved = TrainingBatch(ragged_batch(), None).to("meta")
    assert moved.adversarial is not None
    assert moved.adversarial.prompt_ids.device.type == "meta"


def test_example_ids_are_stable() -> None:
    assert example_id("adv_training_1/0") == 3428698758614272111
    assert 0 <= example_id("x") < 2**63


# --- sources


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


# --- sampling

streams = st.tuples(st.integers(1, 40), st.integers(1, 5), st.integers(0, 9), st.integers(1, 6))


@given(streams, st.integers(0, 30))
@settings(deadline=None)
def test_stream_is_a_pure_function_of_its_position(
    parameters: tuple[int, int, int, int], position: int
) -> None:
    rows, size, seed, window = parameters
    lengths = [(7 * i) % 13 for i in range(rows)]
    one, other = Stream(lengths, size, seed, window), Stream(lengths, size, seed, window)
    for number in range(position):
        one.batch(number)
    assert one.batch(position) == other.batch(position)


@given(streams)
@settings(deadline=None)
def test_every_row_occurs_equally_often(parameters: tuple[int, int, int, int]) -> None:
    rows, size, seed, window = parameters
    stream = Stream([1] * rows, size, seed, window)
    # After `rows` windows an integer number of passes is complete.
    counts = Counter(row for number in range(rows * window) for row in stream.batch(number))
    assert set(counts.values()) == {size * window}


def test_buckets_join_rows_of_like_length() -> None:
    lengths = [i % 50 for i in range(400)]
    spread = []
    for window in (1, 16):
        stream = Stream(lengths, 4, 0, window)
        batches = [[lengths[row] for row in stream.batch(number)] for number in range(64)]
        spread.append(sum(max(batch) - min(batch) for batch in batches))
    assert spread[1] < 0.3 * spread[0]


def test_ranks_share_a_micro_batch_and_iteration_starts_where_training_stands() -> None:
    # Trap: a random interleave leaves micro-batches without adversarial rows; here the counts are fixed.
    position = 0
    both = {"harmful": Stream([1] * 10, 2, 0), "utility": Stream([1] * 30, 4, 1)}
    division = Division(2, 4)
    samplers = [StepSampler(both, division, 5, lambda: position, rank, 2) for rank in range(2)]
    whole = list(StepSampler(both, division, 5, lambda: position))
    parts = [list(s) for s in samplers]
    for i in range(5):
        assert sorted(parts[0][i] + parts[1][i]) == sorted(whole[i])
        assert Counter(name for name, _ in parts[0][i]) == {"harmful": 1, "utility": 2}
    position = 3
    assert list(samplers[0]) == parts[0][3:]
    position = 5
    assert len(list(samplers[0])) == 5


@pytest.mark.parametrize("world", [1, 2])
def test_a_divided_step_holds_the_same_rows_and_attacks_each_once(world: int) -> None:
    streams = {"harmful": Stream(list(range(40)), 8, 0), "utility": Stream([1] * 30, 8, 1)}
    plain, divided = Division(8, 8), Division(8, 8, 4, outer_batch=4, utility_batch=4)
    for rank in range(world):
        whole = list(StepSampler(streams, plain, 5, lambda: 0, rank, world))
        parts = list(StepSampler(streams, divided, 20, lambda: 0, rank, world))
        for step in range(5):
            own = [item for place in range(4) for item in parts[4 * step + place]]
            attacked = [row for name, row in own if name == ATTACKED]
            assert attacked == [row for name, row in own if name == "harmful"]
            assert sorted(item for item in own if item[0] != ATTACKED) == sorted(whole[step])
        counts = [Counter(name for name, _ in part) for part in parts[:4]]
        some = 4 // world
        assert counts == [
            {"utility": some},
            {"utility": some},
            {ATTACKED: 2 * some, "harmful": some},
            {"harmful": some},
        ]
    assert (divided.weight("harmful"), divided.weight("utility"), divided.even) == (2.0, 2.0, False)
    assert Division(8, 8, 4).even
    assert Division(0, 8, 4).even


@pytest.mark.parametrize(
    ("counts", "fields", "message"),
    [
        (
            (8, 8, 3),
            {},
            "data.harmful_per_step: expected a multiple of micro_batches 3, got 8; or set data.o",
        ),
        ((8, 8, 2), {"outer_batch": 3}, "data.outer_batch: expected a divisor of harmful_per_step 8, got 3"),
        ((0, 8, 2), {"outer_batch": 3}, "data.outer_batch: expected a divisor of harmful_per_step 0, got 3"),
        (
            (8, 8, 2),
            {"utility_batch": 2},
            "data.utility_batch: 8 rows by 2 are 4 passes, expected at most da",
        ),
        (
            (8, 8, 2),
            {"attack_batch": 3},
            "data.attack_batch: expected a multiple of the 4 harmful rows of a ",
        ),
        ((8, 8, 2), {"attack_batch": 2}, "that divides harmful_per_step 8, got 2"),
        ((8, 8, 4), {"outer_batch": 8, "utility_batch": 8}, "data.micro_batches: expected at most 2, the pa"),
    ],
)
def test_what_does_not_divide(counts: tuple[int, int, int], fields: dict[str, int], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        Division(*counts, **fields)


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({}, "data.harmful_per_step: expected a multiple of micro_batches x devices = 4 x 4, got 8"),
        (
            {"outer_batch": 2, "utility_batch": 2},
            "data.outer_batch: expected a multiple of the 4 devices, got",
        ),
    ],
)
def test_what_devices_cannot_share(fields: dict[str, int], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        Division(8, 8, 4, **fields).check_devices(4)


# --- the data module


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
