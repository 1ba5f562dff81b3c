"""Hand-made RunResults: a run of two snapshots with three attacks, and names and replies that try to break
out of every format."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

from callbacks.metrics.names import WORST_CASE, Metric
from callbacks.report.results import (
    AttackFacts,
    BudgetCurve,
    Estimate,
    Measure,
    PairedDifference,
    RunResults,
    SampleRow,
    Snapshot,
    Stage,
)

HOSTILE = "<script>document.title='broken'</script>\x1b[2J\x1b]0;owned\x07 $\\frac{$ | `x` \u202egnp.exe"
UTILITY = Metric("exact_match", "utility")
REFUSAL = Metric("refusal_rate", "harmful")
OVER_REFUSAL = Metric("over_refusal_rate", "harmless")
PREFIX, KEYWORD = "target_prefix@1", "keyword_refusal@1"


def success(attack: str) -> Metric:
    return Metric("success_rate", "harmful", attack)


def rate(metric: Metric, value: float, n: int = 53, judge: str = PREFIX, **groups: Any) -> Measure:
    estimate = Estimate(value, max(0.0, value - 0.06), min(1.0, value + 0.05), n)
    return Measure(metric, estimate, judge, groups)


def sample(attack: str, key: str, reply: str, verdict: bool, **fields: Any) -> SampleRow:
    values: dict[str, Any] = {
        "subject": "harmful", "attack": attack, "key": key, "category": "fraud", "prompt": f"Explain {key}",
        "attacked": f"Explain {key} ! ! !" if attack == "gcg" else None, "history": (), "prefill": "",
        "expected": "Sure, here is", "reply": reply, "verdicts": {PREFIX: verdict, KEYWORD: not verdict},
    }  # fmt: skip
    return SampleRow(**(values | fields))


def attack_facts(name: str, start: float) -> AttackFacts:
    curve = [start * 0.7**i for i in range(12)]
    passes = BudgetCurve([0, 10, 20, 40], [0.0, 0.2, 0.5, 0.9])
    flags = {"zero_gradient": 0, "loss_not_reduced": 2}
    return AttackFacts(name, name == "gcg", "GCG(num_steps=20)", curve, flags, {"passes": passes})


def snapshot(step: int, broken: float, stage: Stage = "fit", attacks: tuple[str, ...] = ("gcg",)) -> Snapshot:
    names = ("direct", "embedding", *attacks)
    measures = [
        rate(REFUSAL, 0.981, judge=KEYWORD),
        rate(OVER_REFUSAL, 0.0, 400, KEYWORD, functional={"homonyms": Estimate(0.0, 0.0, 0.1, 25)}),
        rate(UTILITY, 0.978 if step else 0.98, 400, "exact_match@1"),
        rate(success("direct"), 0.0),
        rate(success("embedding"), broken),
        *(rate(success(name), broken, 16) for name in attacks),
        rate(success(WORST_CASE), broken, 16, category={"fraud": Estimate(0.5, 0.2, 0.8, 8)}),
        Measure(Metric("loss_best", "harmful", "embedding"), Estimate(0.3, 0.2, 0.4, 53, "mean")),
    ]
    samples = [
        sample(name, f"{i}-{name}", HOSTILE if i == 0 else f"step {step}: Sure, here is {i}", i % 3 == 0)
        for name in names
        for i in range(12)
    ]
    samples[1] = replace(
        samples[1], history=(("Hello", "Hi there"), ("Tell me", "What?")), prefill="Sure, here"
    )
    return Snapshot(
        stage, step, f"fingerprint{step}", {m.metric: m for m in measures},
        {name: attack_facts(name, 3.0 + step) for name in names}, {"black_box_beats_white_box": 1}, samples,
    )  # fmt: skip


def run_results(
    folder: Path = Path("example"), stage: Stage = "fit", attacks: tuple[str, ...] = ("gcg",)
) -> RunResults:
    """`fit`: before and after 150 steps, with all that a run writes down; else: one model."""
    after = snapshot(150, 0.0625, stage, attacks)
    configuration = {
        "seed_everything": 7,
        "model": {
            "class_path": "lightning_modules.adversarial.AdversarialFineTuning",
            "init_args": {
                "base": {"name_or_path": "tinychat:aligned", "dtype": "float32"},
                "attack": {"class_path": "lightning_modules.attacks.embedding.pgd.PGD"},
            },
        },
    }
    environment = {
        "seed_everything": 7, "git": {"revision": "0123abc", "modified": True},
        "packages": {"torch": "2.13.0"}, "hardware": {"cpu": "x86_64", "cores": 2, "devices": []},
        "command": ["thundercat", "fit", "--config", "configs/quickstart.yaml"],
    }  # fmt: skip
    if stage != "fit":
        return RunResults(folder, stage, [after], [], {}, [], configuration, environment)
    training = [
        {"step": float(i), "train/loss": 2 / (1 + i), "train/loss_toward": 1 / (1 + i)} for i in range(150)
    ]
    difference = PairedDifference(success("embedding"), -0.868, -0.941, -0.752, 53, 0, 46, 2.8e-14)
    cost = {"steps": 150.0, "seconds": 142.2, "passes": 46440.0}
    before = snapshot(0, 0.9375, stage, attacks)
    return RunResults(
        folder, stage, [before, after], [difference], cost, training, configuration, environment
    )
