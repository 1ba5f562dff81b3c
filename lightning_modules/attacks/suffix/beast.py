"""BEAST: beam search over what the model itself would write next, scored by the target's loss (Sadasivan et
al. 2024, arXiv 2402.15570)."""

from __future__ import annotations

import torch
from jaxtyping import Bool
from torch import Tensor

from datamodules.batch import AdversarialBatch
from datamodules.fields import Count, Positive, checked
from lightning_modules.attacks.base import AttackedPrompt, example_rngs
from lightning_modules.attacks.suffix.search import SuffixSearch
from lightning_modules.attacks.suffix.slots import typable_tokens
from lightning_modules.models.embeddings import embedding_weight
from lightning_modules.models.language_model import LanguageModel


@checked
class BEAST:
    """Grows a fluent suffix token by token; needs no gradient.

    Args:
        num_tokens: length of the suffix.
        beams: suffixes kept after every token.
        samples: next tokens sampled for each of them.
        temperature: temperature of the sampling.
        stop_at_target: a behaviour whose greedy reply begins with the target is done.
        ascii_only: use only tokens of printable ASCII.
        max_rows: candidates per forward pass; null takes 64 on a CPU and 512 elsewhere; halved and remembered
            when memory runs out.
    """

    def __init__(
        self,
        num_tokens: Count = 40,
        beams: Count = 15,
        samples: Count = 15,
        temperature: Positive = 1.0,
        stop_at_target: bool = True,
        ascii_only: bool = True,
        max_rows: Count | None = None,
    ) -> None:
        self.num_tokens = num_tokens
        self.beams = beams
        self.samples = samples
        self.temperature = temperature
        self.stop_at_target = stop_at_target
        self.ascii_only = ascii_only
        self.max_rows = max_rows

    def __call__(
        self, model: LanguageModel, batch: AdversarialBatch, rng: torch.Generator | None = None
    ) -> AttackedPrompt:
        """Attack the batch. Raises: ValueError without texts."""
        with model.frozen():
            # The beams start from nothing: " x" only finds the place after the request.
            search = SuffixSearch(model, batch, 1, " x", self.max_rows, lead=1)
            allowed = typable_tokens(model.chat, embedding_weight(model).shape[0], self.ascii_only)
            rngs = example_rngs(batch, rng)
            search.record_start()
            beams: dict[int, list[list[int]]] = {row: [[]] for row in range(len(batch))}
            for _ in range(self.num_tokens):
                if not beams:
                    break
                beams = self._grow(search, beams, allowed, rngs)
            return search.result()

    def _grow(
        self,
        search: SuffixSearch,
        beams: dict[int, list[list[int]]],
        allowed: Bool[Tensor, " vocabulary"],
        rngs: list[torch.Generator],
    ) -> dict[int, list[list[int]]]:
        """One more token for every beam; returns the beams that go on."""
        flat = [(row, suffix) for row, suffixes in beams.items() for suffix in suffixes]
        owners = torch.tensor([row for row, _ in flat], device=search.start.device)
        suffixes = torch.tensor([suffix for _, suffix in flat], dtype=torch.long, device=owners.device)
        logits = search.chunked(search.next_token_logits, owners, suffixes).cpu() / self.temperature
        chances = logits.masked_fill(~allowed, -torch.inf).softmax(1)
        grown = []
        for (row, suffix), chance in zip(flat, chances, strict=True):
            count = min(self.samples, int((chance > 0).sum()))
            picked = torch.multinomial(chance, count, generator=rngs[row]).tolist() if count else []
            grown += [(row, [*suffix, token]) for token in picked]
        texts = search.texts([row for row, _ in grown], [suffix for _, suffix in grown])
        grown = [entry for entry, text in zip(grown, texts, strict=True) if text is not None]
        if not grown:
            return {}
        index = torch.tensor([row for row, _ in grown], device=owners.device)
        candidates = torch.tensor([suffix for _, suffix in grown], device=owners.device)
        means = search.mean(index, search.losses(index, candidates)).cpu()
        order = means.argsort(stable=True).tolist()
        kept: dict[int, list[int]] = {}
        for i in order:
            kept.setdefault(grown[i][0], []).append(i)
        best = {row: places[0] for row, places in kept.items()}
        improved = search.ledger.record(
            list(best), [grown[i][1] for i in best.values()], means[list(best.values())]
        )
        done = set(search.reached(improved)) if self.stop_at_target else set()
        return {
            row: [grown[i][1] for i in places[: self.beams]]
            for row, places in sorted(kept.items())
            if row not in done
        }
