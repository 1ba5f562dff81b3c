"""Rows -> token ids, with a policy for rows that cannot be used; and token ids -> padded batches."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field, replace
from typing import Annotated, Literal, Protocol, TypeVar

import torch
from annotated_types import Ge

from datamodules.batch import AdversarialBatch, EvaluationBatch, TrainingBatch, UtilityBatch, pad
from datamodules.fields import checked
from datamodules.rows import BadRowError, ChatRow, HarmfulRow, Row, RowProblem, example_id, texts
from datamodules.text.chat_format import Attackable, ChatFormat, PromptTokens
from datamodules.text.data_part import DataMarks
from datamodules.text.spans import attackable_in, writable

OnBadRow = Literal["error", "skip"]
IGNORED = -100
"""Label of a token that is not learned."""


@checked
@dataclass(frozen=True)
class EncodingConfig:
    """How rows become tokens, the same for training and evaluation."""

    max_length: Annotated[int, Ge(2)] = 256
    """Longest allowed prompt + reply, in tokens."""
    attackable: Attackable = "user"
    """Which prompt tokens attacks may perturb: the user's (`user`), those of the untrusted document (`data`),
    those of the document where there is one and else the user's (`untrusted`, for mixtures of both kinds of
    rows), or all of them (`prompt`) as in the CAT authors' code."""
    system: str | None = None
    """System message of every conversation that has none of its own; null for none, '' for an empty one."""
    on_bad_row: OnBadRow = "error"
    """`error` stops at a bad row; `skip` leaves such rows out, counts them and lists them in the run
    folder."""
    data_marks: DataMarks = field(default_factory=DataMarks)
    """What stands around a row's document, and what happens to a document that holds it."""


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
    def ids(self) -> list[int]:
        return self.prompt.ids + self.reply

    @property
    def length(self) -> int:
        return len(self.prompt.ids) + len(self.reply)

    @property
    def labels(self) -> list[int]:
        """The ids that are learned, -100 elsewhere: the reply and, unless the row says otherwise, all earlier
        ones."""
        earlier = self.prompt.replied() if self.row.train_on == "all" else [False] * len(self.prompt.ids)
        learned = zip(self.prompt.ids, earlier, strict=True)
        return [token if replied else IGNORED for token, replied in learned] + self.reply


class Learned(Protocol):
    """A conversation that is learned, wherever it is kept."""

    @property
    def ids(self) -> list[int]: ...

    @property
    def labels(self) -> list[int]:
        """The ids that are learned, -100 elsewhere."""
        ...


R = TypeVar("R", HarmfulRow, ChatRow)
E = TypeVar("E", EncodedHarmful, EncodedChat)


class Encoder:
    """Encodes rows and keeps account of those that it could not use.

    Args:
        chat: the chat format.
        config: the settings; under `on_bad_row: skip` bad rows are collected in `problems`.
    """

    def __init__(self, chat: ChatFormat, config: EncodingConfig) -> None:
        self.chat = chat
        self.config = config
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
            reply = self.chat.reply(prompt, row.reply) if row.reply or need_reply else []
            return EncodedChat(row, prompt, self._without_end(reply) if row.cut else reply)

        return self._collect(rows, encode)

    def _without_end(self, reply: list[int]) -> list[int]:
        end = self.chat.end_of_turn
        return reply[: -len(end)] if end and reply[-len(end) :] == end else reply

    def _prompt(self, row: Row) -> PromptTokens:
        _check_texts(row)
        if not row.prompt.strip():
            raise ValueError("the prompt is empty")
        system = row.system if row.system is not None else self.config.system
        history = () if isinstance(row, HarmfulRow) else row.history
        prompt = self.chat.prompt(row.prompt, system, history, row.data)
        # Nothing attacks a conversation, so one without a document may stand beside rows that have one.
        span = "user" if isinstance(row, ChatRow) and row.data is None else self.config.attackable
        if not any(prompt.attackable(span)):
            hint = "; attackable: data needs a document in every row" if span == "data" else ""
            raise ValueError(f"the prompt has no attackable token{hint}")
        return prompt

    def _collect(self, rows: Iterable[R | RowProblem], encode: Callable[[R], E]) -> list[E]:
        encoded = []
        for row in rows:
            problem = row if isinstance(row, RowProblem) else None
            if not isinstance(row, RowProblem):
                try:
                    example = encode(row)
                    if example.length > self.config.max_length:
                        raise ValueError(
                            f"{example.length} tokens are more than max_length {self.config.max_length}"
                        )
                    encoded.append(example)
                except ValueError as error:
                    problem = RowProblem(row.where, str(error))
            if problem is not None:
                self._report(problem)
        return encoded

    def _report(self, problem: RowProblem) -> None:
        if self.config.on_bad_row == "error":
            raise BadRowError(
                f"bad row: {problem}; mend the row, or set data.encoding.on_bad_row: skip to leave such rows "
                "out and list them"
            )
        self.problems.append(problem)


