"""What an attack is: hyperparameters in the constructor, model and batch at call time, an AttackedPrompt as the result."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor

from datamodules.batch import AdversarialBatch
from lightning_modules.models.victim import Victim


@dataclass(frozen=True)
class AttackedPrompt:
    """Attacked prompts of B examples, detached from every graph, with the evidence that the attack worked.

    Losses are the attacked loss, CE(harmful target) per example in nats per token; it is what the attack minimises.
    """

    prompt_ids: Tensor
    """(B, P) the ids under the perturbation; longer than the batch's where the attack appended tokens."""
    prompt_mask: Tensor
    delta: Tensor | None
    """(B, P, D) fp32 added to the embeddings, None where nothing is added."""
    loss_curve: Tensor
    """(K, B) attacked loss at every evaluated iterate, NaN once an example has left the batch; K is 0 without an attack."""
    forward_passes: Tensor
    """(B,) int64 forward passes spent on each example."""
    backward_passes: Tensor
    distance: Tensor
    """(B,) largest per-token perturbation in units of the radius (0 for no attack; NaN where there is no radius)."""
    zero_gradient: Tensor
    """(B,) bool, True where an iteration saw an exactly zero gradient on all attackable positions."""

    def embeds(self, victim: Victim) -> Tensor:
        """(B, P, D) perturbed embeddings; differentiable in the victim's embedding weights, not in delta."""
        clean = victim.embed(self.prompt_ids)
        return clean if self.delta is None else (clean + self.delta).to(clean.dtype)

    @property
    def start_loss(self) -> Tensor:
        return self.loss_curve[0]

    @property
    def best_loss(self) -> Tensor:
        return torch.nan_to_num(self.loss_curve, nan=torch.inf).amin(0)


class Attack(Protocol):
    """Perturbs the attackable positions of a batch's prompts so that the harmful target becomes likely.

    Contract (asserted for every attack in tests/test_attack_contract.py): the model's parameters, their `.grad` and
    `requires_grad` and all train/eval flags are unchanged; positions outside `attackable_mask` are untouched; the same
    generator state gives the same bits; an example's result does not depend on its batch-mates or padding.
    """

    def __call__(self, victim: Victim, batch: AdversarialBatch, generator: torch.Generator | None = None) -> AttackedPrompt: ...


class NoAttack:
    """delta = 0: the no-attack ablation and the clean baseline of every evaluation."""

    def __call__(self, victim: Victim, batch: AdversarialBatch, generator: torch.Generator | None = None) -> AttackedPrompt:
        passes = torch.zeros(len(batch), dtype=torch.long)
        return AttackedPrompt(
            prompt_ids=batch.prompt_ids,
            prompt_mask=batch.prompt_mask,
            delta=None,
            loss_curve=torch.empty(0, len(batch)),
            forward_passes=passes,
            backward_passes=passes.clone(),
            distance=torch.zeros(len(batch)),
            zero_gradient=torch.zeros(len(batch), dtype=torch.bool),
        )


def require_gradients(attack: object) -> None:
    """Raises: RuntimeError inside `torch.inference_mode`, where no attack can differentiate."""
    if torch.is_inference_mode_enabled():
        raise RuntimeError(
            f"{type(attack).__name__} needs gradients, got torch.inference_mode; set trainer.inference_mode: false "
            "(validate and test run in inference mode by default in Lightning)"
        )


def example_generators(batch: AdversarialBatch, generator: torch.Generator | None) -> list[torch.Generator]:
    """One CPU generator per example, seeded by one draw from `generator` and the example's id.

    An example's noise therefore does not depend on its batch-mates.
    """
    base = int(torch.randint(0, 2**62, (1,), generator=generator).item()) if generator is not None else 0
    return [torch.Generator().manual_seed((base ^ example) & (2**63 - 1)) for example in batch.example_id.tolist()]
