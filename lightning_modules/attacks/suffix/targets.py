"""Targets of attacked prompts: whether greedy decoding says what counts of them, and other targets of the
same request."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import torch
from jaxtyping import Float
from torch import Tensor

from datamodules.batch import AdversarialBatch, pad
from datamodules.fields import checked
from datamodules.sources.files import parse_json, read_text
from lightning_modules.attacks.base import AttackedPrompt
from lightning_modules.attacks.suffix.slots import counted_mask, without_end_of_turn
from lightning_modules.models.language_model import LanguageModel
from lightning_modules.models.logits import reply_logits
from lightning_modules.models.reply import Reply


@torch.no_grad()
def says_target(
    model: LanguageModel, batch: AdversarialBatch, attacked: AttackedPrompt
) -> tuple[list[bool], Float[Tensor, " batch"]]:
    """Whether greedy decoding says each target's first sentence, and its mean loss on the CPU; one forward
    pass each."""
    mask = without_end_of_turn(batch.harmful_ids, batch.harmful_mask, model.chat.end_of_turn)
    mask = counted_mask(model.chat, batch.harmful_ids, mask, batch.targets)
    width = int(mask.sum(1).max())
    reply = Reply(batch.harmful_ids[:, :width], mask[:, :width])
    with model.frozen(), attacked.applied(model) as embeds:
        logits = reply_logits(model, embeds, attacked.prompt_mask, reply)
    ids = reply.ids[reply.mask]
    token_losses = logits.logsumexp(1) - logits.gather(1, ids[:, None]).squeeze(1)
    losses = torch.zeros(reply.mask.shape, device=ids.device, dtype=logits.dtype)
    losses = losses.masked_scatter(reply.mask, token_losses).sum(1) / reply.mask.sum(1)
    wrong = torch.zeros_like(reply.mask).masked_scatter(reply.mask, logits.argmax(1) != ids)
    return (~wrong.any(1)).tolist(), losses.cpu().float()


@checked
class OtherTargets:
    """Further targets of requests, from a JSON file: request -> target or list of targets, as HarmBench keeps
    them.

    Args:
        path: the file; a request that is missing there keeps its own target.
    """

    def __init__(self, path: str) -> None:
        self.path = path
        self._listed: dict[str, list[str]] | None = None

    def __call__(self, model: LanguageModel, batch: AdversarialBatch, number: int) -> AdversarialBatch:
        """The batch with each request's number-th target, counted from 1 and in turn.

        Raises: ValueError naming the file where it is no such file.
        """
        if self._listed is None:
            self._listed = self._read()
        chat, rows, texts = model.chat, [], []
        for i, prompt in enumerate(batch.prompts):
            listed = self._listed.get(prompt, [])
            text = listed[(number - 1) % len(listed)] if listed else batch.targets[i]
            rows.append(chat.reply(batch.envelope(i).prompt(chat, prompt), text))
            texts.append(text)
        ids, mask = (tensor.to(batch.prompt_ids.device) for tensor in pad(rows, "right"))
        return replace(batch, harmful_ids=ids, harmful_mask=mask, targets=tuple(texts), lengths=())

    def _read(self) -> dict[str, list[str]]:
        if not Path(self.path).is_file():
            raise ValueError(f"OtherTargets.path: expected a JSON file, got {self.path!r}, which is none")
        found: dict[str, list[str]] = {}
        for prompt, given in parse_json(read_text(self.path), self.path, dict).items():
            own = [given] if isinstance(given, str) else given
            if not isinstance(own, list) or not all(isinstance(text, str) and text.strip() for text in own):
                raise ValueError(f"{self.path}: {prompt[:60]!r}: expected a target or a list of targets")
            found[prompt] = own
        return found
