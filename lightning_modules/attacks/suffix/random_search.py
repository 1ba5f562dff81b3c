"""Simple adaptive attack: random search on a suffix for the target's first token (Andriushchenko et al. 2024,
arXiv 2404.02151)."""

from __future__ import annotations

import math
from dataclasses import replace

import torch
from jaxtyping import Int
from torch import Tensor

from datamodules.batch import AdversarialBatch
from datamodules.fields import Count, Share, checked
from lightning_modules.attacks.base import AttackedPrompt, example_rngs, require_texts
from lightning_modules.attacks.suffix.search import SuffixSearch, best_by_owner
from lightning_modules.attacks.suffix.slots import typable_tokens
from lightning_modules.attacks.text.templates import fill
from lightning_modules.models.embeddings import embedding_weight
from lightning_modules.models.language_model import LanguageModel


@checked
class RandomSearch:
    """Replaces a random block of suffix tokens and keeps the change if the target's first token became more
    likely.

    Losses and curves of this attack are those of the target's first `target_tokens` tokens.

    Args:
        template: text around the request, with {prompt} and optionally {target}; the suffix follows it.
        num_tokens: length of the suffix.
        init: text repeated to make the initial suffix.
        num_steps: number of proposals.
        block: positions replaced at once in the beginning; it shrinks to 1 as the target becomes likely.
        width: proposals per step, of which the best counts; 1 is the published algorithm.
        target_tokens: how many of the target's first tokens are made likely.
        stop_probability: leave a behaviour once these tokens have this mean probability; null searches on
            until greedy decoding says the target's first sentence, which is what an evaluation of greedy
            replies counts. A sampled evaluation may take the published 0.1.
        ascii_only: use only tokens of printable ASCII.
        max_rows: candidates per forward pass; null takes 64 on a CPU and 512 elsewhere; halved and remembered
            when memory runs out.
    """

    def __init__(
        self,
        template: str = "{prompt}",
        num_tokens: Count = 25,
        init: str = " !",
        num_steps: Count = 10_000,
        block: Count = 4,
        width: Count = 1,
        target_tokens: Count = 1,
        stop_probability: Share | None = None,
        ascii_only: bool = True,
        max_rows: Count | None = None,
    ) -> None:
        if "{prompt}" not in template:
            raise ValueError(f"RandomSearch.template: expected {{prompt}} in it, got {template[:60]!r}")
        if block > num_tokens:
            raise ValueError(f"RandomSearch.block: expected at most num_tokens {num_tokens}, got {block}")
        self.template = template
        self.num_tokens = num_tokens
        self.init = init
        self.num_steps = num_steps
        self.block = block
        self.width = width
        self.target_tokens = target_tokens
        self.stop_probability = stop_probability
        self.ascii_only = ascii_only
        self.max_rows = max_rows

    def __call__(
        self, model: LanguageModel, batch: AdversarialBatch, rng: torch.Generator | None = None
    ) -> AttackedPrompt:
        """Attack the batch. Raises: ValueError without texts."""
        require_texts(batch)
        wrapped = (fill(self.template, p, t) for p, t in zip(batch.prompts, batch.targets, strict=True))
        batch = replace(batch, prompts=tuple(wrapped))
        with model.frozen():
            search = SuffixSearch(model, batch, self.num_tokens, self.init, self.max_rows, self.target_tokens)
            rngs = example_rngs(batch, rng)
            tokens = (
                typable_tokens(model.chat, embedding_weight(model).shape[0], self.ascii_only)
                .nonzero()
                .squeeze(1)
            )
            started = search.record_start()
            done = set(search.reached(started)) | self._likely(search, started)
            active = [row for row in started if row not in done]
            for _ in range(self.num_steps):
                if not active:
                    break
                active = self._step(search, active, rngs, tokens)
            return search.result()

    def _step(
        self,
        search: SuffixSearch,
        active: list[int],
        rngs: list[torch.Generator],
        tokens: Int[Tensor, " choice"],
    ) -> list[int]:
        def propose(row: int) -> list[list[int]]:
            block = self._block(float(search.ledger.best_loss[row]))
            return [
                replace_block(search.ledger.best[row], block, tokens, rngs[row]) for _ in range(self.width)
            ]

        owners, candidates = search.typable(active, self.width, propose)
        if not owners:
            return active
        index = torch.tensor(owners, device=search.start.device)
        losses, could = search.scores(index, candidates.to(index.device))
        means = search.mean(index, losses).cpu()
        best = best_by_owner(owners, means)
        improved = search.ledger.record(
            list(best), [candidates[i].tolist() for i in best.values()], means[list(best.values())]
        )
        done = search.finish(owners, candidates, could.cpu(), means) | self._likely(search, improved)
        return [row for row in active if row not in done]

    def _likely(self, search: SuffixSearch, rows: list[int]) -> set[int]:
        """Rows that the probability trigger stops."""
        if self.stop_probability is None:
            return set()
        return {row for row in rows if search.ledger.best_loss[row] <= -math.log(self.stop_probability)}

    def _block(self, loss: float) -> int:
        """Block length by the target's mean probability: full below 1 %, halved below 5 %, then single
        tokens."""
        if loss > -math.log(0.01):
            return self.block
        return max(1, self.block // 2) if loss > -math.log(0.05) else 1


def replace_block(
    suffix: list[int], block: int, tokens: Int[Tensor, " choice"], rng: torch.Generator
) -> list[int]:
    """The suffix with `block` consecutive positions set to random tokens."""
    start = int(torch.randint(0, len(suffix) - block + 1, (1,), generator=rng))
    new = tokens[torch.randint(0, len(tokens), (block,), generator=rng)].tolist()
    return [*suffix[:start], *new, *suffix[start + block :]]
