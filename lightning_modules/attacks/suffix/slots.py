"""A slot of free tokens after, before or around the user's text, found by the chat template's spans, and
which contents can be typed.

A suffix counts only if it can be replayed: the user's text with the decoded suffix, put through the chat
template and the tokenizer, must give back exactly the optimised ids. All candidates of a step are checked by
one decode and one encode call.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Literal

import torch
from jaxtyping import Bool, Int
from torch import Tensor

from datamodules.text.chat_format import ChatFormat, PromptTokens, Role
from datamodules.text.envelope import Envelope
from datamodules.text.opening import begins_with, opening

Placement = Literal["after", "before", "around"]
"""Where the free tokens stand, seen from the request."""

TAIL = 4
"""Tokens before the suffix that are decoded with it: some decoders treat the first token of a text
differently."""


@dataclass(frozen=True)
class SuffixSlot:
    """One prompt around its free tokens, as ids and as text; they are called suffix wherever they stand."""

    before: list[int]
    suffix: list[int]
    """The initial suffix."""
    after: list[int]
    user: str
    """The user's text before the free tokens."""
    text_before: str
    text_after: str
    tail_text: str
    """Decoded last tokens of `before`."""
    head: int = 0
    """Free tokens that stand before `middle`."""
    middle: list[int] = field(default_factory=list)
    """The request, where there are free tokens on both of its sides."""
    rest: str = ""
    """The user's text after the free tokens."""
    envelope: Envelope = field(default_factory=Envelope)
    """What the text is sent in: with an instruction, the document stands for the user's text throughout."""

    def ids(self, suffix: Sequence[int]) -> list[int]:
        return [*self.before, *self.filled(suffix), *self.after]

    def filled(self, suffix: Sequence[int]) -> list[int]:
        return [*suffix[: self.head], *self.middle, *suffix[self.head :]]


