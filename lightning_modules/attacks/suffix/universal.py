"""One suffix for many requests (Zou et al. 2023, arXiv 2307.15043, algorithm 2)."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from jaxtyping import Bool, Float
from torch import Tensor

from datamodules.batch import AdversarialBatch
from datamodules.fields import Count, NonNegativeInt, checked
from lightning_modules.attacks.base import AttackedPrompt, require_gradients
from lightning_modules.attacks.suffix.gcg import draw_swaps, promising
from lightning_modules.attacks.suffix.search import SuffixSearch
from lightning_modules.attacks.suffix.slots import Placement, typable_tokens
from lightning_modules.models.embeddings import embedding_weight
from lightning_modules.models.language_model import LanguageModel
from lightning_modules.models.likelihood import mean_cross_entropy


@checked
class UniversalSuffix:
    """GCG on the sum of the requests' losses: the same tokens for the whole batch, found jointly.

    Requests join one by one, each once those before say their targets, as published. The suffix that makes
    most requests say theirs is the result, of equal ones the one with the lower mean loss. How it does on
    requests that it was not made for is asked with TransferSuffixes (`whose: others`).

    Args:
        num_tokens: length of the suffix.
        place: where it stands, seen from the request.
        init: text repeated to make the initial suffix.
        num_steps: number of steps; a candidate costs one forward pass per request that has joined.
        width: candidates per step.
        topk: tokens per position that the gradient proposes.
        join_every: a further request joins after so many steps in any case; 0 waits for success.
        target_tokens: search for the targets' first so many tokens only; null for all but the end of turn.
        ascii_only: use only tokens of printable ASCII.
        max_rows: candidates per forward pass; null takes 64 on a CPU and 512 elsewhere; halved and remembered
            when memory runs out.
    """

    def __init__(
        self,
        num_tokens: Count = 20,
        place: Placement = "after",
        init: str = " x",
        num_steps: Count = 500,
        width: Count = 512,
        topk: Count = 256,
        join_every: NonNegativeInt = 10,
        target_tokens: Count | None = None,
        ascii_only: bool = True,
        max_rows: Count | None = None,
    ) -> None:
        self.num_tokens = num_tokens
        self.place: Placement = place
        self.init = init
        self.num_steps = num_steps
        self.width = width
        self.topk = topk
        self.join_every = join_every
        self.target_tokens = target_tokens
        self.ascii_only = ascii_only
        self.max_rows = max_rows

    def __call__(
        self, model: LanguageModel, batch: AdversarialBatch, rng: torch.Generator | None = None
    ) -> AttackedPrompt:
        """Attack the batch with one suffix. Raises: RuntimeError in inference mode, ValueError without texts,
        or where no initial suffix can be typed at all requests."""
        require_gradients(self)
        rng = rng or torch.Generator().manual_seed(0)
        with model.frozen():
            search = SuffixSearch(
                model, batch, self.num_tokens, self.init, self.max_rows, self.target_tokens, place=self.place
            )
            vocabulary = embedding_weight(model).shape[0]
            allowed = typable_tokens(model.chat, vocabulary, self.ascii_only).to(model.device)
            suffix = self._common_start(search)
            best = (-1, 0.0, suffix)
            joined, since = 1, 0
            for step in range(self.num_steps):
                suffix = self._step(search, suffix, joined, allowed, rng, first=step == 0)
                # The curve is that of the common suffix: every request's loss under it.
                hits, means = self._tried_on_all(search, suffix)
                best = max(best, (sum(hits), -float(means.mean()), suffix))
                if all(hits):
                    break
                since += 1
                if joined < len(batch) and (all(hits[:joined]) or since == self.join_every):
                    joined, since = joined + 1, 0
            _, means = self._tried_on_all(search, best[2], enter=False)
            for row in range(len(batch)):
                search.ledger.keep(row, list(best[2]), float(means[row]))
            return search.result()

    def _common_start(self, search: SuffixSearch) -> list[int]:
        """An initial suffix of one request that can be typed at all of them."""
        for slot in search.slots:
            if self._typable(search, [slot.suffix])[0]:
                return slot.suffix
        raise ValueError(
            f"UniversalSuffix.init: {self.init!r} gives no suffix of {self.num_tokens} tokens that can be "
            "typed at all requests; set another text"
        )

    def _typable(self, search: SuffixSearch, suffixes: Sequence[list[int]]) -> list[bool]:
        """Whether each can be typed at every request of the batch."""
        size = len(search.slots)
        texts = search.texts(list(range(size)) * len(suffixes), [s for s in suffixes for _ in range(size)])
        return [None not in texts[i : i + size] for i in range(0, len(texts), size)]

    def _step(
        self,
        search: SuffixSearch,
        suffix: list[int],
        joined: int,
        allowed: Bool[Tensor, " vocabulary"],
        rng: torch.Generator,
        first: bool,
    ) -> list[int]:
        """The best of the step's candidates by the sum over the requests that have joined."""
        rows = torch.arange(joined, device=allowed.device)
        base = torch.tensor([suffix] * joined, device=allowed.device)
        _, gradient = search.gradient(rows, base, _mean)
        # Requests count alike, however steep they are.
        steepness = gradient.flatten(1).norm(dim=1).clamp_min(1e-30)[:, None, None]
        whole = (gradient / steepness).sum(0, keepdim=True)
        if first:
            start = torch.arange(len(search.slots), device=allowed.device)
            everywhere = torch.tensor([suffix] * len(start), device=allowed.device)
            means = search.mean(start, search.losses(start, everywhere))
            search.ledger.record(start.tolist(), everywhere.tolist(), means)
        top = promising(search.model, whole, base[:1], allowed, min(self.topk, int(allowed.sum()) - 1))[0]
        drawn = draw_swaps(base[0].cpu(), top.cpu(), self.width, 1, rng).tolist()
        drawn = [s for s, fits in zip(drawn, self._typable(search, drawn), strict=True) if fits]
        if not drawn:
            return suffix
        owners = rows.repeat_interleave(len(drawn))
        candidates = torch.tensor(drawn, device=allowed.device).repeat(joined, 1)
        found, _ = search.scores_of_changes(owners, candidates, rows.tolist(), base)
        sums = search.mean(owners, found).view(joined, -1).sum(0)
        return drawn[int(sums.argmin())]

    def _tried_on_all(
        self, search: SuffixSearch, suffix: list[int], enter: bool = True
    ) -> tuple[list[bool], Float[Tensor, " batch"]]:
        """Which of all requests say their target with this suffix, and all their losses."""
        rows = list(range(len(search.slots)))
        index = torch.tensor(rows, device=search.start.device)
        everywhere = torch.tensor([suffix] * len(rows), device=index.device)
        losses, could = search.scores(index, everywhere)
        means = search.mean(index, losses).cpu()
        if enter:
            search.ledger.record(rows, everywhere.tolist(), means)
        hits = [False] * len(rows)
        plausible = [row for row in rows if could[row]]
        for row, hit in zip(plausible, search.saying(plausible, [suffix] * len(plausible)), strict=True):
            hits[row] = hit
        return hits, means


def _mean(losses: Float[Tensor, "row reply"], mask: Bool[Tensor, "row reply"]) -> Float[Tensor, " row"]:
    return mean_cross_entropy(-losses, mask)