def _check_texts(row: Row) -> None:
    """Raises: ValueError for what a tokenizer cannot take, naming which text it is."""
    for name, text in texts(row).items():
        if not isinstance(text, str):
            raise ValueError(f"the {name} is not text but {type(text).__name__}")
        if "\0" in text:
            raise ValueError(f"the {name} holds a NUL character; remove it")
        try:
            text.encode()
        except UnicodeEncodeError as error:
            half = text[error.start]
            raise ValueError(f"the {name} holds half a character ({half!a}); remove it") from error


def adversarial_batch(examples: Sequence[EncodedHarmful], attackable: Attackable) -> AdversarialBatch:
    """Pad encoded harmful rows to their own longest prompt and replies."""
    prompt_ids, prompt_mask = pad([e.prompt.ids for e in examples], "left")
    attack, _ = pad([[int(a) for a in e.prompt.attackable(attackable)] for e in examples], "left")
    harmful_ids, harmful_mask = pad([e.harmful for e in examples], "right")
    safe_ids, safe_mask = pad([e.safe for e in examples], "right")
    batch = AdversarialBatch(
        example_id=torch.tensor([example_id(e.row.key) for e in examples]),
        prompt_ids=prompt_ids,
        prompt_mask=prompt_mask,
        attackable_mask=attack.bool() & prompt_mask,
        harmful_ids=harmful_ids,
        harmful_mask=harmful_mask,
        safe_ids=safe_ids,
        safe_mask=safe_mask,
        prompts=tuple(writable(attackable, e.row.prompt, e.prompt.data) for e in examples),
        systems=tuple(e.prompt.system for e in examples),
        targets=tuple(e.row.target for e in examples),
        instructions=tuple(e.row.prompt if _is_document(e, attackable) else None for e in examples),
        documents=tuple(None if _is_document(e, attackable) else e.prompt.data for e in examples),
    )
    return replace(batch, lengths=batch.counted()).validate()


def _is_document(example: EncodedHarmful, attackable: Attackable) -> bool:
    return attackable_in(attackable, example.prompt.data is not None) == "data"


def utility_batch(examples: Sequence[Learned]) -> UtilityBatch:
    """Pad encoded conversations to their own longest row."""
    input_ids, attention_mask = pad([e.ids for e in examples], "right")
    labels, _ = pad([e.labels for e in examples], "right", fill=IGNORED)
    learned = labels[:, 1:] != IGNORED
    # A common place predicts nothing that is learned, and is no row's last.
    same = (input_ids == input_ids[:1]).all(0)[:-1] & (attention_mask[:, 1:] & ~learned).all(0)
    common = int(same.long().cumprod(0).sum())
    return UtilityBatch(input_ids, attention_mask, labels, int(learned.sum()), common)


def evaluation_batch(
    examples: Sequence[EncodedHarmful | EncodedChat], attackable: Attackable
) -> EvaluationBatch:
    """Pad evaluation rows; rows with a harmful target also carry the tensors an attack needs."""
    prompt_ids, prompt_mask = pad([e.prompt.ids for e in examples], "left")
    harmful = [e for e in examples if isinstance(e, EncodedHarmful)]
    expected = (e.row.target if isinstance(e.row, HarmfulRow) else e.row.reply for e in examples)
    return EvaluationBatch(
        keys=tuple(e.row.key for e in examples),
        prompts=tuple(e.row.prompt for e in examples),
        expected=tuple(expected),
        categories=tuple(e.row.category for e in examples),
        functional=tuple(e.row.functional if isinstance(e.row, HarmfulRow) else "" for e in examples),
        prompt_ids=prompt_ids,
        prompt_mask=prompt_mask,
        adversarial=adversarial_batch(harmful, attackable) if harmful else None,
        systems=tuple(e.prompt.system for e in examples),
        histories=tuple(() if isinstance(e.row, HarmfulRow) else e.row.history for e in examples),
        documents=tuple(e.prompt.data for e in examples),
        answers=tuple(_answer(e.row) for e in examples),
        forbidden=tuple(e.row.forbidden if isinstance(e.row, HarmfulRow) else "" for e in examples),
    )


def _answer(row: Row) -> str:
    """What the trusted instruction is to be answered with, where a hidden one has a target of its own."""
    return row.safe_reply if isinstance(row, HarmfulRow) and row.data is not None else ""


def training_batch(
    harmful: Sequence[EncodedHarmful],
    utility: Sequence[Learned],
    attackable: Attackable,
    attacked: Sequence[EncodedHarmful] = (),
    weights: tuple[float, float] = (1.0, 1.0),
) -> TrainingBatch:
    """One micro-batch of both streams; an absent stream is None. The rest as in TrainingBatch."""
    return TrainingBatch(
        adversarial=adversarial_batch(harmful, attackable) if harmful else None,
        utility=utility_batch(utility) if utility else None,
        attack=adversarial_batch(attacked, attackable) if attacked else None,
        weights=weights,
    )
