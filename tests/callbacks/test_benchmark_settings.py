"""Benchmarks' settings: what decides an answer, what is refused by name, and the shipped configuration."""

from __future__ import annotations

import importlib.util
import json
import re
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import yaml

from callbacks.evaluations.benchmark import Benchmark, BenchmarkEvaluation
from callbacks.evaluations.harness import load_tasks
from callbacks.evaluations.harness_scoring import ask
from callbacks.report.load import load
from datamodules.results import ResultsStore
from datamodules.sources.questions import ArcQuestions, MmluQuestions, PiqaQuestions
from lightning_modules.models.language_model import Encoded, LanguageModel
from tests.support.benchmarks import arc_easy, arc_file, mmlu_folder, opened
from tests.support.small_run import small_config

pytest.importorskip("lm_eval")


@pytest.fixture
def arc(tmp_path: Path) -> Benchmark:
    return arc_easy(tmp_path)


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


def test_chat_and_examples_are_two_words_of_the_command_line(
    public_data: Path, thundercat: Callable[..., tuple[int, str, str]]
) -> None:
    status, out, err = thundercat(
        *("fit", "--config", "configs/experiment/cat_tinychat.yaml"),
        *("--config", "configs/evaluation/benchmarks.yaml", "--vars.benchmark_chat=true"),
        *("--vars.mmlu_shots=5", f"--vars.benchmark_data={public_data / 'data'}", "--print_config"),
    )
    assert status == 0, err
    callbacks = yaml.safe_load(out)["trainer"]["callbacks"]
    (own,) = (each for each in callbacks if each["class_path"].endswith("BenchmarkEvaluation"))
    asked = [(b["chat_template"], b.get("num_fewshot", 0)) for b in own["init_args"]["benchmarks"]]
    assert asked == [(True, 0), (True, 0), (True, 0), (True, 5)]


REPLIES = ["A", "The answer is A.", "I'm sorry, but I can't help with that."]
"""To each subject's three questions, whose answers are A, B and C."""


def test_mmlu_in_a_chat_from_the_command_line_to_the_report(
    tmp_path: Path, thundercat: Callable[..., tuple[int, str, str]], monkeypatch: pytest.MonkeyPatch
) -> None:
    def reply(self: LanguageModel, prompts: Encoded, *_: object) -> list[str]:
        rows = [ids[own].tolist() for ids, own in zip(prompts.prompt_ids, prompts.prompt_mask, strict=True)]
        asked = [re.search(r"test \w+ (\d)\?\nA\. blue\nB\. ", text) for text in self.chat.decode_batch(rows)]
        return [REPLIES[int(found[1])] for found in asked if found is not None]

    monkeypatch.setattr(LanguageModel, "reply", reply)
    (tmp_path / "mmlu").mkdir()
    mmlu_folder(tmp_path / "mmlu")
    words = ("--config", "configs/evaluation/mmlu_chat.yaml", f"--vars.mmlu_data={tmp_path}")
    status, _, err = thundercat("test", "--config", str(small_config(tmp_path)), *words)
    assert status == 0, err
    after = load(tmp_path / "run", "test").after
    assert after is not None
    shown = {metric.quantity: own.estimate for metric, own in after.measures.items() if metric.block}
    assert {name: (own.value, own.n) for name, own in shown.items()} == {
        "over_refusal_rate": (1 / 3, 6),
        "served_rate": (1 / 3, 6),
    }


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
