"""What the audit found about results and evaluations, each as it was watched: nothing is lost, counted twice,
or said of what was not measured."""

from __future__ import annotations

import errno
import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from callbacks.evaluations.probe import Probe
from callbacks.evaluations.schedule import Schedule
from callbacks.evaluations.session import Place, Session
from callbacks.judges.exact import ExactMatch
from callbacks.metrics.names import Metric
from callbacks.report.load import load
from callbacks.report.report import write_report
from datamodules import line_files
from datamodules.results import ResultsStore, read_measurements, read_rows
from datamodules.sources.tinychat.sources import TinyChatHarmful
from datamodules.text.encoding import Encoder, EncodingConfig, evaluation_batch
from lightning_modules.attacks.embedding.pgd import EmbeddingPGD
from tests.conftest import chat_model, tinychat_format
from tests.support.rows import measurement, row

Run = Callable[..., tuple[int, str, str]]


class Data:
    """Six held-out requests in batches of two."""

    def __init__(self, repeat: bool = False) -> None:
        self.encoding = EncodingConfig(max_length=160)
        encoder = Encoder(tinychat_format(), self.encoding)
        rows = encoder.harmful(TinyChatHarmful("validation", limit=6).rows())
        self.rows = [*rows, rows[0]] if repeat else rows
        self.examples = {"harmful": self.rows}
        self.blocks: dict[str, Any] = {}

    def rows_of(self, subject: str, block: str) -> list[Any]:
        return self.rows

    def loader(
        self, subject: str, limit: int | None, rank: int, world_size: int, block: str, against: str
    ) -> list[Any]:
        own = self.rows[:limit][rank::world_size]
        return [evaluation_batch(own[i : i + 2], "user") for i in range(0, len(own), 2)]


class Suite:
    """The request itself and a short attack on its embeddings."""

    name, schedule, max_new_tokens, seed = "robustness", Schedule(), 4, 0

    def probes(self) -> list[Probe]:
        attack = EmbeddingPGD(epsilon=0.1, num_steps=2)
        return [
            Probe("harmful", "success_rate", ExactMatch(), "embedding", attack),
            Probe("harmful", "refusal_rate", ExactMatch()),
        ]


def session(folder: Path, data: Data | None = None) -> Session:
    place = Place(chat_model(), folder, "test", 0)
    return Session(place, data or Data(), [Suite()])  # type: ignore[arg-type]


def finish(folder: Path) -> dict[Metric, Any]:
    """Do what is left; returns all measures but wall times."""
    own = session(folder)
    for job in own.jobs:
        own.do(job)
    found = own.finish()
    assert found.complete
    return {m: e.estimate for m, e in found.measures.items() if m.quantity != "seconds_per_example"}


# --- A7: equal keys


def test_a07_examples_with_one_key_are_an_error_not_a_smaller_n(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"data.evaluation.harmful: several rows have the key 'tinychat/"):
        session(tmp_path, Data(repeat=True))


# --- A14: lines after a kill


def test_a14_a_kill_at_any_byte_neither_loses_nor_repeats_a_row(tmp_path: Path) -> None:
    expected = finish(tmp_path / "whole")
    whole = (tmp_path / "whole" / "rows" / "rows_rank0.jsonl").read_bytes()
    plans = (tmp_path / "whole" / "rows" / "measurements.jsonl").read_bytes()
    assert whole.count(b"\n") == 12
    first = whole.index(b"\n")
    for number, cut in enumerate([0, 1, first, first + 1, len(whole) // 3, len(whole) - 1]):
        folder = tmp_path / str(number) / "rows"
        folder.mkdir(parents=True)
        (folder / "rows_rank0.jsonl").write_bytes(whole[:cut])
        (folder / "measurements.jsonl").write_bytes(plans[: min(len(plans), 2 * cut)])
        assert finish(folder.parent) == expected
        lines = (folder / "rows_rank0.jsonl").read_bytes()
        assert lines.startswith(whole[: whole.rfind(b"\n", 0, cut) + 1])
        assert lines.count(b"\n") == len(read_rows(folder.parent)) == 12
        assert [own.attack for own in read_measurements(folder.parent)] == ["embedding", ""]
    assert finish(tmp_path / "whole") == expected
    assert (tmp_path / "whole" / "rows" / "rows_rank0.jsonl").read_bytes() == whole


def test_a14_a_full_disk_leaves_whole_lines(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    store = ResultsStore(tmp_path)
    store.add([row("a")])

    def full(descriptor: int) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    with monkeypatch.context() as patch:
        patch.setattr(line_files.os, "fsync", full)
        with pytest.raises(OSError, match="No space left"):
            store.add([row("b")])
    assert [own.example for own in read_rows(tmp_path)] == ["a"]
    store.add([row("b")])
    assert [own.example for own in read_rows(tmp_path)] == ["a", "b"]


# --- A16: what a report says


def test_a16_a_measure_names_the_judge_that_decided_and_a_test_has_no_training_cost(tmp_path: Path) -> None:
    plan = measurement(stage="test", judge="classifier:x@7")
    store = ResultsStore(tmp_path)
    store.announce([plan])
    store.add([row("a", plan, True)])
    (tmp_path / "cost.json").write_text(json.dumps({"steps": 5, "seconds": 3.0}))
    found = load(tmp_path, "test")
    assert found.after is not None
    assert found.after.measures[Metric("success_rate", "harmful", "gcg")].judge == "classifier:x@7"
    assert found.cost == {}
    text = write_report(tmp_path, "test")
    assert "classifier:x@7" in text
    assert "target's first sentence" not in text
    assert "Cost" not in text


# --- evaluations in the loop


def test_an_evaluation_without_rows_says_what_to_set(tmp_path: Path) -> None:
    data = SimpleNamespace(examples={"harmful": []}, blocks={}, rows_of=lambda subject, block: [])
    with pytest.raises(ValueError, match="Suite: found no row to evaluate; set data.evaluation.harmful"):
        session(tmp_path, data)  # type: ignore[arg-type]


def test_every_process_announces_the_same_and_does_its_share(tmp_path: Path) -> None:
    places = [Place(chat_model(), tmp_path, "test", 0, rank, 4) for rank in range(4)]
    shares = [Session(place, Data(), [Suite()]) for place in places]  # type: ignore[arg-type]
    told = [[replace(m, call="") for m in own.store.measurements] for own in shares]
    assert told[0] and all(own == told[0] for own in told)
    for own in shares:
        for job in own.jobs:
            own.do(job)
    assert len(read_rows(tmp_path)) == 12
    (found,) = load(tmp_path, "test").snapshots
    assert found.complete
    assert found.measures[Metric("success_rate", "harmful", "embedding")].estimate.n == 6
