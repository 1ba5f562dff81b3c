"""The direction of refusal in the residual stream (Arditi et al. 2024, arXiv 2406.11717).

A candidate is the difference of the mean residual activations of harmful and of harmless requests, after one
layer and at one of the prompt's last positions. Among the candidates that one is chosen whose removal makes
the model least likely to begin a refusal, on requests that no mean has seen, and leaves what it says to
harmless requests as it was; added to harmless requests, it has to make a refusal more likely than not.
"""

from __future__ import annotations

import logging
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from math import isfinite
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor

from lightning_modules.models.decoder import causal_lm, decode, logits_of
from lightning_modules.models.hidden_states import conversation_states, num_layers, perturbed_layers
from lightning_modules.models.language_model import Encoded, LanguageModel
from lightning_modules.models.masks import positions_of

log = logging.getLogger(__name__)

ROWS_AT_ONCE = 32


@dataclass(frozen=True)
class Direction:
    """One candidate, and how it did on validation."""

    layer: int
    """The decoder layer after whose output it was measured, counted from 0."""
    position: int
    """Counted from the prompt's end: -1 is its last token."""
    vector: Float[Tensor, " dim"]
    """The difference of the means, in fp32; as long as they are apart."""
    refusal: float = float("nan")
    """Mean log-odds of beginning a refusal on harmful requests with the direction removed."""
    kl: float = float("nan")
    """Mean KL, in nats, of the first token's distribution on harmless requests, before to after removal."""
    induced: float = float("nan")
    """Mean log-odds of beginning a refusal on harmless requests with the direction added after its layer."""


@torch.no_grad()
def mean_differences(
    model: LanguageModel, harmful: Encoded, harmless: Encoded, num_positions: int
) -> list[Direction]:
    """A candidate per layer and position, by layer and then from the last position backwards.

    Raises: ValueError where a prompt has fewer positions: the mean would be one of padding.
    """
    shortest = min(int(own.prompt_mask.sum(1).min()) for own in (harmful, harmless))
    if num_positions > shortest:
        raise ValueError(
            f"refusal direction: num_positions: expected at most {shortest}, the tokens of the shortest "
            f"prompt, got {num_positions}"
        )
    layers = range(num_layers(model))

    def mean(prompts: Encoded) -> Float[Tensor, "layer position dim"]:
        total = torch.zeros((), device=prompts.prompt_ids.device)
        for part in parts(prompts):
            states = conversation_states(model, part.prompt_ids, part.prompt_mask, layers)
            # Left-padded: the last columns are every prompt's last tokens.
            total = total + torch.stack([own[:, -num_positions:].float().sum(0) for own in states])
        return total / len(prompts.prompt_ids)

    differences = mean(harmful) - mean(harmless)
    return [
        Direction(layer, -back, differences[layer, -back])
        for layer in layers
        for back in range(1, num_positions + 1)
    ]


def chosen(
    model: LanguageModel,
    candidates: Sequence[Direction],
    harmful: Encoded,
    harmless: Encoded,
    refusal_ids: Sequence[int],
    max_kl: float,
    max_depth: float,
) -> Direction:
    """The candidate with the lowest refusal score among those that change harmless replies by at most
    `max_kl` and induce refusals where they are added; the conditions are the paper's. Where none induces
    them, the one with the lowest score within `max_kl`; where none is within it, the one that changes
    harmless replies least; either with a warning.

    Args:
        model: the model; its adapters are part of it.
        candidates: from `mean_differences`.
        harmful: requests that none of the means has seen, as `harmless`.
        harmless: the others.
        refusal_ids: first tokens of refusals.
        max_kl: in nats.
        max_depth: candidates of deeper layers than this share of them are not tried: close to the head, a
            direction is the refusal's first token and no decision.

    Raises: ValueError where a candidate has no length, since the two kinds of requests are the same there, or
        where the model's probabilities are not finite.
    """
    own = [c for c in candidates if c.layer + 1 <= max(1, max_depth * num_layers(model))]
    if any(not float(c.vector.norm()) > 0 for c in own):
        raise ValueError(
            "refusal direction: expected harmful and harmless requests that differ at every position, got a "
            "difference of length 0; lower num_positions, or give other requests"
        )
    before = first_log_probs(model, harmless)
    scored = []
    for c in own:
        with ablated(model, c.vector):
            refusal = float(refusal_log_odds(first_log_probs(model, harmful), refusal_ids).mean())
            after = first_log_probs(model, harmless)
        kl = float((before.exp() * (before - after)).sum(1).mean())
        added = {c.layer: c.vector.expand(1, harmless.prompt_ids.shape[1], -1)}
        with perturbed_layers(model, added):
            induced = float(refusal_log_odds(first_log_probs(model, harmless), refusal_ids).mean())
        if not all(map(isfinite, (refusal, kl, induced))):
            raise ValueError(
                f"refusal direction: expected finite probabilities without layer {c.layer}'s direction, got "
                f"log-odds {refusal}, {induced} and KL {kl}; look at the model's weights"
            )
        scored.append(replace(c, refusal=refusal, kl=kl, induced=induced))
    kept = [c for c in scored if c.kl <= max_kl]
    if not kept:
        best = min(scored, key=lambda c: c.kl)
        _warn(f"no candidate changes harmless replies by at most max_kl {max_kl:g}", best)
        return best
    inducing = [c for c in kept if c.induced > 0]
    best = min(inducing or kept, key=lambda c: c.refusal)
    if not inducing:
        _warn(
            f"no candidate within max_kl {max_kl:g} makes harmless requests refused where it is added", best
        )
    return best


