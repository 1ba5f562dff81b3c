"""A job of Slurm's, as srun and scontrol show it to a process: it makes room, comes back, and ends as a run
that nobody stopped."""

from __future__ import annotations

import json
import os
import signal
import subprocess
from collections.abc import Callable
from pathlib import Path
from typing import Any
from unittest import mock

import pytest
import yaml
from lightning import Callback, Trainer

from callbacks.report.training_log import read_training_log
from callbacks.run_folder.requeue import RequeuesJob
from callbacks.run_folder.slurm_job import requeue
from experiments.cli import main
from experiments.config.compose import compose
from experiments.config.errors import ConfigError
from experiments.config.job import check_started, check_tasks
from experiments.process import listen
from lightning_modules.models.loading import ModelConfig
from lightning_modules.pretrained import PretrainedModel
from tests.conftest import ROOT
from tests.support.forked import forked
from tests.support.small_run import equal, evaluated, small_config, trained

Run = Callable[..., tuple[int, str, str]]
SLURM = "configs/trainer/slurm.yaml"
TASK = {"SLURM_JOB_ID": "4711", "SLURM_JOB_NAME": "cat", "SLURM_NTASKS": "1", "SLURM_NTASKS_PER_NODE": "1"}
TASK |= {"SLURM_NNODES": "1", "SLURM_NODELIST": "localhost", "SLURM_STEP_ID": "0", "SLURM_PROCID": "0"}
TASK |= {"SLURM_LOCALID": "0", "SLURM_NODEID": "0"}
"""What srun tells the only task of a job."""
THIRD_OF_AN_ARRAY = {"SLURM_ARRAY_JOB_ID": "4700", "SLURM_ARRAY_TASK_ID": "3", "SLURM_RESTART_COUNT": "1"}


@pytest.fixture(autouse=True)
def outside(monkeypatch: pytest.MonkeyPatch) -> None:
    """Whatever started the tests, they are in no job."""
    for name in [name for name in os.environ if name.startswith("SLURM_")]:
        monkeypatch.delenv(name)


@pytest.fixture
def commands(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[[str, str], Path]:
    """Puts a command of Slurm's on the path, which writes down its words; returns where."""

    def install(name: str, then: str = "") -> Path:
        (tmp_path / "bin").mkdir(exist_ok=True)
        said = tmp_path / f"{name}.txt"
        (tmp_path / "bin" / name).write_text(f'#!/bin/sh\necho "$@" >> {said}\n{then}\n')
        (tmp_path / "bin" / name).chmod(0o755)
        return said

    monkeypatch.setenv("PATH", f"{tmp_path / 'bin'}:{os.environ['PATH']}")
    return install


class AsksForRoom(Callback):
    """The scheduler, twice within one step."""

    def __init__(self, step: int) -> None:
        self.step = step

    def on_train_batch_start(self, trainer: Trainer, pl_module: Any, batch: object, batch_idx: int) -> None:
        if trainer.global_step == self.step - 1:
            (own,) = (one for one in trainer.checkpoint_callbacks if isinstance(one, RequeuesJob))
            os.kill(os.getpid(), signal.SIGUSR1)
            assert own._asked.wait(30)
            os.kill(os.getpid(), signal.SIGUSR1)


def job(words: list[str], output: Path, asked: bool = False, **environment: str) -> tuple[int | None, str]:
    """One start of a job's only task, asked to make room during its imports or not: exit status and
    output."""

    def console(arguments: list[str]) -> int:
        signal.pthread_sigmask(signal.SIG_UNBLOCK, [signal.SIGUSR1])
        listen()
        if asked:
            os.kill(os.getpid(), signal.SIGUSR1)
        return main(arguments)

    # A real job listens before there are threads. Where an earlier test has used W&B, its threads begin anew
    # in what is forked, before anything can listen: the signal would reach one that does not hold it back.
    before = signal.pthread_sigmask(signal.SIG_BLOCK, [signal.SIGUSR1])
    try:
        with mock.patch("tests.support.forked.main", console):
            task = forked(words, output, **TASK, **environment)
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)
    task.join(120)
    return task.exitcode, output.read_text()


