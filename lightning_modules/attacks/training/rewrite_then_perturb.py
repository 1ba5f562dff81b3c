"""A discrete rewrite of some prompts, then a continuous attack around what came out: MixAT's inner attack
(arXiv 2505.16947)."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import torch

from datamodules.batch import AdversarialBatch, pad
from datamodules.fields import Share, checked
from datamodules.text.chat_format import Attackable, ChatFormat
from lightning_modules.attacks.base import (
    Attack,
    AttackedPrompt,
    example_rngs,
    load_attack_state,
    require_texts,
    share,
    state_of,
)
from lightning_modules.models.language_model import LanguageModel


@checked
class RewriteThenPerturb:
    """Rewrites each prompt with a given probability and then perturbs the embeddings of all of them.

    Args:
        rewrite: a discrete attack whose result can be typed (templates, noise, GCG, ...), without forced
            replies.
        perturb: an attack on embeddings.
        probability: chance of a prompt to be rewritten.
        attackable: which tokens of a rewritten prompt the second attack may perturb; as data.attackable.
    """

    def __init__(
        self, rewrite: Attack, perturb: Attack, probability: Share = 0.5, attackable: Attackable = "user"
    ) -> None:
        self.rewrite = rewrite
        self.perturb = perturb
        self.probability = probability
        self.attackable: Attackable = attackable

    def __call__(
        self, model: LanguageModel, batch: AdversarialBatch, rng: torch.Generator | None = None
    ) -> AttackedPrompt:
        """Attack the batch. Raises: ValueError without texts, or for a rewrite that nobody can type."""
        require_texts(batch)
        coins = [torch.rand((), generator=own).item() for own in example_rngs(batch, rng)]
        rows = [row for row, coin in enumerate(coins) if coin < self.probability]
        if not rows:
            return self.perturb(model, batch, rng)
        rewritten = self.rewrite(model, batch.select(rows), rng)
        if not rewritten.texts or any(rewritten.forced):
            raise ValueError(
                "RewriteThenPerturb.rewrite: expected an attack whose result a user can type, got "
                f"{type(self.rewrite).__name__}; "
                "use templates, noise or a suffix search"
            )
        found = self.perturb(model, self._replaced(model.chat, batch, rows, rewritten), rng)
        forward, backward = found.forward_passes.clone(), found.backward_passes.clone()
        index = torch.tensor(rows, device=forward.device)
        forward[index] += rewritten.forward_passes.to(forward)
        backward[index] += rewritten.backward_passes.to(backward)
        queries = found.queries
        if rewritten.queries is not None:
            queries = torch.zeros_like(forward) if queries is None else queries.clone()
            queries[index] += rewritten.queries.to(queries)
        return replace(found, forward_passes=forward, backward_passes=backward, queries=queries)

    def _replaced(
        self, chat: ChatFormat, batch: AdversarialBatch, rows: Sequence[int], rewritten: AttackedPrompt
    ) -> AdversarialBatch:
        """The batch with the rewritten prompts in place of the old ones; replies and example ids stay."""
        prompts = [ids[mask].tolist() for ids, mask in zip(batch.prompt_ids, batch.prompt_mask, strict=True)]
        spans = [
            span[mask].tolist() for span, mask in zip(batch.attackable_mask, batch.prompt_mask, strict=True)
        ]
        texts = list(batch.prompts)
        for i, row in enumerate(rows):
            history = rewritten.histories[i] if rewritten.histories else ()
            envelope = batch.envelope(row)
            tokens = envelope.prompt(chat, rewritten.texts[i], history)
            # Where the text is a document, the instruction before it is trusted.
            span: Attackable = self.attackable if envelope.instruction is None else "data"
            prompts[row], spans[row], texts[row] = tokens.ids, tokens.attackable(span), rewritten.texts[i]
        device = batch.prompt_ids.device
        ids, mask = pad(prompts, "left")
        attackable, _ = pad([[int(a) for a in span] for span in spans], "left")
        return replace(
            batch,
            prompt_ids=ids.to(device),
            prompt_mask=mask.to(device),
            attackable_mask=(attackable.bool() & mask).to(device),
            prompts=tuple(texts),
            lengths=(),
        )

    def share(self, model: LanguageModel) -> None:
        """What the two attacks have to exchange."""
        share(self.rewrite, model)
        share(self.perturb, model)

    def state_dict(self) -> dict[str, Any]:
        """What the two attacks keep between batches."""
        return {"rewrite": state_of(self.rewrite), "perturb": state_of(self.perturb)}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        load_attack_state(self.rewrite, state["rewrite"])
        load_attack_state(self.perturb, state["perturb"])
