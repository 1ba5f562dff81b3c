"""What the audit found about signals and several processes; these tests start processes of their own."""

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
import yaml

from callbacks.metrics.names import WORST_CASE, Metric
from callbacks.report.load import load
from callbacks.report.training_log import read_training_log
from datamodules.results import read_rows
from tests.conftest import ROOT
from tests.support.forked import forked, in_two_processes
from tests.support.small_run import equal, evaluated, small_config, start, trained

Run = Callable[..., tuple[int, str, str]]
LIMITED = {"prefilling": 4, "word_noise": 2, WORST_CASE: 2}
"""Rows of each attack of tests/configs/limited_suite.yaml."""


# kill, SIGTERM, Ctrl-C


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_b_a_signal_ends_a_run_at_once_and_it_resumes_bit_for_bit(
    fit: Run, tmp_path: Path, number: signal.Signals
) -> None:
    config, whole = small_config(tmp_path), tmp_path / "whole"
    assert fit(f"--trainer.default_root_dir={whole}")[0] == 0
    running = forked(["fit", "--config", str(config)], tmp_path / "output.txt")
    first = tmp_path / "run" / "checkpoints" / "step_000001.ckpt"
    while running.is_alive() and not first.exists():
        time.sleep(0.01)
    assert running.pid is not None
    os.kill(running.pid, number)
    running.join(60)
    out = (tmp_path / "output.txt").read_text()
    assert running.exitcode in (0, 128 + number), out
    if running.exitcode:
        assert out.count("thundercat: stopped by") == 1
        assert "Traceback" not in out
    assert fit("--ckpt_path=last")[0] == 0
    assert equal(trained(tmp_path / "run"), trained(whole))


def test_b_sigterm_ends_an_evaluation_within_seconds(thundercat: Run, tmp_path: Path) -> None:
    evaluation = {
        "class_path": "callbacks.evaluations.robustness.RobustnessEvaluation",
        "init_args": {
            "attacks": {
                "long": {
                    "class_path": "lightning_modules.attacks.embedding.pgd.EmbeddingPGD",
                    "init_args": {"epsilon": 0.1, "num_steps": 1_000_000},
                }
            }
        },
    }
    rows = (
        "[{class_path: datamodules.sources.tinychat.sources.TinyChatHarmful, init_args: {split: validation}}]"
    )
    stopping = threading.Thread(target=_terminate_once, args=(tmp_path / "run" / "rows",))
    stopping.start()
    status, _, error = thundercat(
        "test",
        "--config",
        str(small_config(tmp_path)),
        f"--trainer.callbacks={json.dumps([evaluation])}",
        f"--data.evaluation={{harmful: {rows}}}",
    )
    ended = time.monotonic()
    stopping.join()
    assert status == 128 + signal.SIGTERM
    assert "thundercat: stopped by SIGTERM" in error
    assert ended - _asked[0] < 5


_asked: list[float] = []


def _terminate_once(folder: Path) -> None:
    """Send this process SIGTERM two seconds after an evaluation has begun to write."""
    while not folder.exists():
        time.sleep(0.05)
    time.sleep(2)
    _asked[:] = [time.monotonic()]
    os.kill(os.getpid(), signal.SIGTERM)


# several processes


def two_processes(config: Path, *arguments: str) -> None:
    running = start("fit", config, "--trainer.devices=2", "--trainer.strategy=ddp", *arguments)
    out, _ = running.communicate(timeout=300)
    assert running.returncode == 0, out[-2000:]


def test_a11_logs_costs_and_rows_are_of_all_processes(fit: Run, tmp_path: Path) -> None:
    suite = yaml.safe_load((ROOT / "tests" / "configs" / "limited_suite.yaml").read_text())
    callbacks = [{"class_path": "callbacks.cost.CostMonitor"}, *suite["trainer"]["callbacks"]]
    same = (f"--trainer.callbacks={json.dumps(callbacks)}", evaluated(4), "--trainer.max_steps=2")
    same += ("--model.attack.random_start=false", "--model.base.lora.dropout=0.0")
    one, two = tmp_path / "one", tmp_path / "two"
    assert fit(*same, f"--trainer.default_root_dir={one}")[0] == 0
    two_processes(tmp_path / "small.yaml", *same, f"--trainer.default_root_dir={two}")
    for alone, together in zip(read_training_log(one), read_training_log(two), strict=True):
        for name in (
            "train/loss",
            "train/loss_away",
            "train/loss_toward",
            "train/loss_utility",
            "cost/passes",
        ):
            assert float(together[name]) == pytest.approx(float(alone[name]), abs=1e-4), name
    costs = [json.loads((folder / "cost.json").read_text()) for folder in (one, two)]
    for name in ("steps", "adversarial_examples", "utility_examples", "attack_forward", "passes", "tokens"):
        assert costs[0][name] == costs[1][name] > 0
    # Every example is reported once, from either process.
    assert [len(read_rows(folder)) for folder in (one, two)] == [6, 6]
    assert len(list((two / "rows").glob("rows_rank*.jsonl"))) == 2
    after = load(two).after
    assert after is not None and after.complete
    sizes = {name: after.measures[Metric("success_rate", "harmful", name)].estimate.n for name in LIMITED}
    assert sizes == LIMITED
    # Every process logs the numbers of all, so that they stop at the same step.
    assert "eval/harmful/worst_case/success_rate" in (two / "csv" / "metrics.csv").read_text()


