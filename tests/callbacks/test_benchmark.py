"""Standard benchmarks: the harness's own numbers, as rows."""

from __future__ import annotations

import copy
import random
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from callbacks.evaluations import benchmark as module
from callbacks.evaluations.benchmark import Benchmark, BenchmarkChunk, BenchmarkEvaluation
from callbacks.evaluations.harness import load_tasks
from callbacks.evaluations.harness_scoring import Scorer
from callbacks.evaluations.schedule import Schedule
from callbacks.evaluations.session import Place, Session
from callbacks.metrics.names import Metric
from datamodules.results import ResultsStore
from datamodules.sources.questions import ArcQuestions, MmluQuestions
from lightning_modules.models.adapters import disabled_adapters
from lightning_modules.models.language_model import LanguageModel
from lightning_modules.models.loading import LoraSettings, ModelConfig, load_model, load_seeded
from tests.conftest import chat_model, tinychat_format
from tests.support.benchmarks import arc_easy, arc_file, measured, mmlu_folder, opened

pytest.importorskip("lm_eval")


@pytest.fixture
def arc(tmp_path: Path) -> Benchmark:
    return arc_easy(tmp_path)


@pytest.fixture
def small_chunks(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "CHUNK", 3)


def harness_own(benchmark: Benchmark, model: LanguageModel, indices: list[int]) -> dict[str, Any]:
    """What the harness's own entry point reports on the same documents."""
    from lm_eval import simple_evaluate
    from lm_eval.models.huggingface import HFLM
    from lm_eval.tasks import TaskManager

    docs = benchmark.docs
    assert docs is not None
    (own,) = load_tasks(benchmark.task, benchmark.num_fewshot, docs.questions(), docs.examples())
    lm = HFLM(pretrained=model.module, tokenizer=copy.deepcopy(model.chat.tokenizer), batch_size=5)
    found: Any = simple_evaluate(
        model=lm,
        tasks=[own.task],
        samples={own.name: indices},
        # The task is handed over; reading all of the harness's own would take seconds.
        task_manager=TaskManager(include_defaults=False),
        bootstrap_iters=0,
        apply_chat_template=benchmark.chat_template,
        num_fewshot=benchmark.num_fewshot or None,
    )
    return {**found["results"][own.name], "samples": found["samples"][own.name]}


@pytest.mark.parametrize("metric", ["acc", "acc_norm"])
@pytest.mark.parametrize("chat", [False, True])
@pytest.mark.parametrize("shots", [0, 2])
def test_the_rows_say_what_the_harness_says(tmp_path: Path, metric: Any, chat: bool, shots: int) -> None:
    docs = ArcQuestions(arc_file(tmp_path / "arc.jsonl"), arc_file(tmp_path / "shots.jsonl", 6, seed=1))
    own = Benchmark("arc_easy", docs, metric, num_fewshot=shots, chat_template=chat, batch_size=5)
    session = opened(tmp_path / "run", own)
    rights = measured(session)
    theirs = harness_own(own, session.place.model, list(range(12)))
    assert np.mean([*rights.values()]) == theirs[f"{metric},none"]
    assert [*rights.values()] == [bool(sample[metric]) for sample in theirs["samples"]]
    assert [row.prompt for row in session.rows] == [s["arguments"][0][0] for s in theirs["samples"]]


def test_the_likeliest_choice_is_the_one_of_a_plain_loop(tmp_path: Path, arc: Benchmark) -> None:
    session = opened(tmp_path / "run", arc)
    measured(session)
    model, (chunk,) = session.place.model, session.jobs
    assert isinstance(chunk, BenchmarkChunk)
    encode = model.chat.tokenizer.encode
    for row, item in zip(session.rows, chunk.items, strict=True):
        sums = []
        for choice in item.choices:
            start, ids = len(encode(item.prompt)), encode(f"{item.prompt} {choice}")
            with torch.no_grad():
                log_probs = model.module(torch.tensor([ids])).logits.log_softmax(-1)[0]
            sums.append(sum(float(log_probs[i - 1, ids[i]]) for i in range(start, len(ids))))
        assert row.reply == item.choices[int(np.argmax(sums))]
        assert row.verdict("acc@" + next(iter(row.verdicts)).partition("@")[2]) == (row.reply == row.expected)


