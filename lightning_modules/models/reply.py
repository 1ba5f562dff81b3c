"""A reply that is scored, and the states that predict its tokens."""

from __future__ import annotations

from typing import NamedTuple

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor, nn

from lightning_modules.models.decoder import log_probs_at
from lightning_modules.models.masks import numbers_of


class Reply(NamedTuple):
    """A continuation to score, right-padded."""

    ids: Int[Tensor, "batch reply"]
    mask: Bool[Tensor, "batch reply"]
    lengths: tuple[int, ...] = ()
    """Tokens of each row, where the host knows them; asked of the mask, it would wait for the GPU."""

    @property
    def scored(self) -> Int[Tensor, " scored"]:
        """Numbers of the tokens in the flattened mask."""
        return numbers_of(self.mask, sum(self.lengths) if self.lengths else None)

    @property
    def fed(self) -> Reply:
        """What a model must read to score it: the last token predicts nothing that is scored."""
        return Reply(self.ids[:, :-1], self.mask[:, :-1])


def predictors(
    hidden: Float[Tensor, "batch token dim"], reply: Reply, prompt_length: int, start: int
) -> Float[Tensor, "batch reply dim"]:
    """States that predict a reply's tokens: the prompt's last, then those of its tokens, which were fed from
    `start` on."""
    rest = reply.ids.shape[1] - 1
    return torch.cat([hidden[:, prompt_length - 1 : prompt_length], hidden[:, start : start + rest]], dim=1)


def score(
    module: nn.Module,
    hidden: Float[Tensor, "batch token dim"],
    reply: Reply,
    prompt_length: int,
    start: int,
    scored: Int[Tensor, " scored"],
) -> Float[Tensor, "batch reply"]:
    """Log-probabilities of one reply's tokens, 0 on its padding; arguments as in `predictors`, and the
    numbers of the tokens in the flattened mask."""
    return log_probs_at(module, predictors(hidden, reply, prompt_length, start), reply.ids, scored)
