"""`thundercat sweep` as a user calls it: real trials, the best one on test, and what a wrong call is told."""

from __future__ import annotations

import errno
import json
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import pytest
import yaml

from experiments.cli import main
from experiments.commands import run as run_module
from experiments.commands import sweep as sweep_module
from experiments.config.errors import ConfigError
from experiments.process import ENDS_WITH
from experiments.studies.definition import load_study
from experiments.studies.scheduling import jobs_of
from experiments.sweeps import backends
from experiments.sweeps.engine import Engine

UTILITY = {"quantity": "exact_match", "subject": "utility"}
SUITE = {
    "trainer": {
        "callbacks": [
            {
                "class_path": "callbacks.evaluations.utility.UtilityEvaluation",
                "init_args": {
                    "schedule": {"at_start": True, "limit": 4, "test_limit": 4},
                    "max_new_tokens": 4,
                },
            },
            {"class_path": "callbacks.run_folder.checkpoints.RunCheckpoints"},
        ]
    }
}


class InProcess:
    """Runs a command in this process, from its beginning to its end."""

    name = None

    def __init__(self, words: Sequence[str]) -> None:
        self._status = main(words)

    def status(self) -> int:
        return self._status

    def stop(self) -> None: ...

    def failure(self) -> str:
        return "it failed"


class Here:
    def __init__(self, workers: int) -> None: ...

    def start(self, words: Sequence[str], folder: Path) -> InProcess:
        return InProcess(words)

    def again(self, name: str, folder: Path) -> None: ...


@pytest.fixture
def file(tmp_path: Path, in_root: Path) -> Path:
    (tmp_path / "suite.yaml").write_text(yaml.safe_dump(SUITE))
    content: dict[str, Any] = {
        "method": "grid",
        "metric": {"name": "eval/utility/exact_match", "goal": "maximize"},
        "parameters": {
            "model.optimizer.lr": {"values": [6.0e-4, 1.0e-6]},
            "trainer.max_steps": {"value": 1},
            "data.utility_per_step": {"value": 2},
            "data.harmful_per_step": {"value": 2},
            "data.harmful.0.init_args.num_rows": {"value": 4},
            "data.utility.0.init_args.num_rows": {"value": 4},
        },
        "config": [
            "configs/experiment/methods_tinychat.yaml",
            "configs/method/cat.yaml",
            "configs/attack/one_step.yaml",
            str(tmp_path / "suite.yaml"),
        ],
        "test": ["configs/data/tinychat_test.yaml"],
        "columns": {"utility": UTILITY},
        "constraints": [{"column": "utility", "falls_at_most": 1.0}],
        "keep": 1,
    }
    path = tmp_path / "mine.yaml"
    path.write_text(yaml.safe_dump(content))
    return path


def test_a_sweep_trains_chooses_and_tests(
    file: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    thundercat: Callable[..., tuple[int, str, str]],
) -> None:
    monkeypatch.setattr(backends, "Local", Here)
    place = tmp_path / "mine"
    said = thundercat("sweep", str(file), "--runs", str(tmp_path), "--dry_run")
    assert said[0] == 0 and "0 of 2 trials begun" in said[1] and not place.exists()
    status, text, _ = thundercat("sweep", str(file), "--runs", str(tmp_path))
    assert status == 0
    assert "trial 0 is the best on validation (grid, maximize utility). 2 of 2 trials: 2 complete" in text
    row = next(line for line in text.splitlines() if line.startswith("| utility |"))
    assert row.count("(n = 4)") == 2
    (best,) = place.glob("trials/*/checkpoints")
    rows = (best.parent / "rows" / "rows_rank0.jsonl").read_text().splitlines()
    assert [json.loads(row)["stage"] for row in rows] == ["fit"] * 8 + ["test"] * 4
    status, again, _ = thundercat("sweep", str(file), "--runs", str(tmp_path), "--report_only")
    assert status == 0 and again == text[text.index("# Sweep mine") :]
    assert yaml.safe_load((place / "best.yaml").read_text())["trainer"] == {"max_steps": 1}
    ran = yaml.safe_load((best.parent / "config.yaml").read_text())
    trainer = {**ran["trainer"], "logger": []}
    assert trainer.pop("default_root_dir") == str(best.parent)
    whole = (place / "best_config.yaml").read_text()
    assert yaml.safe_load(whole) == {**ran, "trainer": trainer} and str(best.parent) not in whole
    columns = {"utility": UTILITY}
    runs = {"best": {"config": [str(place / "best_config.yaml")], "seeds": [0]}}
    own = tmp_path / "study.yaml"
    own.write_text(yaml.safe_dump({"title": "A study", "runs": runs, "columns": columns}))
    (job,) = jobs_of(load_study(own), tmp_path / "runs")
    assert job.config["model"]["init_args"]["optimizer"]["lr"] == 6.0e-4
    # Another question to the same trials counts none of them, and trains none again.
    content = yaml.safe_load(file.read_text())
    never = [{"column": "utility", "at_least": 0.6}, {"column": "utility", "at_most": 0.4}]
    file.write_text(yaml.safe_dump({**content, "constraints": never}))
    status, text, error = thundercat("sweep", str(file), "--runs", str(tmp_path))
    assert status == 1 and "no trial is the best" in text
    assert not [*place.glob("best*.yaml")]
    assert "mine.yaml has changed: 2 trials of what it was are not counted" in error
    assert len([*place.glob("trials/*")]) == 2


