"""The schedule of the public CAT implementations, written plainly, as the yardstick of
`experiments.benchmarks.training_step`.

What it does on purpose: embeds by one-hot times the embedding matrix, computes full-vocabulary logits at
every position, pads adversarial rows to the utility rows' length, keeps LoRA unmerged in the loop, and runs
away, toward and utility as separate forward passes. What it does not do: it takes gradients with respect to
delta alone, so that both sides compute the same thing.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn.functional import cross_entropy, one_hot

from datamodules.batch import AdversarialBatch, UtilityBatch
from lightning_modules.models.likelihood import soft_cutoff


def padded_rows(batch: AdversarialBatch, reply: str, length: int) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Prompt and reply of each row joined and right-padded to `length`: ids, attention mask, labels,
    attackable mask; all (B, L)."""
    ids = torch.zeros(len(batch), length, dtype=torch.long)
    mask, attackable = (
        torch.zeros(len(batch), length, dtype=torch.bool),
        torch.zeros(len(batch), length, dtype=torch.bool),
    )
    labels = torch.full((len(batch), length), -100)
    replies, reply_mask = getattr(batch, f"{reply}_ids"), getattr(batch, f"{reply}_mask")
    for i in range(len(batch)):
        kept = batch.prompt_mask[i]
        prompt, answer = batch.prompt_ids[i][kept], replies[i][reply_mask[i]]
        end = len(prompt) + len(answer)
        ids[i, :end] = torch.cat([prompt, answer])
        mask[i, :end] = True
        labels[i, len(prompt) : end] = answer
        attackable[i, : len(prompt)] = batch.attackable_mask[i][kept]
    return ids, mask, labels, attackable


def embed(model: nn.Module, ids: Tensor) -> Tensor:
    """One-hot times matrix: (B, L, V) x (V, D)."""
    weight = model.get_input_embeddings().weight  # type: ignore[operator, union-attr]
    return one_hot(ids, weight.shape[0]).to(weight.dtype) @ weight


def loss_per_example(model: nn.Module, embeds: Tensor, mask: Tensor, labels: Tensor) -> Tensor:
    """(B,) mean cross-entropy of the labelled tokens, from the logits of all positions."""
    logits = model(inputs_embeds=embeds, attention_mask=mask.long(), use_cache=False).logits[:, :-1]
    losses = cross_entropy(logits.transpose(1, 2), labels[:, 1:], ignore_index=-100, reduction="none")
    return losses.sum(1) / (labels[:, 1:] != -100).sum(1)


def attack(
    model: nn.Module, batch: AdversarialBatch, length: int, steps: int, radius: Tensor, step: Tensor
) -> Tensor:
    """(B, L, D) perturbation after `steps` sign steps, each projected to the per-token l2 ball."""
    ids, mask, labels, attackable = padded_rows(batch, "harmful", length)
    was_training = model.training
    model.eval()
    clean = embed(model, ids).detach()
    delta = torch.zeros_like(clean)
    for _ in range(steps):
        delta.requires_grad_()
        loss = loss_per_example(model, clean + delta, mask, labels).sum()
        (gradient,) = torch.autograd.grad(loss, delta)
        moved = (delta.detach() - step * gradient.sign()) * attackable[..., None]
        delta = moved * (radius / moved.norm(dim=-1, keepdim=True).clamp_min(1e-12)).clamp_max(1.0)
    model.train(was_training)
    return delta


def adversarial_loss(model: nn.Module, batch: AdversarialBatch, delta: Tensor) -> Tensor:
    """CAT's adversarial loss of one micro-batch by two forward passes, weights 0.5 / 0.5 and cutoffs 0.5 /
    -5."""
    losses = {}
    for reply in ("harmful", "safe"):
        ids, mask, labels, attackable = padded_rows(batch, reply, delta.shape[1])
        # The perturbation belongs to the prompt, which both replies share.
        losses[reply] = loss_per_example(
            model, embed(model, ids) + delta * attackable[..., None], mask, labels
        )
    away, toward = soft_cutoff(-losses["harmful"], -5.0), soft_cutoff(losses["safe"], 0.5)
    return (0.5 * toward + 0.5 * away).mean()


def utility_loss(model: nn.Module, utility: UtilityBatch) -> Tensor:
    """Mean cross-entropy of the replies of one micro-batch of utility rows."""
    return loss_per_example(
        model, embed(model, utility.input_ids), utility.attention_mask, utility.labels
    ).mean()
