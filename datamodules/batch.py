"""The typed batches that cross folders. An adversarial example is one prompt with two continuations, never
two strings.

Prompts are left-padded and replies right-padded, so that a reply always starts right after its prompt. Masks
are explicit boolean tensors: token id 0 is an ordinary token. Ids are int64. Each batch is padded to its own
longest row.

The classes are not frozen, since Lightning rebuilds a batch field by field where it converts floats
(trainer.precision: bf16-true); nobody else assigns to a batch.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, fields, replace
from typing import NamedTuple, Self

import torch
from jaxtyping import Bool, Int
from torch import Tensor

from datamodules.rows import Turn
from datamodules.text.envelope import Envelope
from datamodules.text.spans import Attackable, attackable_in


class RowLengths(NamedTuple):
    """What a row's masks say, for the host, which would wait to read them from a GPU: tokens of its prompt,
    of its harmful and of its safe reply, and of the prompt those before the first attackable one."""

    prompt: int
    harmful: int
    safe: int
    fixed: int


class _Movable:
    """Moves every tensor field to a device; Lightning calls `.to` on a batch."""

    def to(self, device: torch.device | str, non_blocking: bool = False) -> Self:
        def move(value: object) -> object:
            return (
                value.to(device, non_blocking=non_blocking) if isinstance(value, Tensor | _Movable) else value
            )

        moved = {f.name: move(getattr(self, f.name)) for f in fields(self)}  # type: ignore[arg-type]
        return replace(self, **moved)  # type: ignore[type-var]


@dataclass(eq=False)
class AdversarialBatch(_Movable):
    """Prompts, each with a harmful target and a safe reply (both end with the template's end-of-turn
    token)."""

    example_id: Int[Tensor, " batch"]
    """Stable over runs and machines."""
    prompt_ids: Int[Tensor, "batch prompt"]
    prompt_mask: Bool[Tensor, "batch prompt"]
    """False on padding."""
    attackable_mask: Bool[Tensor, "batch prompt"]
    """True where an attack may perturb; a subset of prompt_mask."""
    harmful_ids: Int[Tensor, "batch harmful"]
    harmful_mask: Bool[Tensor, "batch harmful"]
    safe_ids: Int[Tensor, "batch safe"]
    safe_mask: Bool[Tensor, "batch safe"]
    prompts: tuple[str, ...] = ()
    """The texts behind `prompt_ids` that an attack may write: the users', or with `attackable: data` (or
    `untrusted`, where there is one) the documents. Attacks that rewrite text need them, others do not. Empty
    where unknown."""
    systems: tuple[str | None, ...] = ()
    targets: tuple[str, ...] = ()
    """The harmful targets as text."""
    instructions: tuple[str | None, ...] = ()
    """The trusted instructions before `prompts` where those are documents; None elsewhere."""
    documents: tuple[str | None, ...] = ()
    """The documents behind `prompts` where those are the users' texts; None where there is none."""
    lengths: tuple[RowLengths, ...] = ()
    """Empty where unknown; whoever changes a mask leaves it empty."""

    def __len__(self) -> int:
        return self.prompt_ids.shape[0]

    def counted(self) -> tuple[RowLengths, ...]:
        """The lengths, read from the masks."""
        before = self.prompt_mask & (self.attackable_mask.cumsum(1) == 0)
        masks = (self.prompt_mask, self.harmful_mask, self.safe_mask, before)
        return tuple(RowLengths(*own) for own in torch.stack([mask.sum(1) for mask in masks], 1).tolist())

    def envelope(self, row: int) -> Envelope:
        """What stands around a row's text."""
        return Envelope(
            *(own[row] if own else None for own in (self.systems, self.instructions, self.documents))
        )

    def select(self, rows: Sequence[int]) -> Self:
        """Some of the rows, as wide as before."""
        index = torch.tensor(rows, dtype=torch.long, device=self.prompt_ids.device)
        picked: dict[str, object] = {}
        for f in fields(self):
            value = getattr(self, f.name)
            picked[f.name] = (
                value[index]
                if isinstance(value, Tensor)
                else tuple(value[i] for i in rows)
                if value
                else value
            )
        return replace(self, **picked)  # type: ignore[arg-type]

    def validate(self) -> Self:
        """Check the invariants; called where batches are made (on the CPU), not on the hot path.

        Raises: ValueError naming the field that breaks the contract.
        """
        batch_size = len(self)
        for name in ("prompt_mask", "attackable_mask", "harmful_mask", "safe_mask"):
            if getattr(self, name).dtype != torch.bool:
                raise ValueError(
                    f"expected {name} of dtype bool, got {getattr(self, name).dtype}; make masks "
                    "explicit booleans"
                )
        for ids, mask in (
            ("prompt_ids", "prompt_mask"),
            ("harmful_ids", "harmful_mask"),
            ("safe_ids", "safe_mask"),
        ):
            if getattr(self, ids).shape != getattr(self, mask).shape or len(getattr(self, ids)) != batch_size:
                raise ValueError(
                    f"expected {ids} and {mask} of one shape with {batch_size} rows, got "
                    f"{tuple(getattr(self, ids).shape)}"
                )
        if not _is_left_padded(self.prompt_mask):
            raise ValueError(
                "expected prompt_mask left-padded with at least one token per row; the reply must "
                "follow the prompt directly"
            )
        for name in ("harmful_mask", "safe_mask"):
            if not _is_left_padded(getattr(self, name).flip(1)):
                raise ValueError(
                    f"expected {name} right-padded with at least one token per row, got an empty or "
                    "left-padded reply"
                )
        if self.lengths and self.lengths != self.counted():
            raise ValueError("expected lengths as the masks have them, got others; leave them empty")
        if (self.attackable_mask & ~self.prompt_mask).any():
            raise ValueError("expected attackable_mask within prompt_mask, got attackable padding")
        if not self.attackable_mask.any(1).all():
            raise ValueError(
                "expected at least one attackable token per row, got none; set attackable: prompt or "
                "give a non-empty prompt"
            )
        return self


