"""Standard benchmarks: the harness's own numbers, as rows."""

from __future__ import annotations

import copy
import importlib.util
import json
import random
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import yaml

from callbacks.evaluations import benchmark as module
from callbacks.evaluations.benchmark import Benchmark, BenchmarkChunk, BenchmarkEvaluation
from callbacks.evaluations.harness import load_tasks
from callbacks.evaluations.harness_scoring import Scorer, ask
from callbacks.evaluations.schedule import Schedule
from callbacks.evaluations.session import Place, Session
from callbacks.metrics.names import Metric
from datamodules.results import ResultsStore
from datamodules.sources.questions import ArcQuestions, MmluQuestions, PiqaQuestions
from lightning_modules.models.language_model import LanguageModel
from tests.conftest import chat_model
from tests.support.small_run import small_config

pytest.importorskip("lm_eval")

WORDS = ["blue", "stone", "a long river", "cloud", "the small garden", "fire", "seven", "bread and salt"]


def arc_file(path: Path, n: int = 12, seed: int = 0) -> str:
    """Questions with choices of different lengths, in the hub's layout."""
    draw = random.Random(seed)
    with path.open("w", encoding="utf-8") as stream:
        for i in range(n):
            text = draw.sample(WORDS, 4)
            record = {
                "id": f"q{i}",
                "question": f"What goes with {draw.choice(WORDS)} and {i}?",
                "choices": {"text": text, "label": list("ABCD")},
                "answerKey": draw.choice("ABCD"),
            }
            stream.write(json.dumps(record) + "\n")
    return str(path)


def mmlu_folder(path: Path) -> str:
    for split, n in (("test", 3), ("dev", 2)):
        (path / split).mkdir()
        for subject in ("anatomy", "virology"):
            rows = [f"{split} {subject} {i}?,blue,stone,fire,cloud,{i}" for i in range(n)]
            text = "\n".join(["question,choice0,choice1,choice2,choice3,answer", *rows]) + "\n"
            (path / split / f"{subject}_{split}.csv").write_text(text, encoding="utf-8")
    return str(path)


@pytest.fixture
def arc(tmp_path: Path) -> Benchmark:
    return Benchmark("arc_easy", ArcQuestions(arc_file(tmp_path / "arc.jsonl")), batch_size=5)


@pytest.fixture
def small_chunks(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "CHUNK", 3)


def opened(folder: Path, *benchmarks: Benchmark, model: LanguageModel | None = None, **place: Any) -> Session:
    """A session of `thundercat test`; the questions need no evaluation data."""
    own = Place(model or chat_model(), folder, "test", 0, **place)
    return Session(own, None, [BenchmarkEvaluation(list(benchmarks))])  # type: ignore[arg-type]


def measured(session: Session) -> dict[str, bool]:
    """Whether each example is right."""
    for job in session.jobs:
        session.do(job)
    return {row.example: row.verdict(next(iter(row.verdicts))) for row in session.rows}


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


def test_what_decides_an_answer_is_in_the_settings(tmp_path: Path, arc: Benchmark) -> None:
    other = Benchmark("arc_easy", ArcQuestions(arc_file(tmp_path / "other.jsonl", seed=3)))
    ways = [
        arc,
        replace(arc, metric="acc_norm"),
        replace(arc, chat_template=True),
        replace(arc, limit=5),
        other,
    ]
    sessions = [opened(tmp_path / "run", way) for way in ways]
    digests = [session.jobs[0].measurement.settings for session in sessions]
    digests.append(opened(tmp_path / "run", arc, precision="bf16-mixed").jobs[0].measurement.settings)
    assert len({*digests}) == 6
    assert opened(tmp_path / "again", replace(arc, batch_size=2)).jobs[0].measurement.settings == digests[0]


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"task": "arc_eazy"}, r"benchmarks: the harness knows no task 'arc_eazy'; `lm_eval ls tasks`"),
        ({"task": "gsm8k"}, r"benchmarks: expected a multiple-choice task, got 'gsm8k'"),
        ({"task": "piqa"}, r"benchmarks: piqa: its template does not fit the documents, .*arc.jsonl:1"),
        ({"num_fewshot": 2}, r"benchmarks: arc_easy: num_fewshot is 2, and docs has no solved examples"),
        ({"task": "mmlu"}, r"benchmarks: mmlu: expected one task for the documents, got 57"),
    ],
)
def test_a_benchmark_that_cannot_be_asked_is_named(
    tmp_path: Path, arc: Benchmark, change: dict[str, Any], message: str
) -> None:
    with pytest.raises(ValueError, match=message):
        opened(tmp_path / "run", replace(arc, **change))