@pytest.mark.usefixtures("small_chunks")
def test_what_is_on_disk_is_not_asked_again(
    tmp_path: Path, arc: Benchmark, monkeypatch: pytest.MonkeyPatch
) -> None:
    whole = measured(opened(tmp_path / "whole", arc))
    first = opened(tmp_path / "run", arc)
    for job in first.jobs[:2]:
        first.do(job)
    asked: list[int] = []
    outcomes = Scorer.outcomes

    def counting(self: Scorer, items: Any, metric: str) -> list[tuple[str, bool]]:
        asked.append(len(items))
        return outcomes(self, items, metric)

    monkeypatch.setattr(Scorer, "outcomes", counting)
    again = opened(tmp_path / "run", arc)
    assert measured(again) == whole
    assert asked == [3, 3]
    measures = again.finish().measures
    assert measures[Metric("accuracy", "utility", block="arc_easy")].estimate.n == 12


@pytest.mark.usefixtures("small_chunks")
def test_processes_share_the_chunks(tmp_path: Path, arc: Benchmark) -> None:
    whole = measured(opened(tmp_path / "whole", arc))
    shares = [measured(opened(tmp_path / "run", arc, rank=rank, world_size=2)) for rank in (0, 1)]
    assert [len(share) for share in shares] == [6, 6]
    assert shares[0] | shares[1] == whole
    (measurement,) = ResultsStore(tmp_path / "run").measurements
    assert (measurement.n, measurement.block, measurement.quantity) == (12, "arc_easy", "accuracy")


def test_every_process_has_a_part(tmp_path: Path, arc: Benchmark) -> None:
    shares = [opened(tmp_path / "run", arc, rank=rank, world_size=4).jobs for rank in range(4)]
    assert [[len(job) for job in share] for share in shares] == [[3], [3], [3], [3]]


def test_the_trainers_autocast_stays_on(tmp_path: Path, arc: Benchmark) -> None:
    (chunk,) = opened(tmp_path / "run", arc).jobs
    assert isinstance(chunk, BenchmarkChunk)
    harness = chunk.scorer.harness
    with torch.autocast("cpu", torch.bfloat16):
        chunk.scorer.outcomes(chunk.items, "acc")
        assert harness._model_call(torch.tensor([[1, 2, 3]])).dtype == torch.bfloat16
    chunk.scorer.outcomes(chunk.items, "acc")
    assert harness._model_call(torch.tensor([[1, 2, 3]])).dtype == torch.float32


def test_documents_that_do_not_fit_are_counted(
    tmp_path: Path, arc: Benchmark, caplog: pytest.LogCaptureFixture
) -> None:
    model = chat_model()
    opened(tmp_path / "run", arc, model=model)
    assert caplog.text == ""
    model.module.config.max_position_embeddings = 8
    opened(tmp_path / "run", arc, model=model)
    assert "arc_easy: 12 of 12 documents are longer than the model's 8 tokens" in caplog.text


