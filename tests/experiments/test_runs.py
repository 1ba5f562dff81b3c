"""Whole runs of the shortened quickstart: results, evaluation commands, kill and resume."""

from __future__ import annotations

import json
import os
import time
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from callbacks.report.training_log import read_training_log
from datamodules.results import read_rows
from datamodules.sources.tinychat.sources import TinyChatHarmful
from tests.conftest import ROOT
from tests.support.forked import forked

Run = Callable[..., tuple[int, str, str]]
TINYCHAT = "configs/experiment/cat_tinychat.yaml"
SHORT = (
    "--trainer.max_steps=2",
    "--data.harmful_per_step=2",
    "--data.utility_per_step=2",
    # Encoding all rows would take longer than training.
    "--data.harmful.0.num_rows=60",
    "--data.utility.0.num_rows=120",
    "--model.attack.num_steps=1",
    "--trainer.accelerator=cpu",
    "--trainer.enable_progress_bar=false",
)


FEW = (
    "--vars.evaluation_limit=4",
    "--vars.attack_limit=4",
    "--vars.gcg_limit=2",
    "--vars.gcg_steps=2",
    "--vars.gcg_width=4",
)


QUICK = tuple(f"--trainer.callbacks.6.attacks.{name}.num_steps=2" for name in ("soft_prompt", "embedding"))
"""The robustness evaluation's attacks, shortened."""


def short(folder: Path, *more: str) -> tuple[str, ...]:
    """The tiny recipe, shortened."""
    return ("fit", "--config", TINYCHAT, f"--trainer.default_root_dir={folder}", *SHORT, *FEW, *QUICK, *more)


