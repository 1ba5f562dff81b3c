"""The schedule of the public CAT implementations, written plainly, as the yardstick of
`experiments.benchmarks.training_step`.

What it does on purpose, as they do: rows of both kinds are drawn at random into micro-batches (one row in
eight is adversarial, so that some micro-batches hold none and others several); all rows of a micro-batch,
harmful, safe and utility, are padded to its longest; each micro-batch's rows are attacked by themselves, with
the model in training mode and LoRA unmerged; embeddings are one-hot times the embedding matrix; logits are of
the whole vocabulary at every position; away, toward and utility are forward passes of their own.

What it does not do, so that both sides compute the same thing: it takes gradients with respect to delta
alone, draws no dropout, trains on exactly the rows of our step and weighs them as our step does.

Until November 2026 it padded adversarial rows to 256 tokens whatever stood beside them, and took 1.5 times as
long as the authors' own code.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor, nn
from torch.nn.functional import cross_entropy, one_hot

from datamodules.batch import AdversarialBatch, UtilityBatch
from lightning_modules.models.likelihood import soft_cutoff


class Conversation(NamedTuple):
    """One row: ids, labels (-100 where nothing is scored) and where it may be perturbed; all (L,)."""

    ids: Tensor
    labels: Tensor
    attackable: Tensor


class Rows(NamedTuple):
    """Conversations padded to one length: ids, attention mask, labels, attackable mask; all (B, L)."""

    ids: Tensor
    mask: Tensor
    labels: Tensor
    attackable: Tensor


@dataclass
class MicroBatch:
    """Rows that are padded to one length and trained on together."""

    examples: list[int]
    """Which of the step's adversarial rows these are."""
    harmful: Rows | None
    safe: Rows | None
    utility: Rows | None


def conversations(batch: AdversarialBatch, reply: str) -> list[Conversation]:
    """Prompt and reply of each row joined."""
    replies, reply_mask = getattr(batch, f"{reply}_ids"), getattr(batch, f"{reply}_mask")
    rows = []
    for i in range(len(batch)):
        kept = batch.prompt_mask[i]
        prompt, answer = batch.prompt_ids[i][kept], replies[i][reply_mask[i]]
        attackable = torch.cat([batch.attackable_mask[i][kept], torch.zeros_like(answer, dtype=torch.bool)])
        labels = torch.cat([torch.full_like(prompt, -100), answer])
        rows.append(Conversation(torch.cat([prompt, answer]), labels, attackable))
    return rows


def chats(batches: Sequence[UtilityBatch]) -> list[Conversation]:
    """Utility rows, one by one."""
    return [
        Conversation(ids[mask], labels[mask], torch.zeros_like(mask[mask]))
        for batch in batches
        for ids, mask, labels in zip(batch.input_ids, batch.attention_mask, batch.labels, strict=True)
    ]


def interleaved(
    batch: AdversarialBatch, utility: Sequence[UtilityBatch], size: int, seed: int = 0
) -> list[MicroBatch]:
    """All rows of a step in random order, so many a micro-batch."""
    harmful, safe, others = conversations(batch, "harmful"), conversations(batch, "safe"), chats(utility)
    generator = torch.Generator().manual_seed(seed)
    order = torch.randperm(len(batch) + len(others), generator=generator).tolist()
    parts = []
    for start in range(0, len(order), size):
        own = order[start : start + size]
        parts.append(
            _together(
                [i for i in own if i < len(batch)],
                harmful,
                safe,
                [others[i - len(batch)] for i in own if i >= len(batch)],
            )
        )
    return parts


def apart(batch: AdversarialBatch, utility: Sequence[UtilityBatch]) -> list[MicroBatch]:
    """The adversarial rows in one micro-batch, and each batch of utility rows in one: kinder than they are
    to themselves, where it is the attack that is compared."""
    harmful, safe = conversations(batch, "harmful"), conversations(batch, "safe")
    first = _together(list(range(len(batch))), harmful, safe, [])
    return [first, *(_together([], harmful, safe, chats([rows])) for rows in utility)]


def _together(
    examples: list[int],
    harmful: Sequence[Conversation],
    safe: Sequence[Conversation],
    utility: Sequence[Conversation],
) -> MicroBatch:
    own = [harmful[i] for i in examples], [safe[i] for i in examples], utility
    length = max(len(row.ids) for rows in own for row in rows)
    return MicroBatch(examples, *(_padded(rows, length) if rows else None for rows in own))


def _padded(rows: Sequence[Conversation], length: int) -> Rows:
    device = rows[0].ids.device
    ids = torch.zeros(len(rows), length, dtype=torch.long, device=device)
    mask, attackable = torch.zeros_like(ids, dtype=torch.bool), torch.zeros_like(ids, dtype=torch.bool)
    labels = torch.full_like(ids, -100)
    for i, row in enumerate(rows):
        end = len(row.ids)
        ids[i, :end], labels[i, :end], attackable[i, :end] = row
        mask[i, :end] = True
    return Rows(ids, mask, labels, attackable)


def embed(model: nn.Module, ids: Tensor) -> Tensor:
    """One-hot times matrix: (B, L, V) x (V, D)."""
    weight = model.get_input_embeddings().weight  # type: ignore[operator, union-attr]
    return one_hot(ids, weight.shape[0]).to(weight.dtype) @ weight


def loss_per_example(model: nn.Module, embeds: Tensor, mask: Tensor, labels: Tensor) -> Tensor:
    """(B,) mean cross-entropy of the labelled tokens, from the logits of all positions."""
    logits = model(inputs_embeds=embeds, attention_mask=mask.long(), use_cache=False).logits[:, :-1]
    losses = cross_entropy(logits.transpose(1, 2), labels[:, 1:], ignore_index=-100, reduction="none")
    return losses.sum(1) / (labels[:, 1:] != -100).sum(1)


def attack(model: nn.Module, rows: Rows, steps: int, radius: Tensor, step: Tensor) -> Tensor:
    """(B, L, D) perturbation after `steps` sign steps, each projected to the per-token l2 ball."""
    clean = embed(model, rows.ids).detach()
    delta = torch.zeros_like(clean)
    for _ in range(steps):
        delta.requires_grad_()
        loss = loss_per_example(model, clean + delta, rows.mask, rows.labels).sum()
        (gradient,) = torch.autograd.grad(loss, delta)
        moved = (delta.detach() - step * gradient.sign()) * rows.attackable[..., None]
        delta = moved * (radius / moved.norm(dim=-1, keepdim=True).clamp_min(1e-12)).clamp_max(1.0)
    return delta


def adversarial_losses(model: nn.Module, micro_batch: MicroBatch, delta: Tensor) -> Tensor:
    """(B,) CAT's adversarial losses by two forward passes, weights 0.5 / 0.5 and cutoffs 0.5 / -5."""
    losses = []
    for rows in (micro_batch.harmful, micro_batch.safe):
        assert rows is not None
        # The perturbation belongs to the prompt, which both replies share.
        perturbed = embed(model, rows.ids) + delta * rows.attackable[..., None]
        losses.append(loss_per_example(model, perturbed, rows.mask, rows.labels))
    harmful, safe = losses
    return 0.5 * soft_cutoff(safe, 0.5) + 0.5 * soft_cutoff(-harmful, -5.0)


def utility_losses(model: nn.Module, rows: Rows) -> Tensor:
    """(B,) mean cross-entropy of the replies of utility rows."""
    return loss_per_example(model, embed(model, rows.ids), rows.mask, rows.labels)
