"""The robustness evaluation as a user runs it: its resumption after a kill, and that nothing it reports is
lost or counted twice."""

from __future__ import annotations

import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from callbacks.evaluations.robustness import GCGEvaluation, RobustnessEvaluation
from callbacks.metrics.names import WORST_CASE, Metric
from callbacks.report.load import load
from datamodules.batch import AdversarialBatch
from datamodules.result_lines import Stage
from datamodules.results import read_rows
from lightning_modules.attacks.base import Attack, AttackedPrompt
from lightning_modules.attacks.suffix.gcg import GCG
from lightning_modules.attacks.text.rewrites import DirectRequest, Prefilling
from lightning_modules.models.language_model import LanguageModel
from tests.conftest import ROOT
from tests.support.forked import forked

Run = Callable[..., tuple[int, str, str]]
TINYCHAT = "configs/experiment/cat_tinychat.yaml"


def attack_arguments(folder: Path, *more: str) -> list[str]:
    return [
        "test",
        "--config",
        "configs/experiment/attack_tinychat.yaml",
        "--config",
        str(ROOT / "tests" / "configs" / "small_suite.yaml"),
        f"--trainer.default_root_dir={folder}",
        "--trainer.accelerator=cpu",
        *more,
    ]


def numbers(folder: Path, stage: Stage) -> list[tuple[int, Any, Any]]:
    """Every measure but wall times."""
    return [
        (own.step, metric, measure.estimate)
        for own in load(folder, stage).snapshots
        for metric, measure in own.measures.items()
        if metric.quantity != "seconds_per_example"
    ]


def test_a_killed_suite_goes_on_and_gives_the_same_results(tmp_path: Path, thundercat: Run) -> None:
    quiet = "--trainer.enable_progress_bar=false"
    assert thundercat(*attack_arguments(tmp_path / "whole", quiet))[0] == 0
    path = tmp_path / "parts" / "rows" / "rows_rank0.jsonl"
    process = forked(attack_arguments(tmp_path / "parts", quiet), tmp_path / "output.txt")
    deadline = time.monotonic() + 120
    while time.monotonic() < deadline and (not path.is_file() or path.read_bytes().count(b"\n") < 6):
        time.sleep(0.02)
    process.kill()
    process.join()
    done = path.read_bytes().count(b"\n")
    assert done >= 6
    assert not (tmp_path / "parts" / "test_results.json").exists()
    first = path.read_bytes()[: path.read_bytes().rfind(b"\n") + 1]
    status, out, _ = thundercat(*attack_arguments(tmp_path / "parts", quiet))
    assert status == 0
    assert path.read_bytes().startswith(first)  # nothing that was finished ran again
    assert path.read_bytes().count(b"\n") == len(read_rows(tmp_path / "parts")) == 4 * 4
    assert numbers(tmp_path / "parts", "test") == numbers(tmp_path / "whole", "test")
    assert load(tmp_path / "parts", "test").snapshots[0].complete
    assert "worst case text: target prefix (a trend, not success)" in out
    # What no attack's reply refuses is a worst case of its own, which the prefix does not tell.
    snapshot, rows = load(tmp_path / "whole", "test").snapshots[0], read_rows(tmp_path / "whole")
    judge = next(judge for judge in rows[0].verdicts if judge.startswith("keyword_refusal"))
    wins = {row.example for row in rows if not row.verdict(judge)}
    worst = snapshot.measures[Metric("not_refused_rate", "harmful", WORST_CASE)]
    assert worst.estimate.value == len(wins) / len({row.example for row in rows})
    assert "worst case: not refused" in out


def test_another_system_message_is_another_row(tmp_path: Path, thundercat: Run) -> None:
    quiet = "--trainer.enable_progress_bar=false"
    assert thundercat(*attack_arguments(tmp_path, quiet))[0] == 0
    before = read_rows(tmp_path)
    # What was measured in single precision is not written with a double's digits.
    losses = [loss for row in before for loss in row.loss_curve if loss is not None]
    assert losses and all(len(str(loss)) <= 12 for loss in losses)
    assert thundercat(*attack_arguments(tmp_path, quiet, "--data.encoding.system=Be brief."))[0] == 0
    assert len(read_rows(tmp_path)) == 2 * len(before)


