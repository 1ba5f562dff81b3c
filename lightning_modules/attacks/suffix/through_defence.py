"""A suffix search that knows the defence: every candidate is scored by what the model reads *behind* it.

    loss = E[ CE(target | what the defence makes of the request) ] + penalty * (how far a filter stops it)

The expectation is over the defence's own randomness (Athalye et al. 2018, arXiv 1802.00420), which is drawn
anew at every step, alike for all candidates of it; the filter's part is a constraint made soft. Candidates
are GCG's: swaps that the gradient proposes on the unperturbed prompt, mixed with random ones, since a
gradient knows nothing of what a filter dislikes.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Protocol

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from datamodules.batch import AdversarialBatch
from datamodules.fields import Count, NonNegative, Probability, checked
from lightning_modules.attacks.base import AttackedPrompt, draw_seed, example_rngs, require_gradients
from lightning_modules.attacks.suffix.gcg import draw_swaps, promising
from lightning_modules.attacks.suffix.search import SuffixSearch
from lightning_modules.attacks.suffix.slots import Placement, typable_tokens
from lightning_modules.models.asked import reply_losses
from lightning_modules.models.embeddings import embedding_weight
from lightning_modules.models.language_model import LanguageModel
from lightning_modules.models.likelihood import mean_cross_entropy
from lightning_modules.models.reply import Reply
from lightning_modules.models.requests import Request


class Seen(Protocol):
    """What an attacker knows of a defence."""

    def seen_through(
        self, model: LanguageModel, requests: Sequence[Request], draws: int, seed: int
    ) -> list[list[Request]]:
        """What the model may read in the place of each request: as many draws of it where the defence is
        random, one where it is not."""
        ...

    def excesses(
        self, model: LanguageModel, requests: Sequence[Request], replies: Sequence[str]
    ) -> list[float] | None:
        """How far each request with this reply, which the attacker looks for, is beyond what is let through
        (above 0: stopped); None where nothing is stopped."""
        ...


@checked
class ThroughDefence:
    """Searches for a suffix against a model and the defence around it together.

    Args:
        defence: what stands around the model; null is the static search with the same steps.
        num_tokens: length of the suffix.
        place: where its tokens stand, seen from the request.
        init: text repeated to make the initial suffix.
        num_steps: number of steps.
        width: candidates per step and behaviour.
        topk: tokens per position that the gradient proposes.
        random_share: share of the candidates that swap at random instead.
        num_draws: draws of the defence's randomness behind every candidate's loss.
        penalty: nats per unit of what a filter finds too much; 0 attacks the model alone.
        target_tokens: search for the target's first so many tokens only; null for all.
        ascii_only: use only tokens of printable ASCII.
    """

    def __init__(
        self,
        defence: Seen | None = None,
        num_tokens: Count = 20,
        place: Placement = "after",
        init: str = " x",
        num_steps: Count = 100,
        width: Count = 32,
        topk: Count = 64,
        random_share: Probability = 0.25,
        num_draws: Count = 8,
        penalty: NonNegative = 20.0,
        target_tokens: Count | None = None,
        ascii_only: bool = True,
    ) -> None:
        if place == "around" and num_tokens == 1:
            raise ValueError("ThroughDefence.num_tokens: expected at least 2 around the request, got 1")
        self.defence = defence
        self.num_tokens = num_tokens
        self.place: Placement = place
        self.init = init
        self.num_steps = num_steps
        self.width = width
        self.topk = topk
        self.random_share = random_share
        self.num_draws = num_draws
        self.penalty = penalty
        self.target_tokens = target_tokens
        self.ascii_only = ascii_only

    def __call__(
        self, model: LanguageModel, batch: AdversarialBatch, rng: torch.Generator | None = None
    ) -> AttackedPrompt:
        """Attack the batch. Raises: RuntimeError in inference mode, ValueError without texts."""
        require_gradients(self)
        rngs = example_rngs(batch, rng)
        with model.frozen():
            search = SuffixSearch(
                model, batch, self.num_tokens, self.init, None, self.target_tokens, place=self.place
            )
            allowed = typable_tokens(model.chat, embedding_weight(model).shape[0], self.ascii_only)
            base = search.start
            for _ in range(self.num_steps):
                base = self._step(search, base, rngs, allowed.to(base.device))
            return search.result()

    def _step(
        self,
        search: SuffixSearch,
        base: Int[Tensor, "batch suffix"],
        rngs: list[torch.Generator],
        allowed: Bool[Tensor, " vocabulary"],
    ) -> Int[Tensor, "batch suffix"]:
        """One step of all behaviours; returns their next suffixes, which may be the present ones: both meet
        the same draws."""
        rows = list(range(len(base)))
        index = torch.tensor(rows, device=base.device)
        _, gradient = search.gradient(index, base, _mean)
        top = promising(search.model, gradient, base, allowed, self.topk).cpu()
        typable = allowed.nonzero().squeeze(1).cpu()
        present = base.cpu()

        def draw(row: int) -> list[list[int]]:
            blind = round(self.random_share * self.width)
            swaps = draw_swaps(present[row], top[row], self.width, 1, rngs[row])
            anything = typable[None].expand(present.shape[1], -1)
            swaps[:blind] = draw_swaps(present[row], anything, self.width, 1, rngs[row])[:blind]
            return swaps.tolist()

        owners, drawn = search.typable(rows, self.width, draw)
        owners = [*rows, *owners]
        candidates = [*present.tolist(), *drawn.tolist()]
        seeds = [draw_seed(own) for own in rngs]
        losses = self.losses(search, owners, candidates, seeds)
        best = {row: row for row in rows}
        for i in range(len(rows), len(owners)):
            if losses[i] < losses[best[owners[i]]]:
                best[owners[i]] = i
        chosen = [candidates[best[row]] for row in rows]
        search.ledger.record(rows, chosen, losses[[best[row] for row in rows]])
        for row in rows:
            # The latest, not the luckiest: losses of other draws do not compare.
            search.ledger.keep(row, chosen[row], float(losses[best[row]]))
        return torch.tensor(chosen, device=base.device)

    def losses(
        self,
        search: SuffixSearch,
        owners: Sequence[int],
        candidates: Sequence[list[int]],
        seeds: Sequence[int],
    ) -> Float[Tensor, " row"]:
        """Expected losses behind the defence, with the filter's penalty.

        Args:
            owners: the behaviour of each candidate.
            candidates: suffixes that can be typed.
            seeds: of the draws of each behaviour.
        """
        requests, defence = _requests(search, owners, candidates), self.defence or Unguarded()
        model, flat, owner = search.model, list[Request](), list[int]()
        for row in dict.fromkeys(owners):
            own = [i for i, other in enumerate(owners) if other == row]
            seen = defence.seen_through(model, [requests[i] for i in own], self.num_draws, seeds[row])
            for i, draws in zip(own, seen, strict=True):
                flat += draws
                owner += [i] * len(draws)
        index = torch.tensor([owners[i] for i in owner], device=search.target.ids.device)
        search.ledger.count_forward(index)
        target = Reply(search.target.ids[index], search.target.mask[index])
        found = reply_losses(model, flat, target)
        place = torch.tensor(owner)
        losses = torch.zeros(len(owners), dtype=found.dtype).index_add(0, place, found)
        losses /= torch.bincount(place, minlength=len(owners))
        wanted = [search.batch.targets[row] for row in owners]
        excesses = defence.excesses(model, requests, wanted) if self.penalty else None
        if excesses is not None:
            losses += self.penalty * torch.tensor(excesses, dtype=losses.dtype).clamp_min(0)
        return losses


def _requests(search: SuffixSearch, owners: Sequence[int], candidates: Sequence[list[int]]) -> list[Request]:
    """Candidates as a user types them."""
    texts = search.texts(owners, candidates)
    found = []
    for row, text in zip(owners, texts, strict=True):
        slot = search.slots[row]
        typed, around = slot.user + (text or "") + slot.rest, slot.envelope
        found.append(
            Request(typed, around.system, data=around.document)
            if around.instruction is None
            else Request(around.instruction, around.system, data=typed)
        )
    return found


def _mean(losses: Float[Tensor, "row reply"], mask: Bool[Tensor, "row reply"]) -> Float[Tensor, " row"]:
    """The mean of token losses, which a suffix search descends."""
    return mean_cross_entropy(-losses, mask)


class Unguarded:
    """No defence: the request itself, and nothing is stopped."""

    def seen_through(
        self, model: LanguageModel, requests: Sequence[Request], draws: int, seed: int
    ) -> list[list[Request]]:
        return [[request] for request in requests]

    def excesses(
        self, model: LanguageModel, requests: Sequence[Request], replies: Sequence[str]
    ) -> list[float] | None:
        return None
