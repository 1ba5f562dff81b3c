"""Signs that an attack did not do its work, so that its failure says nothing about robustness (after Carlini
et al. 2019)."""

from __future__ import annotations

import logging
import math
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
    "no_step": "the attack took no step, its loss began below stop_loss: set a lower stop_loss, or null",
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
        left_at_once = (~curve.isnan()).sum(0) == 1
        still = left_at_once & (attacked.backward_passes == 0) & ~attacked.zero_gradient
        flags |= {"no_step": still, "budget_unused": (attacked.distance < 0.99) & ~still}
    return flags


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
        if attacked is None:
            return
        self._looked = True
        found = _over_processes(_sums(attacked))
        # Every process has the same numbers, of all examples that they are of.
        pl_module.log_dict(
            {f"train/attack/{name}": total / size for name, (total, size) in found.items()},
            on_step=True,
            batch_size=1,
        )
        for flag, remedy in REMEDIES.items():
            count, size = found.get(flag, (0.0, 1))
            if count / size > self.warn_above and flag not in self._warned:
                self._warned.add(flag)
                log.warning(
                    "attack health at step %d: %d of %d examples: %s",
                    trainer.global_step,
                    count,
                    size,
                    remedy,
                )


def _sums(attacked: AttackedPrompt) -> dict[str, tuple[float, int]]:
    """Sums over the examples that each number is of, NaN where one's is unknown, and how many those are;
    nothing of an attack that took no step."""
    curve, flags = attacked.loss_curve, example_flags(attacked)
    if len(curve) == 0:
        return {}
    values: dict[str, Tensor] = {
        "loss_start": attacked.start_loss,
        "loss_best": attacked.best_loss,
        "distance": attacked.distance,
        # Where a distance is NaN there are no such flags; other processes must hear of it.
        "no_step": attacked.distance,
        "budget_unused": attacked.distance,
        **flags,
    }
    # An example that left at once had nothing to reduce, whatever its batch-mates, or another process, did.
    if "loss_not_reduced" in flags:
        values["loss_not_reduced"] = flags["loss_not_reduced"][~curve[1].isnan()]
    if "zero_gradient" in flags:
        differentiated = (attacked.backward_passes > 0) | attacked.zero_gradient
        values["zero_gradient"] = flags["zero_gradient"][differentiated]
    sums = {name: (float(value.sum()), len(value)) for name, value in values.items()}
    return {name: own for name, own in sums.items() if own[1]}


def _over_processes(own: dict[str, tuple[float, int]]) -> dict[str, tuple[float, int]]:
    """The sums of all processes, none where one's is NaN. They exchange whole tables: which numbers there are
    depends on what each one's attack did, and logging them one by one would pair one process's with
    another's."""
    tables = [own]
    if torch.distributed.is_available() and torch.distributed.is_initialized():
        tables = [{} for _ in range(torch.distributed.get_world_size())]
        torch.distributed.all_gather_object(tables, own)
    added: dict[str, tuple[float, int]] = {}
    for name, (total, size) in (item for table in tables for item in table.items()):
        before = added.get(name, (0.0, 0))
        added[name] = before[0] + total, before[1] + size
    return {name: of_all for name, of_all in added.items() if not math.isnan(of_all[0])}