def test_a_job_makes_room_and_ends_with_the_weights_of_a_run_that_nobody_stopped(
    thundercat: Run, tmp_path: Path, commands: Callable[..., Path]
) -> None:
    config, run = small_config(tmp_path), tmp_path / "run"
    # Without checkpoints of its own accord: what is there is written for the signal.
    words = ["fit", "--config", str(config), "--trainer.callbacks.1.every_n_steps=null"]
    assert thundercat(*words, f"--trainer.default_root_dir={tmp_path / 'whole'}")[0] == 0
    asked, output = commands("scontrol"), tmp_path / "output.txt"
    words += ["--config", SLURM, "--ckpt_path=last"]

    # Before there is anything that could hear it.
    status, said = job(words, output, asked=True)
    assert status == 128 + signal.SIGUSR1, said
    assert f"thundercat: stopped by SIGUSR1; {run} is whole: scontrol requeue 4711: the job is queued" in said
    assert "Traceback" not in said
    assert [path.name for path in run.glob("checkpoints/*")] == ["step_000001.ckpt"]

    # In the middle, twice, as one of an array; on another host than the start before, which was killed.
    owner = {"host": "elsewhere", "pid": 1, "started": "x", "job": "4700_3", "restart": 0}
    (run / "lock.json").write_text(json.dumps(owner))
    at_2 = {"class_path": "tests.experiments.test_slurm.AsksForRoom", "init_args": {"step": 2}}
    (tmp_path / "room.yaml").write_text(yaml.safe_dump({"trainer": {"callbacks+": [at_2]}}))
    status, said = job([*words, "--config", str(tmp_path / "room.yaml")], output, **THIRD_OF_AN_ARRAY)
    assert status == 128 + signal.SIGUSR1, said
    assert not (run / "lock.json").exists()
    assert max(path.name for path in run.glob("checkpoints/*")) == "step_000002.ckpt"
    assert asked.read_text() == "requeue 4711\nrequeue 4700_3\n"

    status, said = job(words, output)
    assert status == 0, said
    assert equal(trained(run), trained(tmp_path / "whole"))
    steps, expected = read_training_log(run), read_training_log(tmp_path / "whole")
    assert [row["train/loss"] for row in steps] == [row["train/loss"] for row in expected]
    assert [row["step"] for row in steps] == ["0", "1", "2"]
    # Lightning's own handler would have left one.
    assert not list(run.rglob("hpc_ckpt*"))


def test_what_lasts_longer_than_slurm_waits_is_cut_off_and_the_job_queued_again(
    tmp_path: Path, commands: Callable[..., Path]
) -> None:
    asked = commands("scontrol")
    attack = {
        "class_path": "lightning_modules.attacks.embedding.pgd.EmbeddingPGD",
        "init_args": {"epsilon": 0.1, "num_steps": 1_000_000},
    }
    suite = {
        "class_path": "callbacks.evaluations.robustness.RobustnessEvaluation",
        "init_args": {"attacks": {"long": attack}},
    }
    (tmp_path / "suite.yaml").write_text(yaml.safe_dump({"trainer": {"callbacks": [suite]}}))
    words = ["test", "--config", str(small_config(tmp_path)), "--config", str(tmp_path / "suite.yaml")]
    words += ["--config", SLURM, "--vars.requeue_seconds=0.2", evaluated(2)]
    status, said = job(words, tmp_path / "output.txt", asked=True)
    assert status == 128 + signal.SIGUSR1, said
    assert (
        "thundercat: stopped by SIGUSR1 within a step; scontrol requeue 4711: the job is queued again" in said
    )
    assert asked.read_text() == "requeue 4711\n"


