"""What make says before it has installed or trained anything."""

from __future__ import annotations

import os
import shutil
import subprocess
from pathlib import Path

import pytest

from tests.conftest import ROOT

pytestmark = pytest.mark.skipif(shutil.which("make") is None, reason="make is not installed")


def made(*words: str, **environment: str) -> subprocess.CompletedProcess[str]:
    variables = {name: text for name, text in os.environ.items() if not name.startswith(("MAKE", "MFLAGS"))}
    return subprocess.run(
        ["make", "-C", str(ROOT), *words], capture_output=True, text=True, env={**variables, **environment}
    )


@pytest.mark.parametrize("processes", ["0", "3", ""])
def test_processes_that_do_not_divide_a_step_are_refused(processes: str) -> None:
    done = made("smollm2-checks", f"PROCESSES={processes}")
    assert done.returncode and "PROCESSES: expected 1 or 2" in done.stderr and "installed" not in done.stdout


def test_data_that_is_missing_is_named(tmp_path: Path) -> None:
    done = made("smollm2-checks", "PROCESSES=1", THUNDERCAT_DATA=str(tmp_path))
    assert done.returncode and f"{tmp_path}/data/alpaca/alpaca_5000.json is missing" in done.stderr


def test_an_older_python_makes_no_environment(tmp_path: Path) -> None:
    older = tmp_path / "python3"
    older.write_text(
        '#!/bin/sh\ncase "$1" in -c) echo \'expected Python 3.11\' >&2; exit 1;; *) mkdir -p "$3";; esac\n'
    )
    older.chmod(0o755)
    done = made(f"{tmp_path}/env/.installed", f"VENV={tmp_path}/env", f"PYTHON={older}")
    assert done.returncode and "expected Python 3.11" in done.stderr and not (tmp_path / "env").exists()


def test_threads_asked_for_do_not_hide_cores() -> None:
    # nproc answers with OMP_NUM_THREADS where that is set.
    plans = [made("-n", "smollm2", **threads).stdout for threads in ({}, {"OMP_NUM_THREADS": "1"})]
    assert plans[0] == plans[1] and "--trainer.devices=" in plans[0]


def test_a_recipe_that_changed_asks_for_its_stage_again(tmp_path: Path) -> None:
    shutil.copy(ROOT / "Makefile", tmp_path)
    files = ["setup.cfg", "pyproject.toml", "constraints.txt", ".venv/.installed", ".venv/.installed-smollm2"]
    files += ["configs/experiment/smollm2_replies.yaml", "runs/smollm2_replies/predictions.jsonl"]
    files += ["configs/experiment/smollm2_aligned.yaml", "configs/data/smollm2.yaml"]
    files += ["runs/smollm2_aligned_seed0/report.html"]
    for age, name in enumerate(files):
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_text("")
        os.utime(tmp_path / name, (1000 + age, 1000 + age))
    asked = made("-n", "-C", str(tmp_path), "smollm2").stdout
    assert "cat_smollm2.yaml" in asked and "smollm2_aligned.yaml" not in asked and "predict" not in asked
    os.utime(tmp_path / "configs/data/smollm2.yaml", (2000, 2000))
    asked = made("-n", "-C", str(tmp_path), "smollm2").stdout
    assert "experiment/smollm2_aligned.yaml" in asked and "predict" not in asked
