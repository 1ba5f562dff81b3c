"""Signs that an attack did not do its work, so that its failure says nothing about robustness (after Carlini
et al. 2019)."""

from __future__ import annotations

import logging
from typing import Any

import torch
from jaxtyping import Bool
from lightning import Callback, LightningModule, Trainer
from torch import Tensor

from datamodules.fields import Probability, checked
from lightning_modules.attacks.base import AttackedPrompt

log = logging.getLogger(__name__)

REMEDIES = {
    "zero_gradient": "the gradient was exactly zero: use fp32 or bf16 weights and check the attackable span",
    "loss_not_reduced": "the loss did not fall below its start: use a smaller step_size or step_rule: l2",
    "budget_unused": "the perturbation stayed inside the ball: use more steps or a larger step_size",
}


def example_flags(attacked: AttackedPrompt) -> dict[str, Bool[Tensor, " batch"]]:
    """Signs that the attack did not do its work (after Carlini et al. 2019); none for an attack that took no
    step."""
    curve = attacked.loss_curve
    if len(curve) == 0:
        return {}
    uses_gradients = bool((attacked.backward_passes > 0).any() or attacked.zero_gradient.any())
    flags = {"zero_gradient": attacked.zero_gradient} if uses_gradients else {}
    if len(curve) > 1:
        flags["loss_not_reduced"] = attacked.best_loss >= attacked.start_loss
    if not attacked.distance.isnan().any():
        flags["budget_unused"] = attacked.distance < 0.99
    return flags


def health_flags(attacked: AttackedPrompt) -> dict[str, int]:
    """How many examples show each sign."""
    return {name: int(raised.sum()) for name, raised in example_flags(attacked).items()}


@checked
class AttackHealth(Callback):
    """Logs the training attack's losses, distance and warning signs, at the first step and at those that the
    trainer logs; warns once per sign that most examples show.

    Args:
        warn_above: share of a step's examples above which a sign is reported as a warning.
    """

    def __init__(self, warn_above: Probability = 0.5) -> None:
        self.warn_above = warn_above
        self._warned: set[str] = set()
        self._looked = False

    def on_train_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: object, batch_idx: int
    ) -> None:
        # To look at the numbers is to wait for the GPU: at the first attack, and where they are logged.
        if self._looked and not trainer._logger_connector.should_update_logs:
            return
        attacked = outputs.get("attacked") if isinstance(outputs, dict) else None
        if attacked is None or len(attacked.loss_curve) == 0:
            return
        self._looked = True
        size = attacked.loss_curve.shape[1]
        values = {
            "train/attack/loss_start": attacked.start_loss.mean(),
            "train/attack/loss_best": attacked.best_loss.mean(),
            "train/attack/distance": attacked.distance.mean(),
        }
        pl_module.log_dict(
            {k: v for k, v in values.items() if not torch.isnan(v)},
            on_step=True,
            batch_size=1,
            sync_dist=True,
        )
        for flag, count in health_flags(attacked).items():
            pl_module.log(f"train/attack/{flag}", count / size, on_step=True, batch_size=1, sync_dist=True)
            if count / size > self.warn_above and flag not in self._warned:
                self._warned.add(flag)
                log.warning(
                    "attack health at step %d: %d of %d examples: %s",
                    trainer.global_step,
                    count,
                    size,
                    REMEDIES[flag],
                )
