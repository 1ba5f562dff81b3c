"""What the audit found about evidence, as far as benign prompts and denominators go."""

from __future__ import annotations

from pathlib import Path

import pytest
import yaml

from callbacks.evaluations.benign import BenignUnderAttack
from callbacks.evaluations.robustness import RobustnessEvaluation
from callbacks.report.load import load
from callbacks.report.tables import warnings
from lightning_modules.attacks.suffix.initial_suffix import InitialSuffix
from tests.conftest import ROOT
from tests.support.suspicious import Suspicious, corpus, measured


def test_c01_no_attack_success_is_shown_with_the_refusals_that_explain_it(tmp_path: Path) -> None:
    data = corpus(harmful=2, benign=4)
    suite = RobustnessEvaluation({"suffix": InitialSuffix(8)}, benign=BenignUnderAttack(4), max_new_tokens=4)
    found = measured(tmp_path, Suspicious(data, ["x x"]), data, suite)
    assert {m.key: e.estimate.value for m, e in found.measures.items() if m.quantity.endswith("rate")} == {
        "harmful/suffix/success_rate": 0,
        "harmful/suffix/not_refused_rate": 0,
        "harmless/suffix/over_refusal_rate": 1,
    }
    assert any("suffix: refuses what carries it" in text for text in warnings(load(tmp_path, "test")))


SUITES = sorted((ROOT / "configs" / "evaluation").glob("*.yaml"))


@pytest.mark.parametrize(
    "path", [own for own in SUITES if "RobustnessEvaluation" in own.read_text()], ids=lambda p: p.stem
)
def test_c01_every_suite_asks_benign_prompts_too(path: Path) -> None:
    trainer = yaml.safe_load(path.read_text())["trainer"]
    suites = [
        own
        for own in trainer.get("callbacks+") or trainer["callbacks"]
        if own["class_path"].endswith("RobustnessEvaluation")
    ]
    assert suites
    assert all(own["init_args"]["benign"]["limit"] >= 12 for own in suites)


def test_c06_over_refusal_counts_prompts_that_could_be_refused() -> None:
    sets = yaml.safe_load((ROOT / "configs" / "data" / "sets" / "tinychat.yaml").read_text())
    assert [source["init_args"].get("categories") for source in sets["harmless"]] == [
        ["guide", "judge", "story", "protect"]
    ]
