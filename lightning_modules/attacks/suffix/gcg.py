"""Greedy Coordinate Gradient (Zou et al. 2023, arXiv 2307.15043, algorithm 1): a suffix of real tokens found
by swaps.

each step: gradient of the loss in the suffix's one-hot coordinates -> the topk most promising tokens per
    position
           -> `width` random swaps among them -> the best of those is the next suffix
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from functools import partial

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from datamodules.batch import AdversarialBatch
from datamodules.fields import Count, NonNegativeInt, Positive, checked
from lightning_modules.attacks.base import (
    AttackedPrompt,
    example_rngs,
    require_gradients,
)
from lightning_modules.attacks.suffix.probe import ProbeSampling
from lightning_modules.attacks.suffix.search import SuffixSearch, best_by_owner
from lightning_modules.attacks.suffix.slots import Placement, typable_tokens
from lightning_modules.models.embeddings import embedding_table, embedding_weight
from lightning_modules.models.language_model import LanguageModel
from lightning_modules.models.likelihood import mean_cross_entropy, mellowmax


@checked
class GCG:
    """GCG over all behaviours of a batch at once.

    Args:
        num_tokens: length of the suffix.
        place: where its tokens stand, seen from the request: after, before, or around it (half on each side).
        init: text repeated to make the initial suffix.
        num_steps: number of steps.
        width: candidates per step and behaviour; each of them can be typed.
        topk: tokens per position that the gradient proposes.
        n_replace: positions swapped in one candidate.
        merge: further candidates per step: the best two swaps together, the best three, ... (I-GCG's
            multi-coordinate update, arXiv 2405.21018); 0 for none.
        buffer_size: suffixes kept; each step starts from the best of them. 0 always goes on from the step's
            best candidate.
        mellowmax_alpha: steer by the mellowmax of the target's token losses with this temperature instead of
            by their mean.
        target_tokens: search for the target's first so many tokens only; null for all but its end of turn.
        stop_at_target: a behaviour leaves the batch, with that suffix, once any candidate (or the suffix that
            it starts from) makes greedy decoding say the target's first sentence, as the judge of target
            prefixes counts it; whatever tokens are searched for.
        ascii_only: use only tokens of printable ASCII.
        probe: let a small draft model choose which candidates this model reads (probe sampling); null reads
            all. Passes are counted of the model, not of the draft.
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
        n_replace: Count = 1,
        merge: NonNegativeInt = 0,
        buffer_size: NonNegativeInt = 0,
        mellowmax_alpha: Positive | None = None,
        target_tokens: Count | None = None,
        stop_at_target: bool = True,
        ascii_only: bool = True,
        probe: ProbeSampling | None = None,
        max_rows: Count | None = None,
    ) -> None:
        if n_replace > num_tokens:
            raise ValueError(f"GCG.n_replace: expected at most num_tokens {num_tokens}, got {n_replace}")
        if place == "around" and num_tokens == 1:
            raise ValueError("GCG.num_tokens: expected at least 2 to stand around the request, got 1")
        self.num_tokens = num_tokens
        self.place: Placement = place
        self.init = init
        self.num_steps = num_steps
        self.width = width
        self.topk = topk
        self.n_replace = n_replace
        self.merge = merge
        self.buffer_size = buffer_size
        self.mellowmax_alpha = mellowmax_alpha
        self.target_tokens = target_tokens
        self.stop_at_target = stop_at_target
        self.ascii_only = ascii_only
        self.probe = probe
        self.max_rows = max_rows

    def __call__(
        self, model: LanguageModel, batch: AdversarialBatch, rng: torch.Generator | None = None
    ) -> AttackedPrompt:
        """Attack the batch towards its harmful targets. Raises: RuntimeError in inference mode, ValueError
        without texts."""
        return self.go_on(model, batch, [None] * len(batch), rng)[0]

    def go_on(
        self,
        model: LanguageModel,
        batch: AdversarialBatch,
        suffixes: Sequence[list[int] | None],
        rng: torch.Generator | None = None,
    ) -> tuple[AttackedPrompt, list[list[int]]]:
        """The same from given suffixes on, None for the initial one; returns the ids of the suffixes found,
        too."""
        require_gradients(self)
        with model.frozen():
            search = self._search(model, batch)
            draft = None if self.probe is None else self._search(self.probe.model(model), batch)
            search.start_from(suffixes)
            rngs = example_rngs(batch, rng)
            typable = typable_tokens(model.chat, embedding_weight(model).shape[0], self.ascii_only)
            allowed, choices = typable.to(model.device), min(self.topk, int(typable.sum()) - 1)
            pools = [_Pool(self.buffer_size) for _ in search.slots]
            active = list(range(len(batch)))
            for step in range(self.num_steps):
                active = self._step(search, draft, active, pools, rngs, allowed, choices, first=step == 0)
                if not active:
                    break
            return search.result(), search.ledger.best

    def likeliest(
        self, model: LanguageModel, batch: AdversarialBatch, starts: Sequence[list[int]]
    ) -> tuple[list[list[int] | None], Int[Tensor, " batch"]]:
        """Each behaviour's likeliest start of several, None where none can be typed, and the forward passes
        that this cost."""
        with model.frozen():
            search = self._search(model, batch)
            flat = [(row, list(start)) for row in range(len(batch)) for start in starts]
            texts = search.texts([row for row, _ in flat], [start for _, start in flat])
            flat = [entry for entry, text in zip(flat, texts, strict=True) if text is not None]
            chosen: list[list[int] | None] = [None] * len(batch)
            if flat:
                owners, device = [row for row, _ in flat], search.start.device
                index = torch.tensor(owners, device=device)
                suffixes = torch.tensor([start for _, start in flat], device=device)
                scores = self._objective(search.losses(index, suffixes), search.target.mask[index])
                for row, i in best_by_owner(owners, scores.cpu()).items():
                    chosen[row] = flat[i][1]
            return chosen, search.ledger.forward_passes.to(batch.prompt_ids.device)

    def _search(self, model: LanguageModel, batch: AdversarialBatch) -> SuffixSearch:
        limits = self.max_rows, self.target_tokens
        return SuffixSearch(model, batch, self.num_tokens, self.init, *limits, place=self.place)

    def _step(
        self,
        search: SuffixSearch,
        draft: SuffixSearch | None,
        active: list[int],
        pools: list[_Pool],
        rngs: list[torch.Generator],
        allowed: Bool[Tensor, " vocabulary"],
        choices: int,
        first: bool,
    ) -> list[int]:
        """One step of all active behaviours; returns those that go on."""
        # Suffixes and what is drawn from them are on the host, where it is seen what can be typed. The host
        # waits twice: for what the gradient proposes, and for what was found of the candidates.
        starts = [search.ledger.best[row] if first else pools[row].base for row in active]
        rows, base = torch.tensor(active), torch.tensor(starts)
        present = base.to(allowed.device)
        losses, gradient = search.gradient(rows, present, self._objective)
        if first:
            initial = self._objective(losses, search.target.mask[rows]).tolist()
            for row, suffix, value in zip(active, starts, initial, strict=True):
                pools[row].add(suffix, value)
            search.ledger.record(active, starts, search.mean(rows, losses))
        top = promising(search.model, gradient, present, allowed, choices).cpu()
        swaps = dict(zip(active, zip(base, top, strict=True), strict=True))
        owners, candidates = search.typable(
            active,
            self.width,
            lambda row: draw_swaps(*swaps[row], self.width, self.n_replace, rngs[row]).tolist(),
        )
        done = set(search.reached(active)) if first and self.stop_at_target else set()
        if not owners:
            return [row for row in active if row not in done]
        if self.probe is None or draft is None:
            tried = self._tried(search, owners, candidates, active, base)
        else:
            scores = self._tried(draft, owners, candidates, active, base).scores
            tried = self.probe.read(
                scores,
                owners,
                rngs,
                lambda own: self._tried(search, [owners[i] for i in own], candidates[own], active, base),
            )
        if self.merge:
            tried = tried.joined(self._merged(search, tried, active, base))
        best = best_by_owner(tried.owners, tried.scores)
        chosen = {row: tried.candidates[i].tolist() for row, i in best.items()}
        kept = {row: search.ledger.best[row] for row in done}
        for row, i in best.items():
            pools[row].add(chosen[row], float(tried.scores[i]))
        search.ledger.record(list(best), list(chosen.values()), tried.means[list(best.values())])
        for row, suffix in kept.items():
            # It said the target from the start: a lower loss is no reason to leave that.
            search.ledger.best[row] = suffix
        if self.stop_at_target:
            done |= search.finish(tried.owners, tried.candidates, tried.could, tried.means)
        return [row for row in active if row not in done]

    def _tried(
        self,
        search: SuffixSearch,
        owners: list[int],
        candidates: Int[Tensor, "row suffix"],
        active: list[int],
        base: Int[Tensor, "active suffix"],
    ) -> _Tried:
        """Score candidates that were made from their behaviours' bases."""
        index = torch.tensor(owners)
        losses, could = search.scores_of_changes(index, candidates, active, base)
        scores, means = self._objective(losses, search.target.mask[index]), search.mean(index, losses)
        # One copy to the host, which waits for it.
        scores, means, told = torch.stack([scores, means, could.to(scores)]).cpu()
        return _Tried(owners, candidates, scores, means, told.bool())

    def _merged(
        self, search: SuffixSearch, tried: _Tried, active: list[int], base: Int[Tensor, "active suffix"]
    ) -> _Tried | None:
        """The best swaps of each behaviour put together one by one, as far as they can be typed."""
        order = tried.scores.argsort(stable=True).tolist()
        flat: list[tuple[int, list[int]]] = []
        for row, start in zip(active, base, strict=True):
            merged = start.clone()
            for number, i in enumerate([i for i in order if tried.owners[i] == row][: self.merge + 1]):
                changed = tried.candidates[i] != start
                merged[changed] = tried.candidates[i][changed]
                if number:
                    flat.append((row, merged.tolist()))
        texts = search.texts([row for row, _ in flat], [suffix for _, suffix in flat])
        flat = [entry for entry, text in zip(flat, texts, strict=True) if text is not None]
        if not flat:
            return None
        owners = [row for row, _ in flat]
        return self._tried(search, owners, torch.tensor([suffix for _, suffix in flat]), active, base)

    @property
    def _objective(self) -> partial[Tensor]:
        if self.mellowmax_alpha is None:
            return partial(_mean)
        return partial(mellowmax, alpha=self.mellowmax_alpha)


