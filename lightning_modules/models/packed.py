"""Prompts with one reply each, as rows without a gap: scored many times, by an attack on their embeddings.

A batch pads prompts on the left and replies on the right. Here each row's prompt and reply stand together and
all padding at its end, where no token looks under causal attention: rows are shorter, and need no mask, so
that a kernel may be used that takes none. What stands before the first place that changes is computed once.
Masks are read once at most, when the rows are made; scoring them waits for nothing.
"""

from __future__ import annotations

import functools
import logging
from collections.abc import Callable, Sequence
from typing import Any

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor, nn
from torch._dynamo.exc import FailOnRecompileLimitHit, TorchDynamoException
from transformers import Cache

from lightning_modules.models.beginning import Beginning
from lightning_modules.models.decoder import decode, hidden_states, target_log_probs, weight_dtype
from lightning_modules.models.language_model import LanguageModel
from lightning_modules.models.layout import causal_attention
from lightning_modules.models.passes import count_passes
from lightning_modules.models.reply import Reply
from lightning_modules.models.tail import positions_read

log = logging.getLogger(__name__)

WORTH = 0.25
"""Share of a row that must stand before the first place that changes: reading it from memory takes up to 13
kernels a layer and iteration, which a smaller share would hardly pay for."""


class PackedRows:
    """The rows of a batch.

    Args:
        model: the model that scores them; it stays as it is meanwhile.
        prompt_ids: left-padded.
        prompt_mask: False on padding.
        reply: what is scored; its last token is not fed.
        prompt_lengths: tokens of each prompt, where the host knows them: with the reply's it then waits for
            nothing.
        fixed: so many first tokens of every row do not change, fewer than any prompt has; where they are
            WORTH of the rows or more, what `log_probs` is given of them is not looked at.
    """

    def __init__(
        self,
        model: LanguageModel,
        prompt_ids: Int[Tensor, "batch prompt"],
        prompt_mask: Bool[Tensor, "batch prompt"],
        reply: Reply,
        prompt_lengths: Sequence[int] = (),
        fixed: int = 0,
    ) -> None:
        self._compiled = model.compiled
        self.module, self.reply = model.module, reply
        own, device = prompt_mask.sum(1, keepdim=True), prompt_mask.device
        if prompt_lengths and reply.lengths:
            self.width = max(map(sum, zip(prompt_lengths, reply.lengths, strict=True))) - 1
        else:
            self.width = int((own + reply.mask.sum(1, keepdim=True)).max()) - 1
        place = torch.arange(self.width, device=device)[None]
        self._is_prompt = place < own
        padding = prompt_mask.shape[1] - own
        # The reply's columns follow the prompt's in the batch as they do here; past its end is padding.
        column = (padding + place).clamp_max(prompt_mask.shape[1] + reply.ids.shape[1] - 1)
        self._column = column.where(self._is_prompt, 0)
        self._place = (torch.arange(prompt_mask.shape[1], device=device) - padding).clamp_min(0)
        self._prompt_mask = prompt_mask
        ids = torch.cat([prompt_ids, reply.ids], dim=1).gather(1, column)
        self.clean: Float[Tensor, "batch place dim"] = model.embed(ids).detach()
        """Embeddings of prompts and replies."""
        # A prompt's last token predicts the reply's first, and is computed with it.
        fixed = min([fixed, *(length - 1 for length in prompt_lengths)])
        # Dynamo would make the graph again for every batch's beginning.
        worth = not self._compiled and fixed >= WORTH * self.width
        with torch.no_grad():
            begun = Beginning.computed(self.module, self.clean[:, :fixed], self.width) if worth else None
        self._fixed = 0 if begun is None else fixed
        self.computed = self.width - self._fixed
        """Places of a row that are computed each time."""
        predicting = own - 1 - self._fixed + torch.arange(reply.ids.shape[1], device=device)
        first = torch.arange(len(own), device=device)[:, None] * self.computed
        self._predicting = first + predicting.clamp_max(self.computed - 1)
        self._scored = reply.scored
        self._attention, self._cache = causal_attention(self.module, self.computed, device, begun)
        self._positions = place[:, self._fixed :]

    def placed(self, values: Tensor) -> Tensor:
        """(batch, prompt, ...) -> (batch, place, ...): values of the prompts' columns, 0 at the replies."""
        index = self._column.view(*self._column.shape, *[1] * (values.ndim - 2))
        found = values.gather(1, index.expand(-1, -1, *values.shape[2:]))
        return found * self._is_prompt.view(index.shape)

    def returned(self, values: Float[Tensor, "batch place dim"]) -> Float[Tensor, "batch prompt dim"]:
        """The reverse of `placed`: 0 on padding."""
        found = values.gather(1, self._place[..., None].expand(-1, -1, values.shape[2]))
        return found * self._prompt_mask[..., None]

    def log_probs(
        self, embeds: Float[Tensor, "row place dim"], rows: Int[Tensor, " row"] | None = None
    ) -> Float[Tensor, "row reply"]:
        """Log-probabilities of the replies' tokens, 0 on padding.

        Args:
            embeds: perturbed embeddings, in any float dtype.
            rows: which of the batch's rows they are; None is all in their order, and waits for nothing.

        Raises: ValueError where a graph is asked for and cannot be made.
        """
        own = embeds.to(weight_dtype(self.module))[:, self._fixed :]
        scored, predicting, ids, cache = self._scored, self._predicting, self.reply.ids, self._cache
        if rows is not None:
            scored, ids = Reply(ids[rows], self.reply.mask[rows]).scored, ids[rows]
            moved = torch.arange(len(rows), device=rows.device) - rows
            predicting, cache = predicting[rows] + moved[:, None] * self.computed, cache.rows(rows)
        given = self._attention, self._positions, cache
        where, targets = predicting.flatten()[scored], ids.flatten()[scored]
        # Without a gradient an attack scores once, at its end: not worth a graph of its own.
        if self._compiled and rows is None and own.requires_grad:
            scores = _scored_by_graph(self.module, own, *given, where, targets)
            count_passes(scores, len(own))
        else:
            with positions_read(self.module, where) as cut:
                hidden = decode(self.module, own, *given).flatten(0, 1)
            cache.check()
            hidden = hidden if cut else hidden.index_select(0, where)
            scores = target_log_probs(self.module, hidden, targets)
        whole = torch.zeros(ids.numel(), dtype=scores.dtype, device=scores.device)
        return whole.index_copy(0, scored, scores).view(ids.shape)