def test_a_job_that_the_scheduler_does_not_take_back_says_so(
    commands: Callable[..., Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("SLURM_JOB_ID", "7")
    commands("scontrol", "echo 'Requested operation is presently disabled' >&2; exit 1")
    assert requeue() == (
        "scontrol requeue 7: Requested operation is presently disabled; submit the job again: it goes on "
        "from its newest checkpoint"
    )
    monkeypatch.setenv("PATH", "/nowhere")
    assert "No such file" in requeue()


FOUR = {**TASK, "SLURM_NTASKS": "8", "SLURM_NTASKS_PER_NODE": "4", "SLURM_NNODES": "2"}
"""Two nodes of four tasks."""


@pytest.mark.parametrize(
    ("changed", "devices", "nodes", "said"),
    [
        ({}, 4, 2, None),
        (
            {},
            1,
            2,
            "trainer.devices: expected 4, the job's tasks on each node, got 1; set it, or add .*slurm.yaml",
        ),
        ({}, 4, 1, "trainer.num_nodes: expected 2, the job's nodes, got 1; set it, or add .*slurm.yaml"),
        ({"SLURM_STEP_ID": None}, 4, 2, "SLURM_STEP_ID: the job has 8 tasks, .* write srun in front"),
        # As sbatch leaves it to the script.
        ({"SLURM_STEP_ID": None, "SLURM_NTASKS": None}, 4, 2, "SLURM_STEP_ID: the job has 8 tasks"),
        (
            {"SLURM_NTASKS_PER_NODE": None},
            4,
            2,
            "SLURM_NTASKS_PER_NODE: .* --nodes=2 --ntasks-per-node=4 instead",
        ),
        # A job's shell, where Lightning starts the processes.
        ({"SLURM_JOB_NAME": "bash", "SLURM_STEP_ID": None}, 2, 1, None),
        (dict.fromkeys(FOUR), 2, 1, None),
    ],
)
def test_processes_that_are_not_the_trainers_are_refused(
    monkeypatch: pytest.MonkeyPatch,
    changed: dict[str, str | None],
    devices: int,
    nodes: int,
    said: str | None,
) -> None:
    for name, value in {**FOUR, **changed}.items():
        if value is not None:
            monkeypatch.setenv(name, value)

    def check() -> None:
        check_started()
        check_tasks(devices, nodes)

    if said is None:
        check()
    else:
        with pytest.raises(ConfigError, match=said):
            check()


def test_a_wrong_job_is_one_line_before_anything_is_loaded(
    thundercat: Run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name, value in {**TASK, "SLURM_NTASKS": "2", "SLURM_NTASKS_PER_NODE": "2"}.items():
        monkeypatch.setenv(name, value)
    status, _, error = thundercat("fit", "--config", str(small_config(tmp_path)))
    assert status == 2
    assert error.count("thundercat: trainer.devices: expected 2") == 1
    assert not (tmp_path / "run").exists()


def test_devices_and_nodes_are_the_jobs(in_root: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for environment, expected in (({}, (1, 1)), (FOUR, (4, 2))):
        for name, value in environment.items():
            monkeypatch.setenv(name, value)
        trainer = compose(["configs/experiment/cat_tinychat.yaml", SLURM], [])["trainer"]
        assert (trainer["devices"], trainer["num_nodes"]) == expected
    both = compose(["configs/experiment/cat_tinychat.yaml", SLURM, "configs/trainer/fsdp2.yaml"], [])[
        "trainer"
    ]
    assert both["strategy"]["class_path"].endswith("FSDP2")
    assert both["devices"] == 4


def test_a_job_needs_the_runs_checkpoints() -> None:
    trainer = Trainer(accelerator="cpu", logger=False, enable_checkpointing=False)
    with pytest.raises(ValueError, match="trainer.callbacks: RequeuesJob found no RunCheckpoints"):
        RequeuesJob().setup(trainer, PretrainedModel(ModelConfig("tinychat:aligned")), "fit")


def test_the_submit_script_starts_the_command_by_srun(tmp_path: Path, commands: Callable[..., Path]) -> None:
    asked = commands("srun")
    script = ["bash", str(ROOT / "configs" / "trainer" / "slurm.sh"), "--seed_everything=1"]
    subprocess.run(script, check=True, env={**os.environ, "SLURM_SUBMIT_DIR": str(tmp_path)})
    assert asked.read_text() == (
        f"--kill-on-bad-exit=1 thundercat fit --config RECIPE --config {SLURM} --ckpt_path=last "
        "--seed_everything=1\n"
    )
