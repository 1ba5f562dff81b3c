"""Random tokens after the user's text before another attack runs, so that training also covers prompts with a suffix."""

from __future__ import annotations

from dataclasses import replace

import torch

from datamodules.batch import AdversarialBatch
from lightning_modules.attacks.base import Attack, AttackedPrompt, example_generators
from lightning_modules.attacks.soft_prompt import append_slots
from lightning_modules.models.victim import Victim


class Appended:
    """Appends random tokens and runs another attack on the attackable tokens and on them.

    A ball around the plain request holds no prompt with a suffix, and a discrete suffix attack is free to leave it.

    Args:
        attack: the attack that perturbs the embeddings.
        num_tokens: appended tokens.
        first_id: ids below this one are not drawn (in many vocabularies the special tokens).
    """

    def __init__(self, attack: Attack, num_tokens: int = 20, first_id: int = 6) -> None:
        if num_tokens < 1:
            raise ValueError(f"Appended.num_tokens: expected >= 1, got {num_tokens}; use the inner attack alone for none")
        self.attack = attack
        self.num_tokens = num_tokens
        self.first_id = first_id

    def __call__(self, victim: Victim, batch: AdversarialBatch, generator: torch.Generator | None = None) -> AttackedPrompt:
        """Append, then attack. Raises: what the inner attack raises."""
        wide = append_slots(batch, self.num_tokens, 0)
        slots = wide.attackable_mask
        ids = wide.prompt_ids.clone()
        for row, own in enumerate(example_generators(batch, generator)):
            drawn = torch.randint(self.first_id, victim.embedding_weight.shape[0], (self.num_tokens,), generator=own)
            ids[row, slots[row]] = drawn.to(ids.device)
        # The same widening applied to the mask says where the user's own tokens have moved.
        moved = append_slots(replace(batch, prompt_ids=batch.attackable_mask.long()), self.num_tokens, 1).prompt_ids.bool()
        return self.attack(victim, replace(wide, prompt_ids=ids, attackable_mask=moved), generator)
