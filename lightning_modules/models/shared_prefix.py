"""Many rows that continue the same cached beginnings, without a copy of a beginning for each of its rows.

A row's attention is attention to its beginning (b) and to its own tokens (o), weighed by where the softmax's
mass lies:

    y = w y_b + (1 - w) y_o,   w = sigmoid(s_b - s_o),   s = log sum_j exp(q . k_j / sqrt(d))

All rows of a beginning ask it in one call, their queries one sequence.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from itertools import groupby
from threading import RLock, get_ident
from typing import Any

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor, nn
from torch.backends.cuda import SDPAParams, can_use_flash_attention
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

from lightning_modules.models.decoder import causal_lm, decode, text_config
from lightning_modules.models.layout import Uncached, causal_attention
from lightning_modules.models.prefix_cache import PrefixCache

KERNEL = "sdpa"
"""The attention that this one can stand in for."""
aten = torch.ops.aten
_TAKEN = RLock()
"""Held while attention is replaced: the table of attentions is the process's, not the model's."""


def can_share(module: nn.Module, prefix: PrefixCache, width: int) -> bool:
    """Whether rows of so many own tokens may be read without copies: beginnings whose lengths the host knows,
    and a decoder whose attention is plain, causal and sees everything before a token."""
    model, config = causal_lm(module), text_config(module)
    window = getattr(config, "sliding_window", None)
    plain = getattr(model, "_supports_attention_backend", False) and config._attn_implementation == KERNEL
    near = window is None or prefix.length + width <= window
    softcap = getattr(config, "attn_logit_softcapping", None)
    return bool(prefix.lengths) and plain and near and softcap is None


def decode_shared(
    module: nn.Module,
    prefix: PrefixCache,
    rows: Int[Tensor, " row"],
    names: Sequence[int],
    embeds: Float[Tensor, "row rest dim"],
) -> Float[Tensor, "row rest dim"]:
    """Final hidden states of embeddings that continue cached beginnings; without a gradient.

    Args:
        module: the model that made the cache.
        prefix: the beginnings.
        rows: which beginning each row continues.
        names: the same, on the host.
        embeds: what follows the beginnings, padded at its end only.
    """
    order = sorted(range(len(names)), key=names.__getitem__)
    apart = order != list(range(len(names)))
    if apart:
        index = torch.tensor(order, device=embeds.device)
        rows, embeds = rows.index_select(0, index), embeds.index_select(0, index)
    width = embeds.shape[1]
    attention, _ = causal_attention(module, width, embeds.device)
    positions = prefix.mask.sum(1)[rows, None] + torch.arange(width, device=embeds.device)
    shared = _SharedPrefix(prefix, [names[i] for i in order])
    with shared.asked():
        hidden = decode(module, embeds, attention, positions, shared)
    return torch.empty_like(hidden).index_copy(0, index, hidden) if apart else hidden


class _SharedPrefix(Uncached):
    """What the decoder takes for a cache: it adds nothing to a layer's keys and values, and answers its
    queries itself."""

    def __init__(self, prefix: PrefixCache, names: Sequence[int]) -> None:
        super().__init__()
        self._prefix = prefix
        self._groups: list[tuple[int, slice]] = []
        start = 0
        for name, same in groupby(names):
            stop = start + len(list(same))
            self._groups.append((name, slice(start, stop)))
            start = stop
        self._answered = 0

    @contextmanager
    def asked(self) -> Iterator[None]:
        """The decoder's attention asks here while the context lasts; other threads' models keep theirs.

        Raises: RuntimeError where a layer did not ask: its rows would have been read without a beginning.
        """
        with _TAKEN:
            usual, thread = ALL_ATTENTION_FUNCTIONS[KERNEL], get_ident()

            def attention(*args: Any, **kwargs: Any) -> Any:
                return (self._attention if get_ident() == thread else usual)(*args, **kwargs)

            ALL_ATTENTION_FUNCTIONS[KERNEL] = attention
            try:
                yield
            finally:
                ALL_ATTENTION_FUNCTIONS[KERNEL] = usual
        layers = len(self._prefix.layers)
        if self._answered != layers:
            raise RuntimeError(f"{self._answered} of {layers} layers asked for their beginnings")

    def _attention(
        self,
        module: Any,
        query: Float[Tensor, "row head token dim"],
        key: Float[Tensor, "row group token dim"],
        value: Float[Tensor, "row group token dim"],
        attention_mask: Tensor | None,
        dropout: float = 0.0,
        scaling: float | None = None,
        **_: Any,
    ) -> tuple[Float[Tensor, "row token head dim"], None]:
        if attention_mask is not None:
            raise RuntimeError("expected attention that needs no mask")
        self._answered += 1
        if torch.is_autocast_enabled(query.device.type):
            # As it does with torch's own attention.
            dtype = torch.get_autocast_dtype(query.device.type)
            query, key, value = query.to(dtype), key.to(dtype), value.to(dtype)
        repeats = query.shape[1] // key.shape[1]
        scale = query.shape[-1] ** -0.5 if scaling is None else scaling
        own, mass = attended(query, _repeated(key, repeats), _repeated(value, repeats), scale, causal=True)
        keys, values = self._prefix.layers[module.layer_idx]
        parts, masses = [], []
        for name, rows in self._groups:
            asking, first = query[rows], keys.shape[2] - self._prefix.lengths[name]
            if first == keys.shape[2]:  # nothing stands before: no mass
                parts.append(torch.zeros_like(asking))
                masses.append(torch.full_like(mass[rows], -torch.inf))
                continue
            seen, told = (_repeated(x[name : name + 1, :, first:].to(query), repeats) for x in (keys, values))
            part, own_mass = attended(_joined(asking), seen, told, scale, causal=False)
            parts.append(_split(part, len(asking)))
            masses.append(own_mass.view(query.shape[1], len(asking), -1).transpose(0, 1))
        share = torch.sigmoid(_whole(masses) - mass)[..., None].to(own.dtype)
        return torch.lerp(own, _whole(parts), share).transpose(1, 2), None


def attended(
    query: Float[Tensor, "row head token dim"],
    key: Float[Tensor, "row head seen dim"],
    value: Float[Tensor, "row head seen dim"],
    scale: float,
    causal: bool,
) -> tuple[Float[Tensor, "row head token dim"], Float[Tensor, "row head token"]]:
    """Attention, and the logarithm of each query's sum of exponentials: by the kernels behind torch's own
    attention where they take these tensors."""
    if query.device.type == "cpu":
        return aten._scaled_dot_product_flash_attention_for_cpu(query, key, value, 0.0, causal, scale=scale)
    # Called directly, the kernel refuses what torch's own attention would pad or hand to another one.
    whole = query.shape[-1] % 8 == 0
    if whole and can_use_flash_attention(SDPAParams(query, key, value, None, 0.0, causal, False)):
        given = aten._scaled_dot_product_flash_attention(query, key, value, 0.0, causal, False, scale=scale)
        return given[0], given[1][..., : query.shape[2]]
    return attended_plainly(query, key, value, scale, causal)


def attended_plainly(
    query: Tensor, key: Tensor, value: Tensor, scale: float, causal: bool
) -> tuple[Tensor, Tensor]:
    """The same by its definition."""
    scores = query @ key.transpose(2, 3) * scale
    if causal:
        future: Bool[Tensor, "token seen"] = torch.ones_like(scores[0, 0], dtype=torch.bool).triu(1)
        scores = scores.masked_fill(future, -torch.inf)
    return scores.softmax(3) @ value, scores.logsumexp(3)


def _joined(query: Float[Tensor, "row head token dim"]) -> Float[Tensor, "1 head tokens dim"]:
    rows, heads, tokens, dim = query.shape
    # Queries lie in memory token by token: nothing is copied.
    return query.transpose(1, 2).reshape(1, rows * tokens, heads, dim).transpose(1, 2)


def _split(joined: Float[Tensor, "1 head tokens dim"], rows: int) -> Float[Tensor, "row head token dim"]:
    _, heads, tokens, dim = joined.shape
    return joined.transpose(1, 2).reshape(rows, tokens // rows, heads, dim).transpose(1, 2)


def _whole(parts: list[Tensor]) -> Tensor:
    return parts[0] if len(parts) == 1 else torch.cat(parts)


def _repeated(
    states: Float[Tensor, "row group token dim"], times: int
) -> Float[Tensor, "row head token dim"]:
    return states if times == 1 else states.repeat_interleave(times, dim=1)
