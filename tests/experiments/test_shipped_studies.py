"""Every shipped study's and sweep's runs compose, and their columns are measured by their evaluations."""

from __future__ import annotations

import json
import math
from collections.abc import Callable
from dataclasses import replace
from importlib.metadata import PackageNotFoundError, distribution
from pathlib import Path

import pytest
from jsonschema import Draft7Validator

from experiments.studies.definition import load_study
from experiments.studies.scheduling import jobs_of
from experiments.sweeps.definition import load_sweep
from experiments.sweeps.search import Search
from experiments.sweeps.space import space_of
from experiments.sweeps.trials import check_all
from experiments.sweeps.wandb_backend import wandb_sweep
from tests.conftest import ROOT

SWEEPS = sorted((ROOT / "configs" / "sweep").glob("*.yaml"))
STUDIES = sorted((ROOT / "configs" / "study").glob("*.yaml"))


@pytest.mark.parametrize("path", STUDIES, ids=lambda path: path.stem)
def test_runs_compose_and_columns_are_measured(path: Path, in_root: Path, tmp_path: Path) -> None:
    study = load_study(path)
    # Its first seed stands for all: the others differ in a number.
    first = {name: replace(run, seeds=study.seeds_of(name)[:1]) for name, run in study.runs.items()}
    # Composes and checks each run, also as it is tested, and misses no attack of a column.
    assert len(jobs_of(replace(study, runs=first), tmp_path)) == len(study.runs)


def test_the_four_studies_of_smollm2_train_a_run_once(in_root: Path, tmp_path: Path) -> None:
    # Otherwise a row under searched suffixes would be of other weights than the same row of the table.
    weights: dict[tuple[str, int], set[str]] = {}
    for stem in ("smollm2", "smollm2_suffixes", "smollm2_adaptive", "smollm2_sampled"):
        for job in jobs_of(load_study(f"configs/study/{stem}.yaml"), tmp_path):
            weights.setdefault((job.name, job.seed), set()).add(job.digest)
    assert len(weights) > 8 and {len(own) for own in weights.values()} == {1}


@pytest.mark.parametrize("path", SWEEPS, ids=lambda path: path.stem)
def test_sweeps_compose_and_are_what_the_agent_of_wandb_would_start(path: Path, in_root: Path) -> None:
    sweep = load_sweep(path)
    check_all(sweep, space_of(sweep))
    content = wandb_sweep(str(path), sweep, Path("runs/sweeps") / path.stem)
    command = content["command"]
    assert content["program"] == "thundercat" and (sweep.command is None or command == sweep.command)
    files = [word.removeprefix("--config=") for word in command if word.startswith("--config=")]
    assert files == [*sweep.config, "configs/trainer/wandb.yaml"]
    assert command[:3] == ["${env}", "${program}", "fit"] and command[-1] == "${args}"
    assert f"--trainer.default_root_dir=runs/sweeps/{path.stem}/${{oc.env:WANDB_RUN_ID}}" in command


@pytest.mark.parametrize("path", SWEEPS, ids=lambda path: path.stem)
def test_sweeps_are_what_the_schema_of_wandb_allows(path: Path, in_root: Path) -> None:
    """The schema by which their server checks a sweep, as their package `sweeps` carries it; the package
    itself is not imported: it asks for an older numpy."""
    try:
        carried = distribution("sweeps").locate_file("sweeps/config/schema.json")
    except PackageNotFoundError:
        pytest.skip("no schema of W&B: pip install --no-deps sweeps (what it asks for takes numpy below 2)")
    schema = Draft7Validator(json.loads(Path(str(carried)).read_text(encoding="utf-8")))
    content = wandb_sweep(str(path), load_sweep(path), Path("runs/sweeps"))
    assert [error.message for error in schema.iter_errors(content)] == []
    # It is no schema that allows anything: a key of ours, a distribution that lacks an end.
    assert not schema.is_valid({**content, "keep": 2})
    assert not schema.is_valid({**content, "parameters": {"k": {"min": 1}}})


def test_the_demonstration_has_twelve_lines_and_a_pareto_front() -> None:
    (path,) = (own for own in SWEEPS if own.stem == "demo_tinychat")
    lines = [line for line in path.read_text().splitlines() if not line.startswith("#")]
    assert len(lines) == 12 and all(len(line) <= 160 for line in lines)
    assert [(own.x, own.y) for own in load_sweep(path).figures] == [("utility", "embedding")]


def test_the_shipped_halving_ends_trials_at_more_than_one_comparison(tmp_path: Path) -> None:
    """Of curves that fall the faster the higher a trial's rate is; nothing is trained."""
    sweep = load_sweep(next(own for own in SWEEPS if own.stem == "hyperband_tinychat"))
    search, ends = Search(sweep, space_of(sweep), tmp_path, "study"), []
    for _ in range(search.total):
        trial = search.begin()
        slope = math.log10(search.drawn(trial)["model.optimizer.lr"] / 1e-5)
        curve = [0.75 - 0.05 * look * slope for look in (1, 2, 3, 4)]
        looks = [look for look in (1, 2, 3, 4) if search.lags(trial, curve[:look])][:1]
        if looks:
            ends += looks
            search.prune(trial)
        else:
            search.complete(trial, curve[-1], {}, {})
    assert len({*ends}) > 1 and {*ends} <= {1, 2, 4} and len(ends) < search.total


def test_the_ablations_shared_training_ends_well_and_leaves_judging_to_test(
    thundercat: Callable[..., tuple[int, str, str]], tmp_path: Path
) -> None:
    """It evaluates nothing inside `fit`, whose report would have no row to stand on."""
    folder = tmp_path / "run"
    status, out, err = thundercat(
        "fit",
        "--config=configs/experiment/ablation_tinychat.yaml",
        f"--trainer.default_root_dir={folder}",
        "--trainer.max_steps=1",
        "--model.attack.num_steps=1",
    )
    assert status == 0, err
    assert f"nothing was evaluated inside fit: thundercat test --config {folder / 'config.yaml'}" in out
    assert any((folder / "checkpoints").glob("*.ckpt"))
    assert not (folder / "report.md").exists()
