"""Prompts in which only a suffix changes, as the model reads them: what stands before it is computed once.

A candidate costs a forward pass over its suffix, the template's end and the target, with logits at the
target's positions only.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from datamodules.batch import pad
from lightning_modules.attacks.suffix.slots import SuffixSlot
from lightning_modules.models.cached_scoring import (
    continued_log_probs,
    continued_scores,
    extend_cache,
    next_token_logits,
    prefix_cache,
)
from lightning_modules.models.language_model import LanguageModel
from lightning_modules.models.prefix_cache import PrefixCache
from lightning_modules.models.reply import Reply


class Frames:
    """Slots with their targets, ready to be scored with any suffix. The model must be frozen meanwhile.

    Args:
        model: the model under attack.
        slots: the prompts around the suffix.
        target: what is scored after them.
        lead: tokens before the suffix that every candidate computes again; 1 lets an empty suffix have a next
            token.
    """

    def __init__(
        self, model: LanguageModel, slots: Sequence[SuffixSlot], target: Reply, lead: int = 0
    ) -> None:
        self.model, self.target = model, target
        self.lengths = target.lengths or tuple(target.mask.sum(1).tolist())
        device = target.ids.device
        # Every continuation is given one length by letting shorter template ends borrow tokens from before
        # the suffix.
        ends = [len(slot.middle) + len(slot.after) for slot in slots]
        end = lead + max(ends)
        borrowed = [end - own for own in ends]
        heads = [slot.before[: max(0, len(slot.before) - n)] for slot, n in zip(slots, borrowed, strict=True)]
        frames = [
            (slot.before[len(head) :], slot.middle + slot.after)
            for slot, head in zip(slots, heads, strict=True)
        ]
        # The cache needs a column: a row that lends its whole beginning gets one that nobody sees.
        ids, prefix_mask = (tensor.to(device) for tensor in pad([head or [0] for head in heads], "left"))
        prefix_mask &= torch.tensor([[bool(head)] for head in heads], device=device)
        # A head that is shorter than what it should lend leaves its frame shorter than the others.
        self.padded = len({len(lead) + len(after) for lead, after in frames}) > 1
        self.head_lengths = tuple(map(len, heads))
        frame_ids, frame_mask = pad([lead + after for lead, after in frames], "left")
        self.frame_ids, self.frame_mask = frame_ids.to(device), frame_mask.to(device)
        self.place = torch.tensor([end - own for own in ends], device=device)
        # Where the tokens after a request in the middle stand; without one, they all stand together.
        self.second = self.place + torch.tensor([len(slot.middle) for slot in slots], device=device)
        # On the host, too, where candidates are put in order.
        self._where = {
            own.type: (self.place.to(own), self.second.to(own)) for own in (device, torch.device("cpu"))
        }
        self.head = slots[0].head
        self.prefix = prefix_cache(model, ids, prefix_mask, () if self.padded else self.head_lengths)

    def extended(
        self, rows: Int[Tensor, " row"], suffixes: Int[Tensor, "row suffix"], names: Sequence[int]
    ) -> PrefixCache:
        """The cache of these rows, held on over their suffixes; `names` are they on the host."""
        whole, mask = self._frame(rows, suffixes, self.model.embed(suffixes))
        lengths = () if self.padded else tuple(self.head_lengths[row] + mask.shape[1] for row in names)
        return extend_cache(self.model, self.prefix, rows, whole, mask, lengths)

    def token_losses(
        self,
        rows: Int[Tensor, " row"],
        suffixes: Int[Tensor, "row suffix"],
        embeds: Float[Tensor, "row suffix dim"],
        names: Sequence[int] | None = None,
    ) -> Float[Tensor, "row reply"]:
        """Losses with suffix embeddings put into their frames. `names` are the rows where the host knows
        them; without, it asks for them."""
        names = rows.tolist() if names is None else names
        given, reply = self._given(rows, suffixes, embeds, None, None, 0, names)
        losses = -continued_log_probs(self.model, *given, reply, None if self.padded else names)
        return torch.nn.functional.pad(losses, (0, self.target.mask.shape[1] - losses.shape[1]))

    def token_scores(
        self,
        rows: Int[Tensor, " row"],
        suffixes: Int[Tensor, "row suffix"],
        cache: PrefixCache | None = None,
        cached_rows: Int[Tensor, " row"] | None = None,
        skip: int = 0,
        names: Sequence[int] | None = None,
        cached_names: Sequence[int] | None = None,
    ) -> Float[Tensor, "row reply 2"]:
        """Losses as `token_losses` without a gradient, and 1 where greedy decoding says the token after those
        before it, outside the target too.

        `cache` may hold the prompts further than the fixed beginning: then the frame's first `skip` columns
        are taken from its rows `cached_rows`, `cached_names` on the host.
        """
        embeds, names = self.model.embed(suffixes), rows.tolist() if names is None else names
        given, reply = self._given(rows, suffixes, embeds, cache, cached_rows, skip, names)
        held = names if cached_rows is None else cached_names
        log_probs, said = continued_scores(self.model, *given, reply, None if self.padded else held)
        missing = (0, self.target.mask.shape[1] - said.shape[1])
        losses = torch.nn.functional.pad(-log_probs, missing)
        # One tensor, since passes over chunks are joined tensor by tensor.
        return torch.stack([losses, torch.nn.functional.pad(said.to(losses), missing, value=1.0)], dim=2)

    def _given(
        self,
        rows: Int[Tensor, " row"],
        suffixes: Int[Tensor, "row suffix"],
        embeds: Float[Tensor, "row suffix dim"],
        cache: PrefixCache | None,
        cached_rows: Int[Tensor, " row"] | None,
        skip: int,
        names: Sequence[int],
    ) -> tuple[
        tuple[PrefixCache, Int[Tensor, " row"], Float[Tensor, "row rest dim"], Bool[Tensor, "row rest"]],
        Reply,
    ]:
        """What is fed after a cache, and the target that is scored."""
        whole, mask = self._frame(rows, suffixes, embeds)
        lengths = tuple(self.lengths[row] for row in names)
        longest = max(lengths)
        reply = Reply(self.target.ids[rows, :longest], self.target.mask[rows, :longest], lengths)
        prefix = self.prefix if cache is None else cache.head(self.prefix.length + skip)
        index = rows if cached_rows is None else cached_rows
        return (prefix, index, whole[:, skip:], mask[:, skip:]), reply

    def next_token_logits(
        self, rows: Int[Tensor, " row"], suffixes: Int[Tensor, "row suffix"]
    ) -> Float[Tensor, "row vocabulary"]:
        """Logits of the token that the model itself would put after each unfinished suffix."""
        lead = int(self.place.max())
        ids, mask = self.frame_ids[rows, :lead], self.frame_mask[rows, :lead]
        # The frame's lead is left-aligned for a row that borrows fewer tokens; without its end it must be
        # right-aligned.
        shift = lead - self.place[rows]
        column = torch.arange(lead, device=ids.device) - shift[:, None]
        kept = column.clamp_min(0)
        lead_ids, lead_mask = ids.gather(1, kept), mask.gather(1, kept) & (column >= 0)
        return next_token_logits(
            self.model,
            self.prefix,
            rows,
            torch.cat([lead_ids, suffixes], 1),
            torch.cat([lead_mask, torch.ones_like(suffixes, dtype=torch.bool)], 1),
        )

    def _frame(
        self,
        rows: Int[Tensor, " row"],
        suffixes: Int[Tensor, "row suffix"],
        embeds: Float[Tensor, "row suffix dim"],
    ) -> tuple[Float[Tensor, "row rest dim"], Bool[Tensor, "row rest"]]:
        """Embeddings and mask of the prompts after the fixed beginning, with suffix embeddings put in."""
        frame, places = self.model.embed(self.frame_ids[rows]), self._places(rows, suffixes.shape[1])
        column = torch.arange(frame.shape[1], device=frame.device)
        target = column + (column[None, :, None] >= places[:, None, :]).sum(2)
        whole = frame.new_zeros(len(rows), frame.shape[1] + places.shape[1], frame.shape[2])
        whole = whole.scatter(1, target[..., None].expand_as(frame), frame)
        slot = self.columns(rows, suffixes.shape[1])
        whole = whole.scatter(1, slot[..., None].expand(-1, -1, frame.shape[2]), embeds)
        mask = torch.ones(whole.shape[:2], dtype=torch.bool, device=frame.device).scatter(
            1, target, self.frame_mask[rows]
        )
        return whole, mask

    def columns(self, rows: Int[Tensor, " row"], size: int) -> Int[Tensor, "row size"]:
        """Columns of the whole in which the free tokens stand."""
        return self._places(rows, size) + torch.arange(size, device=rows.device)

    def _places(self, rows: Int[Tensor, " row"], size: int) -> Int[Tensor, "row size"]:
        """Frame columns before which the free tokens stand."""
        place, second = self._where[rows.device.type]
        first = place[rows, None].expand(-1, self.head)
        return torch.cat([first, second[rows, None].expand(-1, size - self.head)], dim=1)