@dataclass(frozen=True)
class _Tried:
    """Candidates with what was found of them, on the CPU."""

    owners: list[int]
    """The behaviour of each."""
    candidates: Int[Tensor, "row suffix"]
    scores: Float[Tensor, " row"]
    """What the search minimises."""
    means: Float[Tensor, " row"]
    """Attacked losses."""
    could: Bool[Tensor, " row"]
    """Whether greedy decoding may say the target."""

    def joined(self, other: _Tried | None) -> _Tried:
        if other is None:
            return self
        pairs = (
            (getattr(self, name), getattr(other, name)) for name in ("candidates", "scores", "means", "could")
        )
        return _Tried(self.owners + other.owners, *(torch.cat(pair) for pair in pairs))


@dataclass
class _Pool:
    """The best suffixes of a behaviour by objective; size 0 holds the latest only."""

    size: int
    entries: list[tuple[float, list[int]]] = field(default_factory=list)

    @property
    def base(self) -> list[int]:
        return self.entries[0][1]

    def add(self, suffix: list[int], score: float) -> None:
        if self.size == 0:
            self.entries = [(score, suffix)]
        else:
            self.entries = sorted([*self.entries, (score, suffix)], key=lambda entry: entry[0])[: self.size]


def promising(
    model: LanguageModel,
    gradient: Float[Tensor, "active suffix dim"],
    base: Int[Tensor, "active suffix"],
    allowed: Bool[Tensor, " vocabulary"],
    choices: int,
) -> Int[Tensor, "active suffix choice"]:
    """Tokens whose one-hot coordinate has the most negative gradient, among allowed ones other than the
    present: so many for a position, fewer than are allowed."""
    tops = []
    table = embedding_table(model)
    # One behaviour at a time: the whole vocabulary's scores at every position of all of them may not fit.
    for slope, present in zip(gradient, base, strict=True):
        scores = (slope.to(table.dtype) @ table.T).masked_fill(~allowed, torch.inf)
        scores.scatter_(1, present[:, None], torch.inf)
        tops.append(scores.topk(choices, dim=1, largest=False).indices)
    return torch.stack(tops)


def draw_swaps(
    base: Int[Tensor, " suffix"],
    top: Int[Tensor, "suffix choice"],
    width: int,
    n_replace: int,
    rng: torch.Generator,
) -> Int[Tensor, "width suffix"]:
    """Copies of a suffix with `n_replace` random positions set to random ones of their proposed tokens."""
    # Positions at random, as in nanoGCG; the first published code spreads candidates evenly over them.
    where = torch.rand(width, len(base), generator=rng).argsort(1)[:, :n_replace]
    which = torch.randint(0, top.shape[1], (width, n_replace), generator=rng)
    return base.repeat(width, 1).scatter(1, where, top[where, which])


def _mean(losses: Float[Tensor, "row reply"], mask: Bool[Tensor, "row reply"]) -> Float[Tensor, " row"]:
    return mean_cross_entropy(-losses, mask)
