"""Replies that have begun harmfully and must be turned into a refusal: training against prefilling.

The data augmentation of deep safety alignment (Qi et al., arXiv 2406.05946, section 4: "safety recovery
examples"): of some examples the safe reply follows the harmful one's first tokens instead of the prompt, so
that refusing is learned at every depth and not in the reply's first token alone.
"""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from datamodules.batch import AdversarialBatch
from datamodules.fields import Count, Share, checked
from lightning_modules.attacks.base import (
    Attack,
    AttackedPrompt,
    example_rngs,
    load_attack_state,
    share,
    state_of,
)
from lightning_modules.models.language_model import LanguageModel


@checked
class BegunReply:
    """Attacks the prompts and then begins some of the replies with their harmful target.

    Both replies are scored behind the begun one: the safe one whole, the harmful one from where it was left.

    Args:
        attack: what is done to the prompts; NoAttack leaves them as they are, as in the paper.
        longest: tokens of the target that a reply begins with at most; 1 to so many, all alike, and never the
            whole target [100 in the paper, whose targets are whole harmful answers].
        probability: chance of an example's reply to be begun [0.5 in the paper].
    """

    def __init__(self, attack: Attack, longest: Count = 10, probability: Share = 0.5) -> None:
        self.attack = attack
        self.longest = longest
        self.probability = probability

    def __call__(
        self, model: LanguageModel, batch: AdversarialBatch, rng: torch.Generator | None = None
    ) -> AttackedPrompt:
        """Attack the batch. Raises: ValueError where the attack forces replies itself."""
        found = self.attack(model, batch, rng)
        if any(found.forced):
            raise ValueError(
                "BegunReply.attack: expected an attack that begins no reply itself, got "
                f"{type(self.attack).__name__}; use NoAttack or an attack on the prompt"
            )
        counts = self._counts(batch, rng)
        if not any(counts):
            return found
        begun = batch.harmful_ids.tolist()
        forced = tuple(tuple(begun[i][:count]) for i, count in enumerate(counts))
        ids, mask = _behind(found.prompt_ids, counts), _behind(found.prompt_mask, counts)
        for i, count in enumerate(counts):
            if count:
                ids[i, -count:] = batch.harmful_ids[i, :count]
                mask[i, -count:] = True
        return replace(
            found,
            prompt_ids=ids,
            prompt_mask=mask,
            delta=None if found.delta is None else _behind(found.delta, counts),
            layers={number: _behind(delta, counts) for number, delta in found.layers.items()},
            forced=forced,
        )

    def _counts(self, batch: AdversarialBatch, rng: torch.Generator | None) -> list[int]:
        """How many tokens each reply is begun with."""
        lengths = [own.harmful for own in batch.lengths or batch.counted()]
        counts = []
        for length, own in zip(lengths, example_rngs(batch, rng), strict=True):
            most = min(self.longest, length - 1)
            drawn = torch.rand((), generator=own).item() < self.probability and most > 0
            counts.append(int(torch.randint(1, most + 1, (), generator=own)) if drawn else 0)
        return counts

    def share(self, model: LanguageModel) -> None:
        """What the attack has to exchange."""
        share(self.attack, model)

    def state_dict(self) -> dict[str, Any]:
        """What the attack keeps between batches."""
        return {"attack": state_of(self.attack)}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        load_attack_state(self.attack, state["attack"])


def _behind(rows: Tensor, counts: list[int]) -> Tensor:
    """Left-padded rows with room for so many tokens behind each; zeros in it and in the wider padding."""
    most, width = max(counts), rows.shape[1]
    wide = rows.new_zeros(rows.shape[0], width + most, *rows.shape[2:])
    for i, count in enumerate(counts):
        wide[i, most - count : most - count + width] = rows[i]
    return wide
