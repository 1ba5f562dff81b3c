"""Every shipped study's runs compose, and its columns are measured by its evaluations."""

from __future__ import annotations

from pathlib import Path

import pytest

from experiments.config.compose import compose
from experiments.studies.definition import load_study
from experiments.studies.scheduling import jobs_of
from tests.conftest import ROOT

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
