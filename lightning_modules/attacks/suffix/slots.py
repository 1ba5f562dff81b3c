"""A slot of free tokens at the end of the user's text, found by the chat template's spans, and which contents
can be typed.

A suffix counts only if it can be replayed: the user's text with the decoded suffix, put through the chat
template and the tokenizer, must give back exactly the optimised ids. All candidates of a step are checked by
one decode and one encode call.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from datamodules.text.chat_format import ChatFormat, Role

TAIL = 4
"""Tokens before the suffix that are decoded with it: some decoders treat the first token of a text
differently."""


@dataclass(frozen=True)
class SuffixSlot:
    """One prompt around a suffix, as ids and as text."""

    before: list[int]
    suffix: list[int]
    """The initial suffix."""
    after: list[int]
    user: str
    """The user's text without the suffix."""
    text_before: str
    text_after: str
    tail_text: str
    """Decoded last tokens of `before`."""

    def ids(self, suffix: Sequence[int]) -> list[int]:
        return [*self.before, *suffix, *self.after]


def make_slot(chat: ChatFormat, prompt: str, system: str | None, unit: str, num_tokens: int) -> SuffixSlot:
    """Append `unit` to the user's text and keep `num_tokens` of the tokens that it makes.

    Raises: ValueError where the tokenizer cannot make such a suffix of this unit.
    """
    prompt = prompt.strip()
    for repeats in range(num_tokens, 4 * num_tokens + 1):
        tokens = chat.prompt(prompt + unit * repeats, system)
        first, end = tokens.user_span
        start = first + len(prompt)
        own = [
            i
            for i, (left, right) in enumerate(tokens.offsets)
            if left >= start and right <= end and tokens.roles[i] is Role.USER
        ]
        if len(own) < num_tokens or own[-1] - own[0] != len(own) - 1:
            continue
        before, made, after = (
            tokens.ids[: own[0]],
            tokens.ids[own[0] : own[-1] + 1],
            tokens.ids[own[-1] + 1 :],
        )
        tail_text = chat.decode_batch([before[-TAIL:]])[0]
        # A unit of several tokens is cut where the rest can still be typed.
        for cut in range(len(made) - num_tokens + 1):
            slot = SuffixSlot(
                before,
                made[cut : cut + num_tokens],
                after,
                prompt,
                tokens.text[:start],
                tokens.text[end:],
                tail_text,
            )
            if replayable(chat, [slot], [slot.suffix])[0] is not None:
                return slot
    raise ValueError(
        f"expected an initial suffix of {num_tokens} tokens, got none from {unit!r}; set init to "
        "another text, e.g. ' x'"
    )


def replayable(
    chat: ChatFormat, slots: Sequence[SuffixSlot], suffixes: Sequence[list[int]]
) -> list[str | None]:
    """Text of each suffix in its slot, None where typing that text would not give back these ids."""
    if not suffixes:
        return []
    decoded = chat.decode_batch(
        [slot.before[-TAIL:] + suffix for slot, suffix in zip(slots, suffixes, strict=True)]
    )
    texts = [_own_text(slot, text) for slot, text in zip(slots, decoded, strict=True)]
    typed = [
        slot.text_before + (text or "") + slot.text_after for slot, text in zip(slots, texts, strict=True)
    ]
    rows = zip(slots, suffixes, texts, chat.encode_batch(typed), strict=True)
    return [text if ids == slot.ids(suffix) else None for slot, suffix, text, ids in rows]


def _own_text(slot: SuffixSlot, decoded: str) -> str | None:
    """The suffix's part of a decoded text; templates strip what ends in white space, so that cannot be
    typed."""
    text = decoded[len(slot.tail_text) :]
    return text if decoded.startswith(slot.tail_text) and text == text.rstrip() else None


def typable_tokens(chat: ChatFormat, vocabulary: int, ascii_only: bool) -> Tensor:
    """(V,) bool: tokens a suffix may hold: no special tokens, no rows without a token, only printable ASCII
    if asked.

    Args:
        vocabulary: rows of the embedding matrix, which may be more than the tokenizer has tokens.
    """
    size = min(vocabulary, len(chat.tokenizer))
    texts = chat.decode_batch([[i] for i in range(size)])
    special = set(chat.tokenizer.all_special_ids) | set(chat.tokenizer.added_tokens_decoder)
    allowed = torch.zeros(vocabulary, dtype=torch.bool)
    allowed[:size] = torch.tensor(
        [i not in special and (not ascii_only or _printable(text)) for i, text in enumerate(texts)]
    )
    return allowed


def _printable(text: str) -> bool:
    return bool(text) and text.isascii() and text.isprintable()


def without_end_of_turn(ids: Tensor, mask: Tensor, end: Sequence[int]) -> Tensor:
    """(B, R) mask without the reply's closing end-of-turn tokens: an attacker's target is a prefix of a
    longer reply."""
    if not end:
        return mask
    shortened = mask.clone()
    for row, length in enumerate(mask.sum(1).tolist()):
        if length > len(end) and ids[row, length - len(end) : length].tolist() == list(end):
            shortened[row, length - len(end) :] = False
    return shortened