def _warn(what: str, taken: Direction) -> None:
    log.warning(
        "refusal direction: %s; taken: layer %d, position %d, which changes them by %.3g nats (log-odds of a "
        "refusal %.3g without it on harmful, %.3g with it on harmless requests)",
        what,
        taken.layer,
        taken.position,
        taken.kl,
        taken.refusal,
        taken.induced,
    )


@torch.no_grad()
def first_log_probs(model: LanguageModel, prompts: Encoded) -> Float[Tensor, "batch vocabulary"]:
    """Log-probabilities of each reply's first token, in fp32 or wider."""
    found = []
    for part in parts(prompts):
        mask = part.prompt_mask
        hidden = decode(model.module, model.embed(part.prompt_ids), mask, positions_of(mask))
        found.append(logits_of(model.module, hidden[:, -1]).log_softmax(1))
    return torch.cat(found)


def refusal_log_odds(
    log_probs: Float[Tensor, "batch vocabulary"], refusal_ids: Sequence[int]
) -> Float[Tensor, " batch"]:
    """log p / (1 - p), where p is the probability of any of the refusals' first tokens."""
    refusing = torch.zeros(log_probs.shape[1], dtype=torch.bool, device=log_probs.device)
    refusing[list(refusal_ids)] = True
    return log_probs[:, refusing].logsumexp(1) - log_probs[:, ~refusing].logsumexp(1)


def parts(prompts: Encoded) -> Iterator[Encoded]:
    """Prompts, some at once: the states of all layers of all of them would not fit beside a large model."""
    for start in range(0, len(prompts.prompt_ids), ROWS_AT_ONCE):
        own = slice(start, start + ROWS_AT_ONCE)
        yield Encoded(prompts.prompt_ids[own], prompts.prompt_mask[own])


@contextmanager
def ablated(model: LanguageModel, vector: Float[Tensor, " dim"] | None) -> Iterator[None]:
    """No position's residual stream has a component along the vector while the context lasts: x - r (r.x),
    with r of length 1, for the embeddings and for what every attention and every layer adds.

    The same as making every matrix that writes into the stream orthogonal to r (weights' form of the attack).
    None changes nothing.
    """
    if vector is None:
        yield
        return
    unit = vector / vector.norm()

    def without(states: Tensor) -> Tensor:
        # In fp32 or wider: rounded products would leave a part of it.
        wide = states if states.dtype == torch.float64 else states.float()
        own = unit.to(wide)
        return (wide - (wide @ own)[..., None] * own).to(states.dtype)

    def written(module: object, inputs: object, output: Any) -> Any:
        return (without(output[0]), *output[1:]) if isinstance(output, tuple) else without(output)

    def read(module: object, inputs: tuple[Any, ...]) -> tuple[Any, ...]:
        return (without(inputs[0]), *inputs[1:])

    layers = causal_lm(model.module).get_decoder().layers
    handles = [layers[0].register_forward_pre_hook(read)]
    for layer in layers:
        # Gemma 2 norms what attention has found before it is added to the stream.
        sandwiched = hasattr(layer, "pre_feedforward_layernorm")
        attention = layer.post_attention_layernorm if sandwiched else layer.self_attn
        handles += [part.register_forward_hook(written) for part in (attention, layer)]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()