@dataclass(eq=False)
class UtilityBatch(_Movable):
    """Conversations to keep the model useful on, right-padded."""

    input_ids: Int[Tensor, "batch token"]
    attention_mask: Bool[Tensor, "batch token"]
    labels: Int[Tensor, "batch token"]
    """-100 on every token that is not part of a learned reply; a conversation has several."""
    num_scored: int | None = None
    """How many labels beyond the first column are tokens, for the host; None where unknown."""
    common: int = 0
    """So many first tokens are the same in all rows, each before any that predicts a learned one."""

    def __len__(self) -> int:
        return self.input_ids.shape[0]


@dataclass(eq=False)
class TrainingBatch(_Movable):
    """One micro-batch: a fixed number of adversarial and of utility rows; either stream may be absent."""

    adversarial: AdversarialBatch | None
    utility: UtilityBatch | None
    attack: AdversarialBatch | None = None
    """Rows to attack now: `adversarial` and, in their order, those of the following micro-batches that come
    without this field. None: `adversarial` alone, or it has been attacked with an earlier micro-batch."""
    weights: tuple[float, float] = (1.0, 1.0)
    """Of the two streams' mean losses: the step's loss is a mean over all micro-batches, and some may lack a
    stream."""


@dataclass(eq=False)
class EvaluationBatch(_Movable):
    """Evaluation prompts with their texts.

    `adversarial` holds the tensors where the rows have a harmful target.
    """

    keys: tuple[str, ...]
    prompts: tuple[str, ...]
    expected: tuple[str, ...]
    """The harmful target (harmful rows) or the expected reply (benign rows), as text; '' where there is
    none."""
    categories: tuple[str, ...]
    """Semantic category of every row, '' where there is none."""
    functional: tuple[str, ...]
    """HarmBench's functional category (standard, contextual, copyright), '' where there is none."""
    prompt_ids: Int[Tensor, "batch prompt"]
    prompt_mask: Bool[Tensor, "batch prompt"]
    adversarial: AdversarialBatch | None = None
    systems: tuple[str | None, ...] = ()
    """System message of every conversation, None where there is none."""
    histories: tuple[tuple[Turn, ...], ...] = ()
    """Earlier turns of every conversation; `prompt_ids` hold them already."""
    documents: tuple[str | None, ...] = ()
    """The untrusted document of every prompt, None where there is none."""
    answers: tuple[str, ...] = ()
    """The reply to the trusted instruction, where `expected` is what a document's hidden one wants; else
    ''."""
    forbidden: tuple[str, ...] = ()
    """What must not appear in the reply; '' for what is expected of a harmful row."""

    def __len__(self) -> int:
        return len(self.prompts)

    def written(self, row: int, attackable: Attackable) -> tuple[str, Envelope]:
        """The text of a row that an attack may write, and what it is sent in.

        Raises: ValueError where that is a document and the row has none.
        """
        system = self.systems[row] if self.systems else None
        document = self.documents[row] if self.documents else None
        if attackable_in(attackable, document is not None) != "data":
            return self.prompts[row], Envelope(system, document=document)
        if document is None:
            raise ValueError(
                f"{self.keys[row]}: expected a row with a document, got none; under attackable: data set "
                "benign: null, or use rows with documents"
            )
        return document, Envelope(system, self.prompts[row])


def _is_left_padded(mask: Bool[Tensor, "batch token"]) -> bool:
    """True when every row is False…False True…True with at least one True."""
    return bool(mask[:, -1].all()) and not bool((mask[:, :-1] & ~mask[:, 1:]).any())


def pad(
    rows: Sequence[Sequence[int]], side: str, fill: int = 0
) -> tuple[Int[Tensor, "row token"], Bool[Tensor, "row token"]]:
    """Pad token lists to ids and mask; `side` is 'left' or 'right'."""
    length = max(len(row) for row in rows)
    ids = torch.full((len(rows), length), fill, dtype=torch.long)
    mask = torch.zeros(len(rows), length, dtype=torch.bool)
    for i, row in enumerate(rows):
        where = slice(length - len(row), length) if side == "left" else slice(0, len(row))
        ids[i, where] = torch.tensor(row, dtype=torch.long)
        mask[i, where] = True
    return ids, mask
