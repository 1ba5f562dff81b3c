"""Continuous adversarial training: the inner attack runs inside `training_step` (arXiv 2405.15589, eq. 1).

min_theta  E[ objective( safe reply, harmful reply | x + delta* ) ] + E[ utility ],   delta* = attack(x, harmful reply)
"""

from __future__ import annotations

from typing import Any

import torch

from datamodules.batch import TrainingBatch
from lightning_modules.attacks.base import Attack, AttackedPrompt
from lightning_modules.base import FineTuning, OptimizerConfig, step_seed
from lightning_modules.losses.base import LossTerms, Objective
from lightning_modules.models.loading import ModelConfig
from lightning_modules.scoring import score_replies, score_utility


class AdversarialFineTuning(FineTuning):
    """Fine-tuning under attack: any attack, any objective.

    Args:
        base: the model to fine-tune.
        attack: the inner attack; NoAttack for the no-attack ablation.
        objective: the outer loss.
        optimizer: learning rate and schedule.
        seed: base of every step's own seed.
    """

    def __init__(
        self,
        base: ModelConfig,
        attack: Attack,
        objective: Objective,
        optimizer: OptimizerConfig | None = None,
        seed: int = 0,
    ) -> None:
        super().__init__(base, optimizer, seed)
        self.attack = attack
        self.objective = objective

    def training_step(self, batch: TrainingBatch, batch_idx: int) -> dict[str, Any]:
        """One micro-batch: attack the harmful prompts, score both replies under that perturbation, add the utility loss."""
        attacked: AttackedPrompt | None = None
        terms: list[LossTerms] = []
        if batch.adversarial is not None:
            attacked = self.attack(self.victim, batch.adversarial, self._generator())
            terms.append(self.objective.adversarial(score_replies(self.victim, batch.adversarial, attacked)))
        if batch.utility is not None:
            terms.append(self.objective.utility(*score_utility(self.victim, batch.utility)))
        loss = torch.stack([term.loss.mean() for term in terms]).sum()
        if not torch.isfinite(loss):
            raise FloatingPointError(f"the loss is {loss.item()} at step {self.global_step}; lower optimizer.lr, or set a cutoff_away")
        parts = {f"train/{name}": value.mean() for term in terms for name, value in term.parts.items()}
        self.log_dict(parts, on_step=True, batch_size=1)
        self.log("train/loss", loss.detach(), on_step=True, prog_bar=True, batch_size=1)
        return {"loss": loss, "attacked": attacked}

    def _generator(self) -> torch.Generator:
        number = self.trainer.fit_loop.epoch_loop.total_batch_idx
        return torch.Generator().manual_seed(step_seed(self.seed, number, self.global_rank))