def test_another_judge_needs_no_new_attack(
    tmp_path: Path, thundercat: Run, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert thundercat(*attack_arguments(tmp_path, "--trainer.enable_progress_bar=false"))[0] == 0

    def refuse(
        self: object, model: LanguageModel, batch: AdversarialBatch, rng: torch.Generator | None = None
    ) -> AttackedPrompt:
        raise AssertionError("attacked again")

    for attack in (GCG, DirectRequest, Prefilling):
        monkeypatch.setattr(attack, "__call__", refuse)
    more = '--trainer.callbacks.0.judges=[{"class_path": "callbacks.judges.exact.ExactMatch"}]'
    status, out, err = thundercat(*attack_arguments(tmp_path, "--trainer.enable_progress_bar=false", more))
    assert status == 0, err
    assert "gcg: judged so by exact_match@1" in out
    rows = read_rows(tmp_path)
    assert all({"target_prefix@1", "keyword_refusal@3", "exact_match@1"} == set(r.verdicts) for r in rows)


def fit_arguments(folder: Path, evaluation: str, steps: int) -> list[str]:
    """A small training run with an evaluation of tests/configs."""
    return [
        "fit",
        "--config",
        TINYCHAT,
        "--config",
        str(ROOT / "tests" / "configs" / f"{evaluation}.yaml"),
        f"--trainer.default_root_dir={folder}",
        f"--trainer.max_steps={steps}",
        "--data.harmful_per_step=2",
        "--data.utility_per_step=2",
        "--data.harmful.0.num_rows=60",
        "--data.utility.0.num_rows=120",
        "--model.attack.num_steps=1",
        "--trainer.accelerator=cpu",
        "--trainer.enable_progress_bar=false",
    ]


def success(attack: str) -> Metric:
    return Metric("success_rate", "harmful", attack)


def test_gcg_evaluation_inside_fit_reports_its_baselines(tmp_path: Path, thundercat: Run) -> None:
    status, _, err = thundercat(*fit_arguments(tmp_path, "gcg_evaluation", 2))
    assert status == 0, err
    results = load(tmp_path)
    assert [own.step for own in results.snapshots] == [0, 1, 2]
    for own in results.snapshots:
        assert own.complete
        for name in ("direct", "initial_suffix", "gcg", WORST_CASE):
            assert own.measures[success(name)].estimate.n == 3
    assert results.after is not None
    assert results.after.measures[Metric("passes_per_example", "harmful", "gcg")].estimate.value > 0
    assert {own.metric for own in results.differences} >= {success("gcg"), success(WORST_CASE)}
    assert all(own.n == 3 for own in results.differences)


def test_an_attack_on_fewer_rows_bounds_the_worst_case(tmp_path: Path, thundercat: Run) -> None:
    status, _, err = thundercat(*fit_arguments(tmp_path, "limited_suite", 1))
    assert status == 0, err
    after = load(tmp_path).after
    assert after is not None and after.complete
    assert after.measures[success("prefilling")].estimate.n == 4
    assert after.measures[success("word_noise")].estimate.n == 2
    assert after.measures[success(WORST_CASE)].estimate.n == 2


def test_impossible_settings_are_refused() -> None:
    with pytest.raises(ValueError, match="RobustnessEvaluation.attacks: expected at least one"):
        RobustnessEvaluation({})
    attacks: dict[str, Attack] = {"direct": DirectRequest()}
    with pytest.raises(ValueError, match="'worst_case' is no name for an attack"):
        RobustnessEvaluation({"worst_case": DirectRequest()})
    with pytest.raises(ValueError, match="attack_limits: expected names among .'direct'., got .'gcg'."):
        RobustnessEvaluation(attacks, attack_limits={"gcg": 3})
    with pytest.raises(ValueError, match="GCGEvaluation.max_new_tokens: expected an integer >= 1, got 0"):
        GCGEvaluation(max_new_tokens=0)