def disk_is_full(self: Engine) -> None:
    raise OSError(errno.ENOSPC, "No space left on device", "journal.jsonl")


def test_a_wrong_call_is_told_in_one_line(
    file: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    thundercat: Callable[..., tuple[int, str, str]],
) -> None:
    def told(*words: str) -> str:
        status, _, said = thundercat("sweep", str(file), "--runs", str(tmp_path), *words)
        assert status == 2 and said.count("\n") == 1
        return said

    assert "--workers: expected at least 1, got 0" in told("--workers", "0")
    assert "--report_only: no trials of this sweep in" in told("--report_only")
    assert "are on W&B's own page" in told("--backend", "wandb", "--report_only")
    monkeypatch.setattr("experiments.sweeps.wandb_backend.has_wandb_key", lambda: False)
    assert "--backend wandb: no key of Weights & Biases was found; `wandb login`" in told(
        "--backend", "wandb"
    )
    content = yaml.safe_load(file.read_text())
    for backend, wrong in (
        ("slurm", {"timeout_mins": 5}),
        ("slurm", {"cluster": "slrm"}),
        ("slurm", {"cpus_per_task": "two"}),
        ("ray", {"num_gpu": 1}),
    ):
        pytest.importorskip({"slurm": "submitit", "ray": "ray"}[backend])
        file.write_text(yaml.safe_dump({**content, backend: wrong}))
        for words in (("--dry_run",), ()):
            assert str(wrong.get("cpus_per_task", next(iter(wrong)))) in told("--backend", backend, *words)
        assert not (tmp_path / "mine").exists()
    file.write_text(yaml.safe_dump(content))
    with monkeypatch.context() as patch:
        patch.setattr(Engine, "run", disk_is_full)
        status, _, said = thundercat("sweep", str(file), "--runs", str(tmp_path))
        place = tmp_path / "mine"
        remedy = "make room, then go on with the same command"
        assert (status, said) == (1, f"thundercat: {place}: no space left on the disk; {remedy}\n")
    monkeypatch.setattr(sweep_module, "find_spec", lambda name: None)
    assert "sweep: needs optuna, which is not installed; pip install optuna (the project's extra" in told()


def test_wandb_is_given_the_sweep_and_its_agent_runs_it(
    file: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    thundercat: Callable[..., tuple[int, str, str]],
) -> None:
    import wandb

    given: list[Any] = []
    monkeypatch.setattr("experiments.sweeps.wandb_backend.has_wandb_key", lambda: True)
    monkeypatch.setattr(wandb, "sweep", lambda content, **more: given.append((content, more)) or "abc")
    monkeypatch.setattr(wandb, "agent", lambda name, **more: given.append((name, more)))
    words = ["sweep", str(file), "--runs", str(tmp_path), "--backend", "wandb"]
    status, text, _ = thundercat(*words)
    assert status == 0 and text == "further agents: wandb agent thundercat/abc\n"
    _, printed, _ = thundercat(*words, "--dry_run")
    assert yaml.safe_load(printed) == given[0][0]
    assert given[1] == ("abc", {"project": "thundercat", "entity": None, "count": None})
    assert given[0][0]["method"] == "grid" and "keep" not in given[0][0]


def test_a_command_ends_with_who_waits_for_it(monkeypatch: pytest.MonkeyPatch) -> None:
    watched: list[int] = []
    monkeypatch.setattr(run_module, "end_with_parent", watched.append)
    monkeypatch.setenv(ENDS_WITH, "4711")
    for _ in range(2):  # what it starts itself is not bound to it
        with pytest.raises(ConfigError, match="expected at least one --config"):
            run_module.run("fit", [], [], [])
    assert watched == [4711]
