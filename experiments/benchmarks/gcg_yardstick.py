"""The usual public GCG step, written plainly, as the yardstick of `experiments.benchmarks.gcg`.

What it does on purpose: one behaviour at a time, the prompt computed again for every candidate,
full-vocabulary logits at every position, an explicit one-hot matrix for the gradient, and one decode and one
encode call per candidate to see whether it can be typed. Sampling, the rule for what can be typed and the
loss are the project's, so that both sides search the same space.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.nn.functional import cross_entropy, one_hot

from datamodules.text.chat_format import ChatFormat
from lightning_modules.attacks.suffix.gcg import draw_swaps
from lightning_modules.attacks.suffix.slots import SuffixSlot

ROWS = 64
"""Candidates per forward pass; larger ones do not run faster on a CPU."""
ROWS_ON_A_GPU = 512
DRAWS = 4


@dataclass
class Behaviour:
    """One prompt around its suffix, and its target."""

    chat: ChatFormat
    slot: SuffixSlot
    system: str | None
    target: list[int]


def candidate_losses(model: nn.Module, behaviour: Behaviour, suffixes: list[list[int]]) -> Tensor:
    """(N,) mean cross-entropy of the target after each suffix."""
    rows = [behaviour.slot.ids(suffix) + behaviour.target for suffix in suffixes]
    with torch.no_grad():
        embed = model.get_input_embeddings()  # type: ignore[operator]
        ids = torch.tensor(rows, device=embed.weight.device)
        size = ROWS if ids.device.type == "cpu" else ROWS_ON_A_GPU
        return torch.cat([_losses(model, embed(part), behaviour.target) for part in ids.split(size)])


def promising(
    model: nn.Module, behaviour: Behaviour, suffix: list[int], allowed: Tensor, topk: int
) -> tuple[Tensor, Tensor]:
    """The loss of a suffix and the (S, k) tokens per position with the most negative one-hot gradient."""
    weight = model.get_input_embeddings().weight  # type: ignore[operator, union-attr]
    slot = behaviour.slot
    own = torch.tensor(suffix, device=weight.device)
    coordinates = one_hot(own, weight.shape[0]).to(weight.dtype).requires_grad_()
    embed = model.get_input_embeddings()  # type: ignore[operator]
    around = slot.before, [*slot.after, *behaviour.target]
    rest = [embed(torch.tensor([ids], device=weight.device)) for ids in around]
    loss = _losses(
        model, torch.cat([rest[0], (coordinates @ weight)[None], rest[1]], dim=1), behaviour.target
    )
    (gradient,) = torch.autograd.grad(loss.sum(), coordinates)
    scores = gradient.masked_fill(~allowed, torch.inf)
    scores.scatter_(1, own[:, None], torch.inf)
    return loss.detach(), scores.topk(topk, dim=1, largest=False).indices


def can_be_typed(behaviour: Behaviour, suffix: list[int]) -> bool:
    """Whether the decoded suffix, typed after the request, gives back these ids."""
    slot, chat = behaviour.slot, behaviour.chat
    tail = chat.decode_batch([slot.before[-4:]])[0]
    text = chat.decode_batch([slot.before[-4:] + suffix])[0]
    if not text.startswith(tail):
        return False
    try:
        return chat.prompt(slot.user + text[len(tail) :], behaviour.system).ids == slot.ids(suffix)
    except ValueError:
        return False


def step(
    model: nn.Module,
    behaviour: Behaviour,
    suffix: list[int],
    allowed: Tensor,
    topk: int,
    width: int,
    generator: torch.Generator,
) -> tuple[list[int], float, int]:
    """One GCG step: the best candidate, its loss and the number of candidates evaluated."""
    top = promising(model, behaviour, suffix, allowed, topk)[1].cpu()
    kept: list[list[int]] = []
    for _ in range(DRAWS):
        if len(kept) < width:
            drawn = draw_swaps(torch.tensor(suffix), top, width, 1, generator).tolist()
            kept += [candidate for candidate in drawn if can_be_typed(behaviour, candidate)]
    kept = kept[:width]
    losses = candidate_losses(model, behaviour, kept)
    best = int(losses.argmin())
    return kept[best], float(losses[best]), len(kept)


def _losses(model: nn.Module, embeds: Tensor, target: list[int]) -> Tensor:
    logits = model(inputs_embeds=embeds, use_cache=False).logits
    predicted = logits[:, -len(target) - 1 : -1]
    labels = torch.tensor(target, device=embeds.device).expand(len(embeds), -1)
    return cross_entropy(predicted.transpose(1, 2), labels, reduction="none").mean(1)
