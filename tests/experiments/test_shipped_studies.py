"""Every shipped study's and sweep's runs compose, and their columns are measured by their evaluations."""

from __future__ import annotations

from pathlib import Path

import pytest

from experiments.config.compose import compose
from experiments.studies.definition import load_study
from experiments.studies.scheduling import jobs_of
from experiments.sweeps.definition import load_sweep
from experiments.sweeps.space import space_of
from experiments.sweeps.trials import check_all
from tests.conftest import ROOT

SWEEPS = sorted((ROOT / "configs" / "sweep").glob("*.yaml"))
STUDIES = sorted((ROOT / "configs" / "study").glob("*.yaml"))


@pytest.mark.parametrize("path", STUDIES, ids=lambda path: path.stem)
def test_runs_compose_and_columns_are_measured(path: Path, in_root: Path, tmp_path: Path) -> None:
    study = load_study(path)
    assert len(jobs_of(study, tmp_path)) >= len(study.runs)
    for name, run in study.runs.items():
        overrides = [(key, str(value)) for key, value in run.set.items() if "${run." not in str(value)]
        config = compose([*run.config, *study.test, *run.test], overrides)
        suites = [own.get("init_args") or {} for own in config["trainer"]["callbacks"]]
        attacks = {attack for own in suites for attack in own.get("attacks") or {}}
        wanted = {c.attack for c in study.columns.values() if c.attack and not c.optional}
        assert wanted - attacks <= {"worst_case", "worst_case_text"}, name


@pytest.mark.parametrize("path", SWEEPS, ids=lambda path: path.stem)
def test_sweeps_compose_and_are_what_the_agent_of_wandb_would_start(path: Path, in_root: Path) -> None:
    sweep = load_sweep(path)
    check_all(sweep, space_of(sweep))
    assert sweep.command is not None and sweep.program == "thundercat"
    files = [word.removeprefix("--config=") for word in sweep.command if word.startswith("--config=")]
    assert files == [*sweep.config, "configs/trainer/wandb.yaml"]
    assert sweep.command[:3] == ["${env}", "${program}", "fit"] and sweep.command[-1] == "${args}"
    assert f"--trainer.default_root_dir=runs/sweeps/{path.stem}/${{oc.env:WANDB_RUN_ID}}" in sweep.command
