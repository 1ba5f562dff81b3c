"""Losses between whole next-token distributions: keeping a reference's replies (KL retain), learning a
teacher's (distillation)."""

from __future__ import annotations

from contextlib import AbstractContextManager

import torch
from jaxtyping import Bool, Float
from torch import Tensor

from datamodules.fields import NonNegative, Positive, checked
from lightning_modules.losses.base import LossTerms, Step
from lightning_modules.models.frozen import FrozenCopy
from lightning_modules.models.language_model import LanguageModel
from lightning_modules.models.likelihood import masked_mean
from lightning_modules.models.loading import ModelConfig
from lightning_modules.models.logits import labelled_logits, reply_logits
from lightning_modules.models.reply import Reply


def token_kl(
    teacher: Float[Tensor, "scored vocabulary"],
    student: Float[Tensor, "scored vocabulary"],
    temperature: float = 1.0,
) -> Float[Tensor, " scored"]:
    """T^2 KL(softmax(teacher / T) || softmax(student / T)) from logits (Hinton et al. 2015, section 2).

    Raises: ValueError where the vocabularies differ.
    """
    if teacher.shape != student.shape:
        raise ValueError(
            f"expected teacher logits over the student's {student.shape[-1]} tokens, got "
            f"{teacher.shape[-1]}; use one tokenizer for both"
        )
    log_teacher, log_student = (
        (teacher / temperature).log_softmax(-1),
        (student / temperature).log_softmax(-1),
    )
    # The gradient of the softened KL falls with 1 / T^2: times T^2 the term's weight means the same at any T.
    return temperature**2 * (log_teacher.exp() * (log_teacher - log_student)).sum(-1)


@checked
class KLRetain:
    """KL(f0 || f) per reply token of the utility conversations, f0 the model before training: LAT's best
    retain term.

    Logits of all scored tokens over the whole vocabulary are held twice; lower data.utility_per_step where
    that does not fit.

    Args:
        weight: weight of the term [0.1 in LAT].
    """

    def __init__(self, weight: Positive = 0.1) -> None:
        self.weight = weight

    def __call__(self, step: Step) -> LossTerms:
        """Raises: ValueError without utility rows."""
        batch = step.batch.utility
        if batch is None:
            raise ValueError("KLRetain: expected utility rows, got none; set data.utility_per_step")
        with step.reference.active() as reference:
            before, _ = labelled_logits(reference, batch.input_ids, batch.attention_mask, batch.labels)
        now, mask = labelled_logits(step.model, batch.input_ids, batch.attention_mask, batch.labels)
        kl = masked_mean(_spread(token_kl(before, now), mask), mask)
        return LossTerms(self.weight * kl, {"loss_kl_retain": kl.detach()})


@checked
class Distillation:
    """Defensive distillation: learn a teacher's softened distribution on the safe replies (under attack) and
    on the utility replies.

    The teacher reads the clean prompt, the student the attacked one; with NoAttack both read the same.

    Args:
        teacher: any causal LM with the student's tokenizer; null takes the student as it was before training.
        temperature: softens both distributions, 1 does not; the loss is multiplied by its square.
        weight_safe: weight on safe replies to harmful requests.
        weight_utility: weight on utility replies.
    """

    def __init__(
        self,
        teacher: ModelConfig | None = None,
        temperature: Positive = 2.0,
        weight_safe: NonNegative = 1.0,
        weight_utility: NonNegative = 1.0,
    ) -> None:
        if weight_safe == weight_utility == 0:
            raise ValueError(
                "Distillation.weight_safe and weight_utility: expected one above 0, got 0 for both"
            )
        self.teacher = teacher
        self.temperature = temperature
        self.weight_safe = weight_safe
        self.weight_utility = weight_utility
        self._teacher = FrozenCopy(teacher) if teacher is not None else None

    def __call__(self, step: Step) -> LossTerms:
        """Raises: ValueError where neither stream has rows that the weights ask for, or the teacher has
        another vocabulary."""
        parts: dict[str, Tensor] = {}
        losses = []
        if step.batch.adversarial is not None and self.weight_safe > 0:
            kl = self._safe(step)
            losses.append(self.weight_safe * kl.mean())
            parts["loss_distil_safe"] = kl.detach()
        if step.batch.utility is not None and self.weight_utility > 0:
            kl = self._utility(step)
            losses.append(self.weight_utility * kl.mean())
            parts["loss_distil_utility"] = kl.detach()
        if not losses:
            raise ValueError(
                "Distillation: expected rows to distil on, got none; set data.harmful_per_step or "
                "data.utility_per_step"
            )
        return LossTerms(torch.stack(losses).sum(), parts)

    def _safe(self, step: Step) -> Float[Tensor, " batch"]:
        batch = step.batch.adversarial
        assert batch is not None and step.attacked is not None
        reply = Reply(batch.safe_ids, batch.safe_mask)
        with self._active(step) as teacher:
            taught = reply_logits(teacher, teacher.embed(batch.prompt_ids), batch.prompt_mask, reply)
        with step.attacked.applied(step.model) as embeds:
            said = reply_logits(step.model, embeds, step.attacked.prompt_mask, reply)
        return masked_mean(_spread(token_kl(taught, said, self.temperature), reply.mask), reply.mask)

    def _utility(self, step: Step) -> Float[Tensor, " batch"]:
        batch = step.batch.utility
        assert batch is not None
        with self._active(step) as teacher:
            taught, _ = labelled_logits(teacher, batch.input_ids, batch.attention_mask, batch.labels)
        said, mask = labelled_logits(step.model, batch.input_ids, batch.attention_mask, batch.labels)
        return masked_mean(_spread(token_kl(taught, said, self.temperature), mask), mask)

    def _active(self, step: Step) -> AbstractContextManager[LanguageModel]:
        return step.reference.active() if self._teacher is None else self._teacher.active(step.model)


def _spread(
    values: Float[Tensor, " scored"], mask: Bool[Tensor, "batch token"]
) -> Float[Tensor, "batch token"]:
    """The values at the True positions of a mask, 0 elsewhere."""
    return torch.zeros(mask.shape, dtype=values.dtype, device=values.device).masked_scatter(mask, values)
