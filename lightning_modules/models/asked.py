"""How likely a reply is after requests as a user types them: for searches whose requests change as texts."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from jaxtyping import Float
from torch import Tensor

from lightning_modules.models.language_model import LanguageModel, encoded
from lightning_modules.models.likelihood import mean_cross_entropy
from lightning_modules.models.reply import Reply
from lightning_modules.models.requests import Request

ROWS_AT_ONCE = 64


@torch.no_grad()
def reply_losses(model: LanguageModel, requests: Sequence[Request], replies: Reply) -> Float[Tensor, " row"]:
    """CE of a reply per request, in nats per token, on the CPU; one forward pass each.

    Raises: ValueError where a request does not fit the chat template.
    """
    found = []
    for start in range(0, len(requests), ROWS_AT_ONCE):
        part = slice(start, start + ROWS_AT_ONCE)
        prompts = encoded(model, requests[part])
        own = Reply(replies.ids[part], replies.mask[part])
        embeds = model.embed(prompts.prompt_ids)
        (log_probs,) = model.reply_log_probs(embeds, prompts.prompt_mask, own)
        found.append(mean_cross_entropy(log_probs, own.mask).cpu())
    return torch.cat(found)
