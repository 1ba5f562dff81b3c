"""How the model holds against gradient attacks on its embeddings: success per attack, loss curves, worst case per example."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import torch

from callbacks.evaluation import Evaluation, EvaluationRun, Findings, flatten
from callbacks.health import health_flags
from callbacks.judges.exact import TargetPrefix
from callbacks.judges.keyword import KeywordRefusal
from callbacks.metrics.means import Mean
from callbacks.metrics.rates import Rate
from datamodules.batch import BehaviourBatch
from lightning_modules.attacks.base import Attack, AttackedPrompt

MEANS = ("loss_start", "loss_best", "passes_per_example")


class EmbeddingAttackEvaluation(Evaluation):
    """Attacks held-out harmful prompts, generates from the perturbed embeddings and judges the replies.

    Success is a reply that begins with the harmful target's first sentence. Beside it stand the replies that are merely not
    refused (gibberish counts there), the attacked loss before and after, and at-least-one success over all attacks.

    Args:
        attacks: attacks by name; the name is part of the metric.
        every_n_steps: evaluate after every so many optimiser steps; null for no periodic evaluation.
        at_start: evaluate before the first training step.
        at_end: evaluate after the last training step.
        limit: use at most so many rows, evenly spaced, inside `fit`.
        max_new_tokens: longest generated reply.
        seed: seed of random starts.
    """

    name = "embedding_attacks"

    def __init__(
        self,
        attacks: dict[str, Attack],
        every_n_steps: int | None = None,
        at_start: bool = False,
        at_end: bool = True,
        limit: int | None = None,
        max_new_tokens: int = 64,
        seed: int = 0,
    ) -> None:
        super().__init__(every_n_steps, at_start, at_end, limit, max_new_tokens)
        if not attacks:
            raise ValueError("EmbeddingAttackEvaluation.attacks: expected at least one named attack, got none")
        self.attacks = attacks
        self.seed = seed

    def evaluate(self, run: EvaluationRun) -> Findings:
        if not run.has("harmful"):
            raise ValueError("EmbeddingAttackEvaluation needs harmful behaviours; set data.evaluation.harmful")
        tallies = {name: _Tally(run) for name in self.attacks}
        worst = Rate().to(run.module.device)
        samples = []
        for batch in run.batches("harmful", "embedding attacks"):
            any_success = torch.zeros(len(batch), dtype=torch.bool, device=run.module.device)
            for name, attack in self.attacks.items():
                success, rows = tallies[name].add(run, attack, batch, self.seed)
                any_success |= success
                samples += [{"attack": name, **row} for row in rows]
            worst.update(any_success)
        metrics = flatten("worst_case/success_rate", worst)
        for name, tally in tallies.items():
            metrics |= tally.metrics(name)
        judge = TargetPrefix()
        details = {name: tally.details() for name, tally in tallies.items()} | {"judge": f"{judge.name}@{judge.revision}"}
        return Findings(metrics, details, samples)


@dataclass
class _Tally:
    """Counts of one attack over the batches."""

    run: EvaluationRun
    curves: list[torch.Tensor] = field(default_factory=list)
    flags: dict[str, int] = field(default_factory=dict)

    def __post_init__(self) -> None:
        self.success = Rate().to(self.run.module.device)
        self.not_refused = Rate().to(self.run.module.device)
        self.means = {name: Mean().to(self.run.module.device) for name in MEANS}

    def add(self, run: EvaluationRun, attack: Attack, batch: BehaviourBatch, seed: int) -> tuple[torch.Tensor, list[dict[str, Any]]]:
        assert batch.adversarial is not None
        attacked: AttackedPrompt = attack(run.victim, batch.adversarial, torch.Generator().manual_seed(seed))
        with torch.no_grad():
            replies = run.replies(attacked.embeds(run.victim), attacked.prompt_mask)
        target, refusal = TargetPrefix(), KeywordRefusal()
        verdicts = [target(p, r, t) for p, r, t in zip(batch.prompts, replies, batch.references, strict=True)]
        success = torch.tensor(verdicts, device=run.module.device)
        self.success.update(success)
        refused = [refusal(p, r) for p, r in zip(batch.prompts, replies, strict=True)]
        self.not_refused.update(~torch.tensor(refused, device=run.module.device))
        self.curves.append(attacked.loss_curve.cpu())
        self.means["passes_per_example"].update(attacked.forward_passes + attacked.backward_passes)
        if len(attacked.loss_curve):
            self.means["loss_start"].update(attacked.start_loss)
            self.means["loss_best"].update(attacked.best_loss)
        for flag, count in health_flags(attacked).items():
            self.flags[flag] = self.flags.get(flag, 0) + count
        rows = zip(batch.keys, batch.prompts, batch.references, replies, verdicts, refused, strict=True)
        return success, [{"key": k, "prompt": p, "target": t, "reply": r, "success": v, "refused": f} for k, p, t, r, v, f in rows]

    def metrics(self, name: str) -> dict[str, float]:
        metrics = flatten(f"{name}/success_rate", self.success) | flatten(f"{name}/not_refused_rate", self.not_refused)
        for quantity, mean in self.means.items():
            metrics |= flatten(f"{name}/{quantity}", mean)
        return metrics

    def details(self) -> dict[str, Any]:
        curve = self._curve()
        return {"loss_curve": curve.nanmean(1).tolist(), "flags": self.flags}

    def _curve(self) -> torch.Tensor:
        """(K, n) attacked losses of all examples; shorter curves (every example done early) are filled with NaN."""
        rows = max(len(curve) for curve in self.curves)
        return torch.cat([torch.cat([c, c.new_full((rows - len(c), c.shape[1]), torch.nan)]) for c in self.curves], dim=1)
