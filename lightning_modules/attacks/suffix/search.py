"""What searches over suffix tokens share: target losses of many candidates, the best so far, and what it all
cost.

Behaviours advance together: candidates of all of them fill one batch.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from datamodules.batch import AdversarialBatch, pad
from lightning_modules.attacks.base import AttackedPrompt, require_texts
from lightning_modules.attacks.chunks import Chunked
from lightning_modules.attacks.ledger import CandidateLedger
from lightning_modules.attacks.suffix.frames import Frames
from lightning_modules.attacks.suffix.slots import (
    Placement,
    counted_mask,
    make_slot,
    replayable,
    without_end_of_turn,
)
from lightning_modules.models.language_model import LanguageModel
from lightning_modules.models.likelihood import mean_cross_entropy
from lightning_modules.models.logits import replies_greedily
from lightning_modules.models.reply import Reply

GROUP = 6
"""Forward passes' worth of candidates whose order is by position alone."""
DRAWS = 4
"""Rounds of drawing candidates until enough of them can be typed; some tokenizers never give enough."""
CHECKED = 4
"""Candidates of a behaviour whose greedy reply is looked at together, of those that could say the target: the
likeliest first, further ones while none says it. A look costs a forward pass, and the likeliest candidate may
miss a target that another one says."""
TokenLoss = Callable[[Float[Tensor, "row reply"], Bool[Tensor, "row reply"]], Float[Tensor, " row"]]
"""Token losses and their mask -> what a search minimises."""