def test_a_metric_that_the_task_lacks_is_named(tmp_path: Path) -> None:
    own = Benchmark("mmlu", MmluQuestions(mmlu_folder(tmp_path)), "acc_norm")
    with pytest.raises(ValueError, match=r"mmlu_anatomy has no metric 'acc_norm'; it has \['acc'\]"):
        opened(tmp_path / "run", own)


def test_one_benchmark_twice_is_refused(arc: Benchmark) -> None:
    with pytest.raises(ValueError, match=r"no two alike, got 'arc_easy' twice"):
        BenchmarkEvaluation([arc, replace(arc, limit=3)])
    with pytest.raises(ValueError, match=r"expected one or several, no two alike, got none"):
        BenchmarkEvaluation([])


def test_a_missing_package_is_named_with_its_extra(monkeypatch: pytest.MonkeyPatch, arc: Benchmark) -> None:
    find = importlib.util.find_spec
    monkeypatch.setattr(
        "callbacks.evaluations.harness.find_spec", lambda name: None if name == "lm_eval" else find(name)
    )
    with pytest.raises(
        ValueError, match=r"lm-eval, .* pip install 'lm-eval.hf.>=0.4.13' .*extra `benchmarks`"
    ):
        BenchmarkEvaluation([arc])


def test_a_benchmark_of_local_files_knows_nothing_of_the_hub(tmp_path: Path) -> None:
    path = tmp_path / "piqa.jsonl"
    record = {"goal": "Cool tea", "sol1": "wait", "sol2": "boil", "label": 1}
    path.write_text(json.dumps(record) + "\n", encoding="utf-8")
    (task,) = load_tasks("piqa", 0, PiqaQuestions(str(path)).questions(), [])
    (item,) = ask([task], None)
    assert (item.prompt, item.choices, item.expected) == (
        "Question: Cool tea\nAnswer:",
        ["wait", "boil"],
        "boil",
    )


def test_the_configuration_of_the_four_benchmarks_is_accepted(
    public_data: Path, thundercat: Callable[..., tuple[int, str, str]]
) -> None:
    files = ("configs/experiment/cat_tinychat.yaml", "configs/evaluation/benchmarks.yaml")
    words = [word for file in files for word in ("--config", file)]
    status, out, err = thundercat(
        "fit", *words, f"--vars.benchmark_data={public_data / 'data'}", "--print_config"
    )
    assert status == 0, err
    callbacks = yaml.safe_load(out)["trainer"]["callbacks"]
    (own,) = (each for each in callbacks if each["class_path"].endswith("BenchmarkEvaluation"))
    assert [b["task"] for b in own["init_args"]["benchmarks"]] == [
        "arc_easy",
        "arc_challenge",
        "piqa",
        "mmlu",
    ]
    assert sum(each["class_path"].endswith("RunReport") for each in callbacks) == 1


CONFIG = """
trainer:
  callbacks+:
    - class_path: callbacks.report.report.RunReport
    - class_path: callbacks.evaluations.benchmark.BenchmarkEvaluation
      init_args:
        schedule: {{at_start: true, limit: 4}}
        benchmarks:
          - task: arc_easy
            docs:
              class_path: datamodules.sources.questions.ArcQuestions
              init_args: {{path: {path}}}
            limit: 6
"""


def test_from_the_command_line_to_the_report(
    tmp_path: Path, thundercat: Callable[..., tuple[int, str, str]]
) -> None:
    path = arc_file(tmp_path / "arc.jsonl")
    evaluated = tmp_path / "benchmark.yaml"
    evaluated.write_text(CONFIG.format(path=path), encoding="utf-8")
    words = ("--config", str(small_config(tmp_path)), "--config", str(evaluated))
    status, out, err = thundercat("fit", *words, "--trainer.max_steps=1")
    assert status == 0, err
    assert "arc easy: accuracy" in out
    assert "lm_eval" not in err
    status, out, err = thundercat("test", *words, "--ckpt_path", "last")
    assert status == 0, out + err
    rows = list(ResultsStore(tmp_path / "run"))
    assert [(stage, sum(row.stage == stage for row in rows)) for stage in ("fit", "test")] == [
        ("fit", 8),
        ("test", 6),
    ]
    report = (tmp_path / "run" / "report.md").read_text(encoding="utf-8")
    row, errors = (line for line in report.splitlines() if line.startswith("| arc easy: accuracy |"))
    # Before, after and the paired difference of the same four documents.
    assert "p = 1.000" in row and "| 4 | acc@lm_eval-" in row
    last = [any(one["verdict"] for one in own.verdicts.values()) for own in rows if own.stage == "fit"][-4:]
    error = 100 * float(np.std(last, ddof=1)) / 2
    assert f"| {error:.2f} | 4 | 1 | acc@lm_eval-" in errors