def _scores(
    module: nn.Module,
    embeds: Float[Tensor, "row place dim"],
    attention: Any,
    positions: Int[Tensor, "1 place"],
    cache: Cache,
    where: Int[Tensor, " scored"],
    targets: Int[Tensor, " scored"],
) -> Float[Tensor, " scored"]:
    """What is compiled: nothing that counts, and nothing whose shape depends on values."""
    hidden = hidden_states(module, embeds, attention, positions, cache).flatten(0, 1)
    return target_log_probs(module, hidden.index_select(0, where), targets)


def _scored_by_graph(*arguments: Any) -> Float[Tensor, " scored"]:
    try:
        return _graph()(*arguments)
    except FailOnRecompileLimitHit:
        # Hours into a training, slower is better than over; torch says it at every call, too.
        log.warning("base.compile_attacks: rows of too many kinds for one graph; these are scored without")
        return _scores(*arguments)
    except TorchDynamoException as error:
        reason = str(error).strip().splitlines()[0][:200]
        raise ValueError(
            f"base.compile_attacks: no graph could be made ({reason}); set it to false"
        ) from error


@functools.cache
def _graph() -> Callable[..., Tensor]:
    """One for all attacks: another width is compiled once more, with the width left open, and no further."""
    # Whole or not at all: a break would be a silent return to launching operations one by one.
    graph: Callable[..., Tensor] = torch.compile(_scores, fullgraph=True)
    return graph