def make_slot(
    chat: ChatFormat,
    prompt: str,
    envelope: Envelope,
    unit: str,
    num_tokens: int,
    place: Placement = "after",
) -> SuffixSlot:
    """Put `unit` at the request often enough and keep `num_tokens` of the tokens that it makes.

    Raises: ValueError where the tokenizer cannot make such a suffix of this unit.
    """
    prompt = prompt.strip()
    ahead = {"after": 0, "before": num_tokens, "around": num_tokens - num_tokens // 2}[place]
    # Tokenizers merge repeated units ("!!!!" is often one token), so it may take more units than tokens.
    for repeats in range(num_tokens, 4 * num_tokens + 1):
        front = (unit * repeats).lstrip() if ahead else ""
        back = unit * repeats if ahead < num_tokens else ""
        lead = f"{front} {prompt}" if front else prompt
        tokens = envelope.prompt(chat, lead + back)
        first, end = envelope.span(tokens)
        one = _within(tokens, envelope.role, first, first + len(front)) if ahead else []
        two = _within(tokens, envelope.role, first + len(lead), end) if ahead < num_tokens else []
        if not (_is_run(one, ahead) and _is_run(two, num_tokens - ahead)):
            continue
        # A unit of several tokens is cut where the rest can still be typed.
        for cut in range(max(len(one) - ahead, len(two) - num_tokens + ahead) + 1):
            kept = [
                own[(start := min(cut, len(own) - n)) : start + n]
                for own, n in ((one, ahead), (two, num_tokens - ahead))
            ]
            slot = _slot(chat, tokens, (one, two), kept, front, lead, envelope)
            if replayable(chat, [slot], [slot.suffix])[0] is not None:
                return slot
    raise ValueError(
        f"expected an initial suffix of {num_tokens} tokens, got none from {unit!r}; set init to "
        "another text, e.g. ' x'"
    )


def _within(tokens: PromptTokens, role: Role, start: int, end: int) -> list[int]:
    """Places of the attacker's tokens within a span of the text."""
    return [
        i
        for i, (left, right) in enumerate(tokens.offsets)
        if left >= start and right <= end and tokens.roles[i] is role
    ]


def _is_run(places: list[int], length: int) -> bool:
    """Whether these are at least so many tokens, one after the other."""
    return not length or (len(places) >= length and places[-1] - places[0] == len(places) - 1)


def _slot(
    chat: ChatFormat,
    tokens: PromptTokens,
    made: tuple[list[int], list[int]],
    kept: list[list[int]],
    front: str,
    lead: str,
    envelope: Envelope,
) -> SuffixSlot:
    """The prompt as a slot.

    Args:
        tokens: the prompt with too many free tokens.
        made: places of the free tokens before and after the request; one of them may be empty.
        kept: those of them that stay.
        front: the free text before the request; '' for none.
        lead: the text up to the request's end.
    """
    (one, two), ids = made, tokens.ids
    first, end = envelope.span(tokens)
    before, after = ids[: (one or two)[0]], ids[(two or one)[-1] + 1 :]
    # Where the slot begins and ends within the text.
    left = first if one else first + len(lead)
    right = end if two else first + len(front)
    return SuffixSlot(
        before,
        [ids[i] for i in kept[0] + kept[1]],
        after,
        "" if one else lead,
        tokens.text[:left],
        tokens.text[right:],
        chat.decode_batch([before[-TAIL:]])[0],
        head=len(kept[0]) if one and two else 0,
        middle=ids[one[-1] + 1 : two[0]] if one and two else [],
        rest="" if two else tokens.text[right:end],
        envelope=envelope,
    )


def replayable(
    chat: ChatFormat, slots: Sequence[SuffixSlot], suffixes: Sequence[list[int]]
) -> list[str | None]:
    """Text of each suffix in its slot, None where typing that text would not give back these ids."""
    if not suffixes:
        return []
    decoded = chat.decode_batch(
        [slot.before[-TAIL:] + slot.filled(suffix) for slot, suffix in zip(slots, suffixes, strict=True)]
    )
    texts = [_own_text(chat, slot, text) for slot, text in zip(slots, decoded, strict=True)]
    typed = [
        slot.text_before + (text or "") + slot.text_after for slot, text in zip(slots, texts, strict=True)
    ]
    rows = zip(slots, suffixes, texts, chat.encode_batch(typed), strict=True)
    return [text if ids == slot.ids(suffix) else None for slot, suffix, text, ids in rows]


def _own_text(chat: ChatFormat, slot: SuffixSlot, decoded: str) -> str | None:
    """The suffix's part of a decoded text; templates strip white space at the ends of the user's text, so
    that cannot be typed; neither can a document hold what would end it."""
    text = decoded[len(slot.tail_text) :]
    typed = slot.user + text + slot.rest
    kept = decoded.startswith(slot.tail_text) and typed == typed.strip()
    return text if kept and slot.envelope.keeps(chat, typed) else None


def typable_tokens(chat: ChatFormat, vocabulary: int, ascii_only: bool) -> Bool[Tensor, " vocabulary"]:
    """Tokens a suffix may hold: no special tokens, no rows without a token, only printable ASCII
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


def without_end_of_turn(
    ids: Int[Tensor, "batch reply"], mask: Bool[Tensor, "batch reply"], end: Sequence[int]
) -> Bool[Tensor, "batch reply"]:
    """The mask without the reply's closing end-of-turn tokens: an attacker's target is a prefix of a longer
    reply."""
    if not end:
        return mask
    shortened = mask.clone()
    for row, length in enumerate(mask.sum(1).tolist()):
        if length > len(end) and ids[row, length - len(end) : length].tolist() == list(end):
            shortened[row, length - len(end) :] = False
    return shortened


def counted_mask(
    chat: ChatFormat,
    ids: Int[Tensor, "batch reply"],
    mask: Bool[Tensor, "batch reply"],
    targets: Sequence[str],
) -> Bool[Tensor, "batch reply"]:
    """What counts as saying the target: its tokens up to the end of its first sentence, as the judge of
    target prefixes has it."""
    counted = mask.clone()
    for row, target in enumerate(targets):
        own, length = ids[row].tolist(), int(mask[row].sum())
        for end in range(1, length):
            if begins_with(chat.decode(own[:end]), opening(target)):
                counted[row, end:] = False
                break
    return counted