class SuffixSearch:
    """Prompts with a suffix each, during one attack. The model must be frozen meanwhile.

    Args:
        model: the model under attack, with its chat format.
        batch: prompts and targets as text and as ids.
        num_tokens: tokens of the initial suffix.
        init: text repeated to make the initial suffix.
        max_rows: candidates per forward pass to start with.
        target_tokens: score only the target's first so many tokens; None scores all but its end of turn.
        lead: tokens before the suffix that every candidate computes again; 1 lets an empty suffix have a next
            token.
        place: where the free tokens stand, seen from the request.
    """

    def __init__(
        self,
        model: LanguageModel,
        batch: AdversarialBatch,
        num_tokens: int,
        init: str,
        max_rows: int | None,
        target_tokens: int | None = None,
        lead: int = 0,
        place: Placement = "after",
    ) -> None:
        require_texts(batch)
        self.model, self.batch, self.chat = model, batch, model.chat
        self.slots = [
            make_slot(self.chat, prompt, batch.envelope(row), init, num_tokens, place)
            for row, prompt in enumerate(batch.prompts)
        ]
        device = batch.harmful_ids.device
        mask = without_end_of_turn(batch.harmful_ids, batch.harmful_mask, self.chat.end_of_turn)
        said = counted_mask(self.chat, batch.harmful_ids, mask, batch.targets)
        said = said[:, : int(said.sum(1).max())]
        self.counted = Reply(batch.harmful_ids[:, : said.shape[1]], said)
        mask = mask[:, :target_tokens]
        lengths = tuple(mask.sum(1).tolist())
        self.target = Reply(batch.harmful_ids[:, : max(lengths)], mask[:, : max(lengths)], lengths)
        self.chunked = Chunked(max_rows, device)
        self.frames = Frames(model, self.slots, self.target, lead)
        self.start = torch.tensor([slot.suffix for slot in self.slots], device=device)
        self.ledger = CandidateLedger([slot.suffix for slot in self.slots], self.typed)

    def start_from(self, suffixes: Sequence[list[int] | None]) -> None:
        """Start from these suffixes, of the initial one's length; from the initial one where there is None or
        where it cannot be typed."""
        given = [
            row
            for row, suffix in enumerate(suffixes)
            if suffix is not None and len(suffix) == self.start.shape[1]
        ]
        for row, text in zip(given, self.texts(given, [suffixes[row] or [] for row in given]), strict=True):
            if text is not None:
                self.ledger.best[row] = list(suffixes[row] or [])
        self.start = torch.tensor(self.ledger.best, device=self.start.device)

    @torch.no_grad()
    def losses(
        self, rows: Int[Tensor, " row"], suffixes: Int[Tensor, "row suffix"]
    ) -> Float[Tensor, "row reply"]:
        """Negative log-likelihood of every target token, 0 outside the target.

        Args:
            rows: the behaviour of each candidate.
            suffixes: candidate suffixes.
        """
        self.ledger.count_forward(rows)
        return self.chunked(lambda r, s: self.frames.token_losses(r, s, self.model.embed(s)), rows, suffixes)

    @torch.no_grad()
    def scores(
        self, rows: Int[Tensor, " row"], suffixes: Int[Tensor, "row suffix"]
    ) -> tuple[Float[Tensor, "row reply"], Bool[Tensor, " row"]]:
        """Losses as above, and which candidates could make greedy decoding say the target: they do as far as
        the scored tokens go."""
        self.ledger.count_forward(rows)
        return self._read(rows, self.chunked(self.frames.token_scores, rows, suffixes))

    def _read(
        self, rows: Int[Tensor, " row"], found: Float[Tensor, "row reply 2"]
    ) -> tuple[Float[Tensor, "row reply"], Bool[Tensor, " row"]]:
        said, counted = found[..., 1].bool(), self.counted.mask[rows, : found.shape[1]]
        # Only the target's first sentence is asked for, as by the judge; more of it may be scored.
        said[:, : counted.shape[1]] |= ~counted
        said[:, counted.shape[1] :] = True
        return found[..., 0].contiguous(), said.all(1)

    def _order(self, rows: Int[Tensor, " row"], changed: Int[Tensor, " row"]) -> Int[Tensor, " row"]:
        """Order in which candidates share forward passes: alike in target length, then in where they first
        change.

        A pass starts at its first change and ends with its longest target, so both kinds of spread cost.
        Behaviours of like length form groups of some passes' worth of candidates, within which the order is
        by position.
        """
        lengths = torch.tensor(self.target.lengths)
        counts = torch.bincount(rows, minlength=len(lengths))
        by_length = lengths.argsort(stable=True)
        before = counts[by_length].cumsum(0) - counts[by_length]
        group = torch.empty_like(counts).index_copy(0, by_length, before // (GROUP * self.chunked.max_rows))
        return (group[rows] * (changed.max() + 1) + changed).argsort(stable=True)

    @torch.no_grad()
    def scores_of_changes(
        self,
        rows: Int[Tensor, " row"],
        suffixes: Int[Tensor, "row suffix"],
        active: Sequence[int],
        base: Int[Tensor, "active suffix"],
    ) -> tuple[Float[Tensor, "row reply"], Bool[Tensor, " row"]]:
        """As `scores`, for candidates that differ from a base in some positions: what stands before the first
        change is computed once.

        Args:
            rows: the behaviour of each candidate.
            suffixes: the candidates.
            active: the behaviours that have candidates.
            base: the suffixes that those were made from.

        Given on the host, where candidates are drawn, they wait for nothing.
        """
        host, device = torch.device("cpu"), self.start.device
        rows, suffixes, base = rows.to(host), suffixes.to(host), base.to(host)
        # A pass each, however much of it is shared: sharing saves time and not budget.
        self.ledger.count_forward(rows)
        own = torch.tensor(active)
        extended = self.frames.extended(own.to(device), base.to(device), active)
        place = torch.zeros(len(self.slots), dtype=torch.long).scatter(0, own, torch.arange(len(own)))
        first = (suffixes != base[place[rows]]).to(torch.uint8).argmax(1, keepdim=True)
        changed = self.frames.columns(rows, suffixes.shape[1]).gather(1, first).squeeze(1)
        order = self._order(rows, changed)
        given, cached = rows[order], place[rows[order]].to(device)
        found = self.chunked(
            lambda r, s, p, c, *names: self.frames.token_scores(r, s, extended, p, min(c), *names),
            given.to(device),
            suffixes[order].to(device),
            cached,
            changed[order].tolist(),
            given.tolist(),
            place[given].tolist(),
        )
        found = torch.empty_like(found).index_copy(0, order.to(device), found)
        return self._read(rows.to(device), found)

    def gradient(
        self, rows: Int[Tensor, " row"], suffixes: Int[Tensor, "row suffix"], objective: TokenLoss
    ) -> tuple[Float[Tensor, "row reply"], Float[Tensor, "row suffix dim"]]:
        """Token losses, and the gradient of each row's objective in its suffix embeddings. Rows that are on
        the host wait for nothing."""
        index = rows.to(suffixes.device)
        embeds = self.model.embed(suffixes).detach().requires_grad_()
        # Evaluations call from loops that run without gradients.
        with torch.enable_grad():
            losses = self.frames.token_losses(index, suffixes, embeds, names=rows.tolist())
            (gradient,) = torch.autograd.grad(objective(losses, self.target.mask[index]).sum(), embeds)
        self.ledger.count_forward(rows)
        self.ledger.count_backward(rows, gradient)
        return losses.detach(), gradient

    def next_token_logits(
        self, rows: Int[Tensor, " row"], suffixes: Int[Tensor, "row suffix"]
    ) -> Float[Tensor, "row vocabulary"]:
        """Logits of the token that the model itself would put after each unfinished suffix."""
        self.ledger.count_forward(rows)
        return self.frames.next_token_logits(rows, suffixes)

    def typable(
        self, active: Sequence[int], width: int, draw: Callable[[int], list[list[int]]]
    ) -> tuple[list[int], Int[Tensor, "row suffix"]]:
        """Draw candidates until each active behaviour has `width` that can be typed, in at most 4 rounds.

        Args:
            draw: behaviour -> candidates of one round.

        Returns: the behaviour of each candidate and the candidates, grouped by behaviour.
        """
        kept: dict[int, list[list[int]]] = {row: [] for row in active}
        for _ in range(DRAWS):
            drawn = [(row, suffix) for row in active if len(kept[row]) < width for suffix in draw(row)]
            if not drawn:
                break
            for (row, suffix), text in zip(
                drawn, self.texts([r for r, _ in drawn], [s for _, s in drawn]), strict=True
            ):
                if text is not None and len(kept[row]) < width:
                    kept[row].append(suffix)
        flat = [(row, suffix) for row in active for suffix in kept[row]]
        return [row for row, _ in flat], torch.tensor([suffix for _, suffix in flat])

    def texts(self, rows: Sequence[int], suffixes: Sequence[list[int]]) -> list[str | None]:
        """Text of each candidate, None where it cannot be typed."""
        return replayable(self.chat, [self.slots[row] for row in rows], suffixes)

    def mean(self, rows: Int[Tensor, " row"], losses: Float[Tensor, "row reply"]) -> Float[Tensor, " row"]:
        """Mean over the target's tokens: the attacked loss."""
        return mean_cross_entropy(-losses, self.target.mask[rows])

    def record_start(self) -> list[int]:
        """Score and enter the initial suffixes; returns all rows."""
        rows = torch.arange(len(self.slots), device=self.start.device)
        return self.ledger.record(
            rows.tolist(), self.start.tolist(), self.mean(rows, self.losses(rows, self.start))
        )

    def typed(self, suffixes: Sequence[list[int]]) -> list[str]:
        """What a user would type to replay a suffix of every behaviour."""
        own = replayable(self.chat, self.slots, suffixes)
        return [slot.user + (text or "") + slot.rest for slot, text in zip(self.slots, own, strict=True)]

    def saying(self, rows: Sequence[int], suffixes: Sequence[list[int]]) -> list[bool]:
        """Whether greedy decoding says each row's target with this suffix, as an evaluation counts it; one
        forward pass each."""
        if not rows:
            return []
        index = torch.tensor(rows, device=self.target.ids.device)
        prompt_ids, prompt_mask = self._prompts(
            [self.slots[row].ids(suffix) for row, suffix in zip(rows, suffixes, strict=True)]
        )
        self.ledger.count_forward(index)
        counted = Reply(self.counted.ids[index], self.counted.mask[index])
        hits: list[bool] = replies_greedily(
            self.model, self.model.embed(prompt_ids), prompt_mask, counted
        ).tolist()
        return hits

    def reached(self, rows: Sequence[int]) -> list[int]:
        """Those of the rows whose best suffix makes greedy decoding say the target."""
        hits = self.saying(rows, [self.ledger.best[row] for row in rows])
        return [row for row, hit in zip(rows, hits, strict=True) if hit]

    def finish(
        self,
        owners: Sequence[int],
        candidates: Int[Tensor, "row suffix"],
        could: Bool[Tensor, " row"],
        means: Float[Tensor, " row"],
    ) -> set[int]:
        """Behaviours of which a candidate says the target; the likeliest such candidate becomes their result,
        whatever its loss.

        Args:
            owners: the behaviour of each candidate.
            candidates: the candidates.
            could: from `scores`: which of them are looked at, CHECKED of a behaviour at a time until one says
                it.
            means: attacked losses.
        """
        plausible: dict[int, list[int]] = {}
        for i in means.argsort(stable=True).tolist():
            if could[i]:
                plausible.setdefault(owners[i], []).append(i)
        done: set[int] = set()
        for start in range(0, max(map(len, plausible.values()), default=0), CHECKED):
            flat = [
                i
                for owner, own in plausible.items()
                if owner not in done
                for i in own[start : start + CHECKED]
            ]
            said = self.saying([owners[i] for i in flat], [candidates[i].tolist() for i in flat])
            for i, hit in zip(flat, said, strict=True):
                if hit and owners[i] not in done:
                    done.add(owners[i])
                    self.ledger.keep(owners[i], candidates[i].tolist(), float(means[i]))
        return done

    def result(self) -> AttackedPrompt:
        """The best suffixes. Raises: AssertionError if a text does not re-tokenise to the optimised ids."""
        best, texts = self.ledger.best, self.typed(self.ledger.best)
        for slot, suffix, text in zip(self.slots, best, texts, strict=True):
            assert slot.envelope.prompt(self.chat, text).ids == slot.ids(suffix), (
                f"{text!r} is not what was attacked"
            )
        prompts = self._prompts([slot.ids(suffix) for slot, suffix in zip(self.slots, best, strict=True)])
        return self.ledger.attacked(*prompts, texts=texts)

    def _prompts(self, rows: list[list[int]]) -> tuple[Int[Tensor, "row prompt"], Bool[Tensor, "row prompt"]]:
        ids, mask = pad(rows, "left")
        return ids.to(self.target.ids.device), mask.to(self.target.ids.device)


def best_by_owner(owners: Sequence[int], scores: Float[Tensor, " row"]) -> dict[int, int]:
    """Index of each behaviour's lowest-scored candidate."""
    best: dict[int, int] = {}
    # What cannot be scored is never the best of several.
    values = scores.nan_to_num(nan=torch.inf).tolist()
    for i, (owner, score) in enumerate(zip(owners, values, strict=True)):
        if owner not in best or score < values[best[owner]]:
            best[owner] = i
    return best
