"""Evaluation data: harmful behaviours, harmless prompts and benign tasks with one right answer, as loaders of
BehaviourBatch."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from functools import partial
from typing import Literal, TypeVar

from torch.utils.data import DataLoader

from datamodules.batch import BehaviourBatch
from datamodules.rows import HarmfulRow, Row, RowProblem
from datamodules.sources.base import ChatSource, HarmfulSource
from datamodules.text.encoding import EncodedChat, EncodedHarmful, Encoder, behaviour_batch

T = TypeVar("T")
Subject = Literal["harmful", "harmless", "utility"]


@dataclass
class EvaluationSets:
    """What a run is judged on; none of it may occur in the training data."""

    harmful: list[HarmfulSource] = field(default_factory=list)
    """Harmful behaviours with targets: refusal and attack success."""
    harmless: list[ChatSource] = field(default_factory=list)
    """Harmless prompts, a reply is not needed: over-refusal."""
    utility: list[ChatSource] = field(default_factory=list)
    """Benign tasks with one right reply: exact match."""


class BehaviourData:
    """Encoded evaluation rows by subject.

    Args:
        sets: the sources.
        encoder: how rows are encoded; its policy for bad rows applies.
        batch_size: rows per evaluation batch.
    """

    def __init__(self, sets: EvaluationSets, encoder: Encoder, batch_size: int) -> None:
        self.encoder = encoder
        self.batch_size = batch_size
        self.examples: dict[str, list[EncodedHarmful] | list[EncodedChat]] = {
            "harmful": encoder.harmful(row for source in sets.harmful for row in source.rows()),
            "harmless": encoder.chats(
                (row for source in sets.harmless for row in source.rows()), need_reply=False
            ),
            "utility": encoder.chats(row for source in sets.utility for row in source.rows()),
        }

    def loader(
        self, subject: Subject, limit: int | None = None, rank: int = 0, world_size: int = 1
    ) -> DataLoader[BehaviourBatch]:
        """Batches of one subject in file order; `limit` takes an evenly spaced subset, ranks take every n-th
        row."""
        examples: Sequence[EncodedHarmful | EncodedChat] = self.examples[subject]
        rows = evenly(examples, limit)[rank::world_size]
        collate = partial(behaviour_batch, attackable=self.encoder.attackable)
        return DataLoader(rows, batch_size=self.batch_size, collate_fn=collate)  # type: ignore[arg-type]


def evenly(rows: Sequence[T], limit: int | None) -> Sequence[T]:
    """At most `limit` rows, evenly spaced, so that a subset spans a file sorted by category."""
    if limit is None or limit >= len(rows):
        return rows
    return [rows[i * len(rows) // limit] for i in range(limit)]


def normalised(text: str) -> str:
    """A prompt reduced to its letters and digits, for comparing data sets."""
    return " ".join("".join(c if c.isalnum() else " " for c in text.casefold()).split())


@dataclass(frozen=True)
class Overlap:
    """A training row whose prompt is also evaluated on."""

    trained: Row
    evaluated: Row
    subject: str

    @property
    def problem(self) -> RowProblem:
        return RowProblem(
            self.trained.where, f"the prompt is also in evaluation.{self.subject} ({self.evaluated.where})"
        )


def find_overlap(training: Sequence[Row], sets: EvaluationSets, allowed: Sequence[str]) -> list[Overlap]:
    """Training rows whose prompt, or the request behind it, letters and digits alone, is also evaluated on.

    Args:
        training: all training rows.
        sets: the evaluation sources.
        allowed: evaluation sets (`evaluation.harmful`, `.harmless`, `.utility`) whose overlap is accepted.
    """
    evaluated: dict[str, tuple[str, Row]] = {}
    for subject in ("harmful", "harmless", "utility"):
        if f"evaluation.{subject}" not in allowed:
            sources: list[HarmfulSource | ChatSource] = getattr(sets, subject)
            rows = (row for source in sources for row in source.rows() if not isinstance(row, RowProblem))
            evaluated |= {normalised(row.prompt): (subject, row) for row in rows}
    found = (
        (row, evaluated.get(normalised(row.prompt)) or evaluated.get(normalised(_origin(row))))
        for row in training
    )
    return [Overlap(row, match[1], match[0]) for row, match in found if match is not None]


def _origin(row: Row) -> str:
    return row.origin or row.prompt if isinstance(row, HarmfulRow) else row.prompt


def overlap_error(overlaps: Sequence[Overlap]) -> ValueError:
    """The refusal to train on evaluation prompts, naming the set, an example and the remedies."""
    first = overlaps[0]
    name = f"evaluation.{first.subject}"
    return ValueError(
        f"data.{name} overlaps the training data in {len(overlaps)} rows, first "
        f"{first.evaluated.where} = {first.trained.where} "
        f"({first.trained.prompt[:60]!r}); leave such rows out with data.on_overlap: skip, or allow "
        "the overlap by name with "
        f"data.allow_overlap: [{name}]"
    )