def test_a_hub_that_is_out_of_reach_is_one_line(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def unreachable(**_: Any) -> None:
        raise ConnectionError("Couldn't reach 'baber/piqa' on the Hub\nand more")

    monkeypatch.setattr("datasets.load_dataset", unreachable)
    with pytest.raises(ValueError, match=r"piqa: cannot load 'baber/piqa' from the hub: Couldn't .*; give"):
        opened(tmp_path / "run", Benchmark("piqa"))


def test_documents_of_the_hub_are_what_the_harness_loads(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from datasets import Dataset, DatasetDict

    docs = ArcQuestions(arc_file(tmp_path / "arc.jsonl"))
    asked: list[str] = []

    def loaded(path: str, name: str | None = None, **_: Any) -> DatasetDict:
        asked.append(f"{path}/{name}")
        own = Dataset.from_list([question.document for question in docs.questions()])
        return DatasetDict({"train": own, "validation": own, "test": own})

    monkeypatch.setattr("datasets.load_dataset", loaded)
    own = Benchmark("arc_easy", None, "acc_norm", limit=5)
    theirs = measured(opened(tmp_path / "hub", own))
    assert asked == ["allenai/ai2_arc/ARC-Easy"]
    assert [*theirs] == [f"arc_easy/{i}" for i in (0, 2, 4, 7, 9)]
    local = measured(opened(tmp_path / "local", replace(own, docs=docs)))
    assert [*theirs.values()] == [*local.values()]


def test_adapters_count(tmp_path: Path) -> None:
    weights = load_seeded(ModelConfig("tinychat:aligned", lora=LoraSettings(r=2)), 0)
    model = LanguageModel(weights, tinychat_format())
    own = Benchmark("arc_easy", ArcQuestions(arc_file(tmp_path / "arc.jsonl", n=40)), batch_size=5)
    plain = chosen(opened(tmp_path / "plain", own, model=model))
    with torch.no_grad():
        for name, weight in weights.named_parameters():
            if "lora_B" in name:
                weight.normal_(0, 0.5)  # enough to change which choice is likeliest
    trained = chosen(opened(tmp_path / "trained", own, model=model))
    assert trained != plain
    with disabled_adapters(weights):
        assert chosen(opened(tmp_path / "off", own, model=model)) == plain
    alone = load_model(ModelConfig("tinychat:aligned"))
    assert chosen(opened(tmp_path / "alone", own, model=LanguageModel(alone, tinychat_format()))) == plain


def chosen(session: Session) -> list[str]:
    measured(session)
    return [str(row.reply) for row in session.rows]


def test_nothing_of_the_process_is_changed(tmp_path: Path, arc: Benchmark) -> None:
    model = chat_model()
    model.module.train()
    weights = {name: value.clone() for name, value in model.module.state_dict().items()}
    pad, vocabulary = model.chat.tokenizer.pad_token, len(model.chat.tokenizer)
    before = repr((random.getstate(), np.random.get_state())), torch.get_rng_state()
    measured(opened(tmp_path / "run", replace(arc, chat_template=True), model=model))
    assert repr((random.getstate(), np.random.get_state())) == before[0]
    assert torch.equal(torch.get_rng_state(), before[1])
    assert model.module.training
    assert (model.chat.tokenizer.pad_token, len(model.chat.tokenizer)) == (pad, vocabulary)
    assert all(torch.equal(value, weights[name]) for name, value in model.module.state_dict().items())


def test_a_limit_takes_evenly_spaced_documents(tmp_path: Path, arc: Benchmark) -> None:
    rights = measured(opened(tmp_path / "run", replace(arc, limit=4)))
    assert [*rights] == [f"arc_easy/q{i}" for i in (0, 3, 6, 9)]
    evaluation = BenchmarkEvaluation([arc], Schedule(test_limit=3))
    place = Place(chat_model(), tmp_path / "other", "test", 0)
    assert evaluation.work(place, "")[0][0].n == 3


def test_mmlu_asks_every_subject_by_its_own_task(tmp_path: Path) -> None:
    own = Benchmark("mmlu", MmluQuestions(mmlu_folder(tmp_path)), num_fewshot=2)
    session = opened(tmp_path / "run", own)
    rights = measured(session)
    assert [*rights] == [f"mmlu_{s}/{i}" for s in ("anatomy", "virology") for i in range(3)]
    first = session.rows[0]
    assert first.prompt.startswith(
        "The following are multiple choice questions (with answers) about anatomy."
    )
    assert first.prompt.count("Answer:") == 3
    assert "virology" not in first.prompt
    assert (first.category, first.expected) == ("anatomy", "A")
    found = session.finish().measures[Metric("accuracy", "utility", block="mmlu_2shot")]
    assert {name: own.n for name, own in found.groups["category"].items()} == {"anatomy": 3, "virology": 3}
    assert found.metric.title == "mmlu 2shot: accuracy"
