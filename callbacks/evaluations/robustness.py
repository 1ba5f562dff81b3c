"""How the model holds against a suite of attacks: success per attack, worst case per example, cost, and
whether to trust it.

Every result is a row in the run folder's store (callbacks/store.py) before it counts, so a killed evaluation
goes on where it stood, and another judge can be asked without attacking again.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from tqdm.auto import tqdm

from callbacks.evaluations.attack_runs import AttackRunner
from callbacks.evaluations.attack_summary import Summary
from callbacks.evaluations.base import Evaluation, EvaluationRun, Findings
from callbacks.judges.base import Judge
from callbacks.judges.exact import TargetPrefix
from callbacks.judges.keyword import KeywordRefusal
from datamodules.results import ResultsStore, contents, settings_digest
from lightning_modules.attacks.base import Attack
from lightning_modules.attacks.progress import observed
from lightning_modules.attacks.suffix.gcg import GCG
from lightning_modules.attacks.suffix.initial_suffix import InitialSuffix
from lightning_modules.attacks.text.rewrites import DirectRequest
from lightning_modules.models.fingerprint import fingerprint


class RobustnessEvaluation(Evaluation):
    """Attacks held-out harmful behaviours with every attack of a suite, generates from what they found and
    judges the replies.

    Put DirectRequest (the un-attacked request) into every suite: a success rate says nothing without it.

    Args:
        attacks: attacks by name; the name is part of the metric.
        success: judge whose verdict is the success of an attack.
        judges: further judges, stored and reported beside it.
        num_restarts: runs of every attack per example with different seeds; one success is enough.
        every_n_steps: evaluate after every so many optimiser steps; null for no periodic evaluation.
        at_start: evaluate before the first training step.
        at_end: evaluate after the last training step.
        limit: use at most so many rows, evenly spaced, inside `fit`; `validate` and `test` use all.
        test_limit: the same for `validate` and `test`; null uses all.
        attack_limits: fewer rows for single attacks (by name) inside `fit`; worst cases then count the rows
            that all attacks tried.
        max_new_tokens: longest generated reply.
        seed: seed of the attacks.
    """

    name = "robustness"

    def __init__(
        self,
        attacks: dict[str, Attack],
        success: Judge | None = None,
        judges: list[Judge] | None = None,
        num_restarts: int = 1,
        every_n_steps: int | None = None,
        at_start: bool = False,
        at_end: bool = True,
        limit: int | None = None,
        test_limit: int | None = None,
        attack_limits: dict[str, int] | None = None,
        max_new_tokens: int = 64,
        seed: int = 0,
    ) -> None:
        super().__init__(every_n_steps, at_start, at_end, limit, max_new_tokens, test_limit)
        unknown = set(attack_limits or {}) - set(attacks)
        if unknown:
            raise ValueError(
                f"{type(self).__name__}.attack_limits: expected names among {sorted(attacks)}, got "
                f"{sorted(unknown)}"
            )
        if not attacks:
            raise ValueError(f"{type(self).__name__}.attacks: expected at least one named attack, got none")
        if num_restarts < 1:
            raise ValueError(f"{type(self).__name__}.num_restarts: expected >= 1, got {num_restarts}")
        self.attacks = attacks
        self.success: Judge = success or TargetPrefix()
        self.judges = judges or []
        self.num_restarts = num_restarts
        self.attack_limits = attack_limits or {}
        self.seed = seed

    def evaluate(self, run: EvaluationRun) -> Findings:
        """Raises: ValueError without harmful behaviours."""
        if not run.has("harmful"):
            raise ValueError(f"{type(self).__name__} needs harmful behaviours; set data.evaluation.harmful")
        refusal = KeywordRefusal()
        store = ResultsStore(Path(run.trainer.default_root_dir), run.trainer.global_rank)
        runner = AttackRunner(
            run, store, [self.success, refusal, *self.judges], fingerprint(run.module.model), self.seed
        )
        summary = Summary(list(self.attacks), self.success, refusal, self.judges, run)
        limits = self.attack_limits if run.trainer.training else {}
        batches = {name: list(run.batches("harmful", limit=limits.get(name))) for name in self.attacks}
        total = self.num_restarts * sum(len(batch) for own in batches.values() for batch in own)
        with run.progress(total, self.name) as bar:
            for name, attack in self.attacks.items():
                # A row is another one if its prompt is put differently (template, system message, attackable
                # span), if its target or its batch-mates change, or the seed: all that decides an outcome
                # besides the weights.
                digest = settings_digest(
                    attack, self.max_new_tokens, self.seed, [contents(batch) for batch in batches[name]]
                )
                for batch in batches[name]:
                    for restart in range(self.num_restarts):
                        bar.set_description(f"{self.name}: {name}")
                        with observed(_Postfix(bar)):
                            rows = runner.rows(name, attack, digest, batch, restart)
                        summary.add(name, rows)
                        bar.update(len(batch))
        return Findings(*summary.compute())


class GCGEvaluation(RobustnessEvaluation):
    """GCG with a stated budget, and beside it the request itself and the un-optimised suffix:
    RobustnessEvaluation with three attacks.

    Args:
        num_steps: GCG steps.
        width: candidates per step and behaviour.
        topk: tokens per position that the gradient proposes.
        num_tokens: length of the suffix.
        target_tokens: search for the target's first so many tokens only; null for all.
        every_n_steps: evaluate after every so many optimiser steps; null for no periodic evaluation.
        at_start: evaluate before the first training step.
        at_end: evaluate after the last training step.
        limit: use at most so many rows, evenly spaced, inside `fit`.
        test_limit: the same for `validate` and `test`; null uses all.
        max_new_tokens: longest generated reply.
        seed: seed of the attack.
    """

    name = "gcg"

    def __init__(
        self,
        num_steps: int = 100,
        width: int = 64,
        topk: int = 64,
        num_tokens: int = 20,
        target_tokens: int | None = None,
        every_n_steps: int | None = None,
        at_start: bool = False,
        at_end: bool = True,
        limit: int | None = None,
        test_limit: int | None = None,
        max_new_tokens: int = 64,
        seed: int = 0,
    ) -> None:
        gcg = GCG(
            num_tokens=num_tokens, num_steps=num_steps, width=width, topk=topk, target_tokens=target_tokens
        )
        attacks: dict[str, Attack] = {
            "direct": DirectRequest(),
            "initial_suffix": InitialSuffix(num_tokens),
            "gcg": gcg,
        }
        super().__init__(
            attacks,
            every_n_steps=every_n_steps,
            at_start=at_start,
            at_end=at_end,
            limit=limit,
            test_limit=test_limit,
            max_new_tokens=max_new_tokens,
            seed=seed,
        )


class _Postfix:
    """Shows an attack's iterate and mean loss behind the progress bar."""

    def __init__(self, bar: tqdm[Any]) -> None:
        self.bar = bar
        self.iterate = 0

    def __call__(self, losses: torch.Tensor, texts: object) -> None:
        self.iterate += 1
        if not self.bar.disable:
            self.bar.set_postfix_str(f"iterate {self.iterate}, loss {losses.nanmean().item():.3f}")