@pytest.fixture(scope="module")
def finished(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The run folder of a shortened recipe."""
    from experiments.cli import main

    folder = tmp_path_factory.mktemp("quickstart")
    before = Path.cwd()
    os.chdir(ROOT)
    try:
        assert main(short(folder)) == 0
    finally:
        os.chdir(before)
    return folder


def test_shortened_quickstart_reports_every_promised_figure(tmp_path: Path, thundercat: Run) -> None:
    steps = [f"--model.attack.attacks.{i}.num_steps=1" for i in (0, 1)]
    rows = [f"--data.harmful.{i}.{where}num_rows=60" for i, where in enumerate(("", "", *["source."] * 2))]
    rows += [f"--data.utility.{i}.num_rows=60" for i in (0, 1)]
    words = [
        word
        for word in SHORT
        if not word.startswith(("--model.attack", "--data.harmful.", "--data.utility."))
    ]
    status, out, err = thundercat(
        *("fit", "--config", "configs/quickstart.yaml", f"--trainer.default_root_dir={tmp_path}"),
        *(*words, *steps, *rows, *FEW, *QUICK),
    )
    assert status == 0, err
    results = json.loads((tmp_path / "results.json").read_text())
    for snapshot in ("before", "after"):
        sizes = {key: measure["n"] for key, measure in results[snapshot]["measures"].items()}
        assert sizes["harmful/gcg/success_rate"] == sizes["harmful/worst_case/success_rate"] == 2
        for name in ("direct", "initial_suffix", "embedding", "soft_prompt"):
            assert sizes[f"harmful/{name}/success_rate"] == 4
    assert "gcg: target prefix (a trend, not success)" in out


RATES = (
    "harmful/refusal_rate",
    "harmless/over_refusal_rate",
    "utility/exact_match",
    "harmful/embedding/success_rate",
    "harmful/soft_prompt/success_rate",
)
WRITTEN = (
    "report.md",
    "report.html",
    "results.json",
    "config.yaml",
    "environment.json",
    "cost.json",
    "csv/metrics.csv",
    "rows/rows_rank0.jsonl",
    "model/model.safetensors",
    "checkpoints/step_000002.ckpt",
)


def test_a_run_writes_its_results(finished: Path) -> None:
    results = json.loads((finished / "results.json").read_text())
    for snapshot in ("before", "after"):
        for name in RATES:
            measure = results[snapshot]["measures"][name]
            assert 0 <= measure["low"] <= measure["value"] <= measure["high"] <= 1
            assert measure["n"] == 4
    cost = results["cost"]
    assert (cost["attack_forward_per_example"], cost["attack_backward_per_example"]) == (1, 1)
    assert cost["steps"] == 2
    # 2 steps x (2 adversarial x (1 + 1 + 4) + 2 utility x 2)
    assert cost["passes"] == 32
    for name in WRITTEN:
        assert (finished / name).is_file(), name
    assert (finished / "report.html").read_text().count("<svg") >= 3
    environment = json.loads((finished / "environment.json").read_text())
    assert environment["packages"]["torch"] == torch.__version__
    assert environment["seed_everything"] == 0
    assert environment["seeds"]["model.seed"] == environment["seeds"]["data.seed"] == 0
    assert {"git", "hardware"} <= set(environment)


def test_validate_test_predict_and_report_of_that_run(finished: Path, thundercat: Run) -> None:
    own = (
        "--config",
        str(finished / "config.yaml"),
        "--data.evaluation.harmful.0.limit=3",
        "--data.evaluation.utility.0.num_rows=3",
    )
    own += (
        "--data.evaluation.harmless.0.num_rows=3",
        "--ckpt_path=last",
    )
    for command in ("validate", "test"):
        status, out, err = thundercat(command, *own)
        assert status == 0, err
        assert "embedding: target prefix (a trend, not success)" in out
    status, out, _ = thundercat("predict", *own)
    assert status == 0
    rows = [json.loads(line) for line in Path(out.strip().splitlines()[-1]).read_text().splitlines()]
    assert {"key", "prompt", "reply", "cut", "checkpoint"} == set(rows[0])
    status, out, _ = thundercat("report", str(finished))
    assert status == 0
    assert "embedding: target prefix (a trend, not success)" in out


def test_a_finished_run_is_measured_on_the_test_split(finished: Path, thundercat: Run) -> None:
    """By one more file, with the run's checkpoint; no row of validation stays in the figures."""
    own = ("--config", str(finished / "config.yaml"), "--config", "configs/data/tinychat_test.yaml")
    few = [f"--data.evaluation.{subject}.0.num_rows=5" for subject in ("harmless", "utility")]
    status, _, err = thundercat("test", *own, "--ckpt_path=last", "--vars.harmful_limit=5", *few)
    assert status == 0, err
    after = json.loads((finished / "test_results.json").read_text())["after"]
    assert {after["measures"][name]["n"] for name in RATES} == {5}
    asked = [row.prompt for row in TinyChatHarmful("test", "all", limit=5).rows()]
    direct = {row.prompt for row in read_rows(finished) if row.stage == "test" and row.attack == "direct"}
    assert direct >= {*asked}


def test_killed_run_resumes_to_the_same_weights(tmp_path: Path, thundercat: Run) -> None:
    # kill -9 in the middle of training; the rerun with --ckpt_path last ends bit for bit where an undisturbed
    # run ends.
    def words(folder: Path) -> tuple[str, ...]:
        quiet = [f"--trainer.callbacks.{i}.schedule.at_start=false" for i in (4, 5, 6)]
        return short(folder, "--trainer.max_steps=6", *quiet)

    assert thundercat(*words(tmp_path / "whole"))[0] == 0
    process = forked(words(tmp_path / "killed"), tmp_path / "output.txt")
    first = tmp_path / "killed" / "checkpoints" / "step_000001.ckpt"
    deadline = time.monotonic() + 120
    while not first.exists() and time.monotonic() < deadline and process.is_alive():
        time.sleep(0.01)
    process.kill()
    process.join()
    assert any(first.parent.glob("*.ckpt"))
    assert thundercat(*words(tmp_path / "killed"), "--ckpt_path=last")[0] == 0
    # The log goes on without a hole, and no step stands in it twice.
    steps = [int(row["step"]) for row in read_training_log(tmp_path / "killed")]
    assert steps == list(range(6))
    states = [
        torch.load(tmp_path / name / "checkpoints" / "step_000006.ckpt", weights_only=True)
        for name in ("whole", "killed")
    ]
    assert states[0]["global_step"] == states[1]["global_step"] == 6
    weights = states[1]["state_dict"]
    assert all(torch.equal(value, weights[name]) for name, value in states[0]["state_dict"].items())
    rows = [
        {(row.subject, row.attack, row.example, row.step): row.reply for row in read_rows(tmp_path / name)}
        for name in ("whole", "killed")
    ]
    assert rows[0] == rows[1] != {}