def test_a10_every_process_resumes_with_its_own_suffixes_and_the_shared_reference(tmp_path: Path) -> None:
    config = small_config(tmp_path)
    gcg = {"class_path": "lightning_modules.attacks.suffix.gcg.GCG",
           "init_args": {"num_tokens": 4, "num_steps": 1, "width": 4, "stop_at_target": False}}  # fmt: skip
    pool = {"class_path": "lightning_modules.attacks.training.persistent_gcg.PersistentGCG",
            "init_args": {"gcg": gcg, "reset_fraction": 0.5, "reset_every": 3}}  # fmt: skip
    # Few rows, so that every process meets rows that the other one has visited.
    source = "datamodules.sources.tinychat.sources.TinyChatHarmful"
    rows = f"[{{class_path: {source}, init_args: {{split: train, limit: 4}}}}]"
    common = (
        f"--model.attack={json.dumps(pool)}",
        "--model.objective=lightning_modules.losses.preference.Preference",
        f"--data.harmful={rows}",
        "--model.optimizer.schedule=constant",
    )
    common += ("--trainer.max_steps=6", "--trainer.callbacks.1.keep=6")
    whole, parts = tmp_path / "whole", tmp_path / "parts"
    words = ("fit", "--config", str(config), *common)
    in_two_processes([*words, f"--trainer.default_root_dir={whole}"], tmp_path)
    (table,) = (whole / "reference").glob("*.json")
    assert len(json.loads(table.read_text())) == 4
    first, second = (
        torch.load(whole / "checkpoints" / f"step_00000{step}.ckpt", weights_only=True)["attack"]["ranks"]
        for step in (1, 2)
    )
    # Of the second step's two examples each process attacked one, and heard of the other's.
    assert [len(rank["pool"]) for rank in first] == [1, 1]
    assert [len(rank["pool"]) for rank in second] == [3, 3]
    assert second[0]["pool"] == second[1]["pool"]
    # As a kill leaves it whose last checkpoint was the third.
    shutil.copytree(whole, parts)
    for number in (4, 5, 6):
        (parts / "checkpoints" / f"step_{number:06d}.ckpt").unlink()
    in_two_processes([*words, f"--trainer.default_root_dir={parts}", "--ckpt_path=last"], tmp_path)
    assert (parts / "checkpoints" / "step_000006.ckpt").is_file()
    assert equal(trained(parts), trained(whole))


def test_b_a_process_ends_with_the_one_that_started_it() -> None:
    # The parent starts a child that only waits, tells its number and is killed.
    child = (
        "import os, time; from callbacks.run_folder.stopping import end_with_parent\n"
        "end_with_parent(os.getppid()); print('watching', flush=True); time.sleep(99)"
    )
    code = (
        "import subprocess, sys, time\n"
        f"child = subprocess.Popen([sys.executable, '-c', {child!r}])\n"
        "print(child.pid, flush=True); time.sleep(99)\n"
    )
    parent = subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.PIPE, text=True)
    assert parent.stdout is not None
    number = int(parent.stdout.readline())
    assert parent.stdout.readline() == "watching\n"
    assert _runs(number)
    parent.kill()
    parent.wait()
    parent.stdout.close()
    deadline = time.monotonic() + 60
    while _runs(number) and time.monotonic() < deadline:
        time.sleep(0.1)
    assert not _runs(number)


def _runs(number: int) -> bool:
    """Whether the process is there and not merely waiting to be collected."""
    status = Path(f"/proc/{number}/stat")
    try:
        return status.read_text().rpartition(")")[2].split()[0] != "Z"
    except (FileNotFoundError, ProcessLookupError):
        return False
