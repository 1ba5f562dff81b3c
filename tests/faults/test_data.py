"""Faults of the data that an audit found: each is refused, or named with file and line."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from lightning import Trainer

from datamodules.adversarial import AdversarialData
from datamodules.evaluation import EvaluationData, EvaluationSets
from datamodules.sources.combinators import Repeated
from datamodules.sources.harmbench import HarmBench
from datamodules.sources.tables import ChatTable, HarmfulTable
from datamodules.sources.tinychat.sources import TinyChatBenign, TinyChatHarmful
from datamodules.text.encoding import EncodingConfig
from tests.support.source_files import TINYCHAT, evaluated, write

# --- A7: equal keys


def test_a07_files_of_one_name_in_two_folders_stay_apart(tmp_path: Path) -> None:
    first = write(tmp_path / "a" / "prompts.csv", "prompt\none\ntwo\n")
    second = write(tmp_path / "b" / "prompts.csv", "prompt\nthree\nfour\nfive\n")
    columns = {"prompt": "prompt"}
    data = evaluated([ChatTable(first, columns=columns), ChatTable(second, columns=columns)])
    keys = [key for batch in data.loader("harmless") for key in batch.keys]
    assert keys == [*(f"a/prompts.csv:{i}" for i in (2, 3)), *(f"b/prompts.csv:{i}" for i in (2, 3, 4))]


def test_a07_equal_keys_are_an_error_that_names_both_places(tmp_path: Path) -> None:
    path = write(tmp_path / "p.csv", "prompt,id\none,x\ntwo,y\nthree,x\nfour,x\n")
    source = ChatTable(path, columns={"prompt": "prompt", "key": "id"})
    message = rf"data.evaluation.harmless: two rows have the key 'x': {path}:2 and {path}:4; give"
    with pytest.raises(ValueError, match=message):
        evaluated([source])
    same_name = [write(tmp_path / part / "set" / "p.txt", "hello\n") for part in "ab"]
    message = rf"two rows have the key 'set/p.txt:1': {same_name[0]}:1 and {same_name[1]}:1"
    with pytest.raises(ValueError, match=message):
        evaluated([ChatTable(p, "lines") for p in same_name])


def test_a07_training_rows_have_keys_of_their_own_too() -> None:
    def build(utility: list[Any]) -> None:
        AdversarialData(
            TINYCHAT,
            [TinyChatHarmful("train")],
            utility,
            encoding=EncodingConfig(160),
            harmful_per_step=1,
            utility_per_step=1,
        ).setup("fit")

    guides = TinyChatBenign("train", 100, categories=["guide"])
    with pytest.raises(ValueError, match=r"data.utility: two rows have the key 'tinychat/guide/"):
        build([guides, guides])
    build([Repeated(guides, 2)])


# --- A12: sources that yield nothing, nonsense in fields


def test_a12_unknown_names_and_counts_are_refused() -> None:
    with pytest.raises(ValueError, match=r"TinyChatBenign.categories: .*'guide'.*got .*guides"):
        TinyChatBenign("validation", categories=["guides"])
    makers: list[Callable[[Any], object]] = [
        lambda n: ChatTable("x.csv", limit=n),
        lambda n: HarmfulTable("x.csv", limit=n),
        lambda n: HarmBench("x.csv", "x.json", limit=n),
        lambda n: TinyChatHarmful("train", limit=n),
        lambda n: TinyChatBenign("train", num_rows=n),
        lambda n: Repeated(TinyChatBenign("train"), times=n),
        lambda n: EvaluationSets(batch_size=n),
        lambda n: EncodingConfig(max_length=n),
        lambda n: AdversarialData(TINYCHAT, [TinyChatHarmful("train")], utility_per_step=0, micro_batches=n),
        lambda n: AdversarialData(TINYCHAT, [TinyChatHarmful("train")], utility_per_step=0, bucket_window=n),
    ]
    for make in makers:
        for nonsense in (-1, 0, float("nan"), True):
            with pytest.raises(ValueError, match=rf"expected an integer >= [12].*, got {nonsense}"):
                make(nonsense)


def test_a12_where_names_a_column_or_value_that_no_row_has(tmp_path: Path) -> None:
    path = write(tmp_path / "x.csv", "prompt,label\na,safe\nb,unsafe\n")
    columns = {"prompt": "prompt"}
    with pytest.raises(
        ValueError, match=r"where: no row of .*x.csv has a column 'lable'; it has \['label', 'pro"
    ):
        evaluated([ChatTable(path, columns=columns, where={"lable": "safe"})])
    with pytest.raises(
        ValueError, match=r"where: no row of .*x.csv has label = 'save'; there are \['safe', 'un"
    ):
        evaluated([ChatTable(path, columns=columns, where={"label": "save"})])
    data = evaluated([ChatTable(path, columns=columns, where={"label": "safe"})])
    assert len(data.examples["harmless"]) == 1


@pytest.mark.parametrize("content", ["", "prompt,reply\n", "\n\n"])
def test_a12_an_empty_file_is_an_error_that_names_it(tmp_path: Path, content: str) -> None:
    path = write(tmp_path / "empty.csv", content)
    good = ChatTable(write(tmp_path / "good.txt", "hello\n"), "lines")
    message = rf"data.evaluation.harmless.1: ChatTable of {path} yields no row; mend"
    with pytest.raises(ValueError, match=message):
        evaluated([good, ChatTable(path)])
    with pytest.raises(ValueError, match=rf"Repeated of ChatTable of {path} yields no row"):
        evaluated([good, Repeated(ChatTable(path), 2)])


def test_a12_a_source_of_bad_rows_alone_is_an_error_even_where_bad_rows_are_skipped(tmp_path: Path) -> None:
    path = write(tmp_path / "bad.csv", "question\na\nb\n")
    good = ChatTable(write(tmp_path / "good.txt", "hello\n"), "lines")
    with pytest.raises(
        ValueError, match=r"harmless.1: .*bad.csv yields no usable row; 2 bad, the first: .*bad.csv:2"
    ):
        evaluated([good, ChatTable(path)], on_bad_row="skip")


# --- an evaluation alone


def test_an_evaluation_needs_no_training_source(tmp_path: Path) -> None:
    data = EvaluationData(
        TINYCHAT,
        EvaluationSets(
            [TinyChatHarmful("validation", limit=3)],
            [TinyChatBenign("validation", 4)],
            [TinyChatBenign("validation", 5)],
        ),
        EncodingConfig(160),
    )
    data.trainer = Trainer(
        accelerator="cpu", logger=False, enable_checkpointing=False, default_root_dir=tmp_path
    )
    data.setup("test")
    # Equal keys in two subjects are two examples: the subject is part of a result's identity.
    assert {subject: len(rows) for subject, rows in data.examples.items()} == {
        "harmful": 3,
        "harmless": 4,
        "utility": 5,
    }
    (batch,) = data.loader("harmful")
    assert batch.adversarial is not None
