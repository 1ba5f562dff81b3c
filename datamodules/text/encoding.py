"""Rows -> token ids, with a policy for rows that cannot be used; and token ids -> padded batches."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import Literal, TypeVar

import torch

from datamodules.batch import AdversarialBatch, BehaviourBatch, TrainingBatch, UtilityBatch, pad
from datamodules.rows import BadRowError, ChatRow, HarmfulRow, Row, RowProblem, example_id
from datamodules.text.chat_format import Attackable, ChatFormat, PromptTokens

OnBadRow = Literal["error", "skip"]


@dataclass(frozen=True)
class EncodedHarmful:
    """A harmful row as token ids."""

    row: HarmfulRow
    prompt: PromptTokens
    harmful: list[int]
    safe: list[int]

    @property
    def length(self) -> int:
        return len(self.prompt.ids) + max(len(self.harmful), len(self.safe))


@dataclass(frozen=True)
class EncodedChat:
    """A chat row as token ids; `reply` is empty where an evaluation row has none."""

    row: ChatRow
    prompt: PromptTokens
    reply: list[int]

    @property
    def length(self) -> int:
        return len(self.prompt.ids) + len(self.reply)


R = TypeVar("R", HarmfulRow, ChatRow)
E = TypeVar("E", EncodedHarmful, EncodedChat)


class Encoder:
    """Encodes rows and keeps account of those that it could not use.

    Args:
        chat: the chat format.
        max_length: longest allowed prompt + reply in tokens.
        on_bad_row: `error` raises at the first bad row, `skip` collects it in `problems`.
        system: system message of every row that has none of its own; null for none.
        attackable: which prompt tokens an attack may act on.
    """

    def __init__(
        self,
        chat: ChatFormat,
        max_length: int,
        on_bad_row: OnBadRow,
        system: str | None,
        attackable: Attackable,
    ) -> None:
        self.chat = chat
        self.max_length = max_length
        self.on_bad_row = on_bad_row
        self.system = system
        self.attackable = attackable
        self.problems: list[RowProblem] = []

    def harmful(self, rows: Iterable[HarmfulRow | RowProblem]) -> list[EncodedHarmful]:
        def encode(row: HarmfulRow) -> EncodedHarmful:
            prompt = self._prompt(row)
            return EncodedHarmful(
                row, prompt, self.chat.reply(prompt, row.target), self.chat.reply(prompt, row.safe_reply)
            )

        return self._collect(rows, encode)

    def chats(self, rows: Iterable[ChatRow | RowProblem], need_reply: bool = True) -> list[EncodedChat]:
        def encode(row: ChatRow) -> EncodedChat:
            prompt = self._prompt(row)
            return EncodedChat(
                row, prompt, self.chat.reply(prompt, row.reply) if row.reply or need_reply else []
            )

        return self._collect(rows, encode)

    def _prompt(self, row: Row) -> PromptTokens:
        if not isinstance(row.prompt, str) or not row.prompt.strip():
            raise ValueError("the prompt is empty or not text")
        prompt = self.chat.prompt(row.prompt, row.system if row.system is not None else self.system)
        if not any(prompt.attackable(self.attackable)):
            raise ValueError("the prompt has no attackable token")
        return prompt

    def _collect(self, rows: Iterable[R | RowProblem], encode: Callable[[R], E]) -> list[E]:
        encoded = []
        for row in rows:
            problem = row if isinstance(row, RowProblem) else None
            if not isinstance(row, RowProblem):
                try:
                    example = encode(row)
                    if example.length > self.max_length:
                        raise ValueError(
                            f"{example.length} tokens are more than max_length {self.max_length}"
                        )
                    encoded.append(example)
                except ValueError as error:
                    problem = RowProblem(row.where, str(error))
            if problem is not None:
                self._report(problem)
        return encoded

    def _report(self, problem: RowProblem) -> None:
        if self.on_bad_row == "error":
            raise BadRowError(
                f"bad row: {problem}; mend the row, or set data.on_bad_row: skip to leave such rows "
                "out and list them"
            )
        self.problems.append(problem)


def adversarial_batch(examples: Sequence[EncodedHarmful], attackable: Attackable) -> AdversarialBatch:
    """Pad encoded harmful rows to their own longest prompt and replies."""
    prompt_ids, prompt_mask = pad([e.prompt.ids for e in examples], "left")
    attack, _ = pad([[int(a) for a in e.prompt.attackable(attackable)] for e in examples], "left")
    harmful_ids, harmful_mask = pad([e.harmful for e in examples], "right")
    safe_ids, safe_mask = pad([e.safe for e in examples], "right")
    return AdversarialBatch(
        example_id=torch.tensor([example_id(e.row.key) for e in examples]),
        prompt_ids=prompt_ids,
        prompt_mask=prompt_mask,
        attackable_mask=attack.bool() & prompt_mask,
        harmful_ids=harmful_ids,
        harmful_mask=harmful_mask,
        safe_ids=safe_ids,
        safe_mask=safe_mask,
        prompts=tuple(e.row.prompt for e in examples),
        systems=tuple(e.prompt.system for e in examples),
        targets=tuple(e.row.target for e in examples),
    ).validate()


def utility_batch(examples: Sequence[EncodedChat]) -> UtilityBatch:
    """Pad encoded conversations to their own longest row."""
    input_ids, attention_mask = pad([e.prompt.ids + e.reply for e in examples], "right")
    labels, _ = pad([[-100] * len(e.prompt.ids) + e.reply for e in examples], "right", fill=-100)
    return UtilityBatch(input_ids, attention_mask, labels)


def behaviour_batch(
    examples: Sequence[EncodedHarmful | EncodedChat], attackable: Attackable
) -> BehaviourBatch:
    """Pad evaluation rows; rows with a harmful target also carry the tensors an attack needs."""
    prompt_ids, prompt_mask = pad([e.prompt.ids for e in examples], "left")
    harmful = [e for e in examples if isinstance(e, EncodedHarmful)]
    references = (e.row.target if isinstance(e.row, HarmfulRow) else e.row.reply for e in examples)
    return BehaviourBatch(
        keys=tuple(e.row.key for e in examples),
        prompts=tuple(e.row.prompt for e in examples),
        references=tuple(references),
        categories=tuple(e.row.category for e in examples),
        functional=tuple(e.row.functional if isinstance(e.row, HarmfulRow) else "" for e in examples),
        prompt_ids=prompt_ids,
        prompt_mask=prompt_mask,
        adversarial=adversarial_batch(harmful, attackable) if harmful else None,
    )


def training_batch(
    harmful: Sequence[EncodedHarmful], utility: Sequence[EncodedChat], attackable: Attackable
) -> TrainingBatch:
    """One micro-batch of both streams; an absent stream is None."""
    return TrainingBatch(
        adversarial=adversarial_batch(harmful, attackable) if harmful else None,
        utility=utility_batch(utility) if utility else None,
    )
