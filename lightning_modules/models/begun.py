"""Replies of which the first tokens stand at the end of their prompts already."""

from __future__ import annotations

from collections.abc import Sequence

import torch

from lightning_modules.models.reply import Reply


def remaining(reply: Reply, begun: Sequence[Sequence[int]]) -> Reply:
    """Every reply without the tokens that its prompt ends with, as wide as before; where none is begun, the
    reply itself."""
    if not any(begun):
        return reply
    ids, mask = torch.zeros_like(reply.ids), torch.zeros_like(reply.mask)
    width = reply.ids.shape[1]
    for row, own in enumerate(begun):
        ids[row, : width - len(own)] = reply.ids[row, len(own) :]
        mask[row, : width - len(own)] = reply.mask[row, len(own) :]
    lengths = [length - len(own) for length, own in zip(reply.lengths, begun, strict=False)]
    return Reply(ids, mask, tuple(lengths))
