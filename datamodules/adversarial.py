"""Training data: a harmful and a utility stream with fixed counts per step, beside the evaluation sets of the
run."""

from __future__ import annotations

import logging
import math
from collections.abc import Iterator, Sequence
from functools import partial
from importlib.metadata import version
from pathlib import Path
from typing import Any

from torch.utils.data import DataLoader, Dataset

from datamodules.batch import AdversarialBatch, TrainingBatch
from datamodules.division import STREAMS, Division
from datamodules.evaluation import EvaluationData, EvaluationSets, no_usable_rows
from datamodules.fields import Count, NonNegativeInt, checked
from datamodules.overlap import EvaluatedTexts, overlap_error
from datamodules.rows import ChatRow, HarmfulRow, RowProblem
from datamodules.settings import settings_digest
from datamodules.sources.base import ChatSource, HarmfulSource, collecting_passes
from datamodules.sources.gather import gather, stream, twin_keys
from datamodules.stored import FORMAT, StoredChat, StoredChats, is_complete, lengths_of, write_store
from datamodules.streams import ATTACKED, Item, StepSampler, Stream
from datamodules.text.chat_format import Attackable
from datamodules.text.encoding import (
    EncodedChat,
    EncodedHarmful,
    Encoder,
    EncodingConfig,
    OnBadRow,
    adversarial_batch,
    training_batch,
)
from datamodules.text.tokenizers import TokenizerConfig

log = logging.getLogger(__name__)
Example = EncodedHarmful | EncodedChat | StoredChat


@checked
class AdversarialData(EvaluationData):
    """Harmful and utility streams for training, behaviours for evaluation.

    Args:
        tokenizer: the model's tokenizer and chat template.
        harmful: harmful requests to train on; each optimiser step sees `harmful_per_step` of them.
        utility: conversations to keep the model useful on; `utility_per_step` per step.
        evaluation: what the run is judged on; training rows must not occur in it.
        encoding: how rows become tokens, and what happens to those that cannot.
        harmful_per_step: harmful rows per optimiser step, over all micro-batches and devices.
        utility_per_step: utility rows per optimiser step, likewise.
        micro_batches: forward-backward passes per optimiser step; must equal trainer.accumulate_grad_batches.
        attack_batch: harmful rows per call of the attack, over all devices; null attacks all of a step's at
            once, however many micro-batches they are trained on in.
        outer_batch: harmful rows per forward-backward pass, over all devices; null divides them evenly among
            the micro-batches. They fill the last micro-batches, utility rows the first ones.
        utility_batch: utility rows per pass, likewise.
        bucket_window: optimiser steps whose rows are sorted by length together; 1 sorts within a step only.
        on_overlap: a training row whose prompt is also evaluated on is an `error`, or left out and listed
            (`skip`).
        allow_overlap: evaluation sets (e.g. evaluation.harmful) that may overlap the training data.
        seed: seed of the order of rows; null for seed_everything's, or 0 where nothing is set.
        utility_store: folder in which encoded utility rows are kept, for sources of millions of rows (needs
            pyarrow); runs may share one. Null keeps them in memory.
    """

    CHECKED_TOGETHER = (Division,)
    """What checks arguments that have to go together, before anything is built."""

    def __init__(
        self,
        tokenizer: TokenizerConfig,
        harmful: list[HarmfulSource] | None = None,
        utility: list[ChatSource] | None = None,
        evaluation: EvaluationSets | None = None,
        encoding: EncodingConfig | None = None,
        harmful_per_step: NonNegativeInt = 8,
        utility_per_step: NonNegativeInt = 56,
        micro_batches: Count = 1,
        attack_batch: Count | None = None,
        outer_batch: Count | None = None,
        utility_batch: Count | None = None,
        bucket_window: Count = 8,
        on_overlap: OnBadRow = "error",
        allow_overlap: list[str] | None = None,
        seed: NonNegativeInt | None = None,
        utility_store: str | None = None,
    ) -> None:
        super().__init__(tokenizer, evaluation, encoding)
        self.harmful_sources = harmful or []
        self.utility_sources = utility or []
        self.micro_batches = micro_batches
        self.division = Division(
            harmful_per_step, utility_per_step, micro_batches, attack_batch, outer_batch, utility_batch
        )
        self.bucket_window = bucket_window
        self.on_overlap: OnBadRow = on_overlap
        self.allow_overlap = allow_overlap or []
        self.seed = seed or 0
        self.utility_store = utility_store
        self._training: _Examples | None = None
        self._check_counts()

    def setup(self, stage: str) -> None:
        """Encode all rows once. Raises: BadRowError or ValueError before any step is taken."""
        if stage != "fit" or self._training is not None:
            super().setup(stage)
            return
        self._check_accumulation()
        encoder = self.encoder
        self._training = self._encode_training(encoder)
        self._report(encoder.problems, stage)

    def train_dataloader(self) -> DataLoader[TrainingBatch]:
        """Micro-batches from where training stands; an epoch is one pass over the harmful rows (or else the
        utility rows)."""
        assert self.trainer is not None and self._training is not None
        world, division = self.trainer.world_size, self.division
        division.check_devices(world)
        streams = {
            name: Stream(
                lengths_of(self._training.rows[name]),
                count,
                self.seed + i,
                self.bucket_window,
            )
            for i, name in enumerate(STREAMS)
            if (count := division.per_step(name))
        }
        leading = next(iter(streams))
        steps = math.ceil(len(self._training.rows[leading]) / division.per_step(leading))
        sampler = StepSampler(
            streams, division, steps * self.micro_batches, self._position, self.trainer.global_rank, world
        )
        return _StepLoader(
            self._training,  # type: ignore[arg-type]
            batch_sampler=sampler,
            collate_fn=partial(_collate, self.encoding.attackable, division),
        )

    @property
    def collecting_passes(self) -> int:
        """Passes of the attacks that training rows were collected with, and of what generated replies."""
        return collecting_passes([*self.harmful_sources, *self.utility_sources])

    def harmful_batches(self) -> Iterator[AdversarialBatch]:
        """All harmful training rows in order, for what is computed once per row."""
        assert self._training is not None, "setup('fit') has not run"
        rows, size = self._training.rows["harmful"], self.evaluation.batch_size
        for start in range(0, len(rows), size):
            part = rows[start : start + size]
            yield adversarial_batch(part, self.encoding.attackable)  # type: ignore[arg-type]

    def _position(self) -> int:
        """Absolute number of the next micro-batch: a pure function of the optimiser steps taken."""
        assert self.trainer is not None
        return self.trainer.global_step * self.micro_batches

    def _check_counts(self) -> None:
        sources = {"harmful": self.harmful_sources, "utility": self.utility_sources}
        counts = {name: self.division.per_step(name) for name in STREAMS}
        for name, count in counts.items():
            if count and not sources[name]:
                raise ValueError(
                    f"data.{name}: expected at least one source for {name}_per_step {count}, got "
                    "none; add one or set it to 0"
                )
        if not any(counts.values()):
            raise ValueError(
                "data.harmful_per_step and data.utility_per_step: expected a positive count, got 0 for "
                "both; an evaluation alone takes datamodules.evaluation.EvaluationData"
            )

    def _check_accumulation(self) -> None:
        accumulate = 1 if self.trainer is None else self.trainer.accumulate_grad_batches
        if accumulate != self.micro_batches:
            raise ValueError(
                f"data.micro_batches: expected trainer.accumulate_grad_batches {accumulate}, got "
                f"{self.micro_batches}; set trainer.accumulate_grad_batches: ${{data.micro_batches}}"
            )

    def _encode_training(self, encoder: Encoder) -> _Examples:
        """Encode the evaluation rows, then the training rows that are not among them."""
        evaluated = self._encode_evaluation(encoder)
        harmful = gather("harmful", self.harmful_sources if self.division.harmful_per_step else [])
        if self.harmful_sources and not self.division.harmful_per_step:
            log.warning("data.harmful_per_step is 0: data.harmful is not read, and nothing is attacked")
        sources = self.utility_sources if self.division.utility_per_step else []
        stored = self.utility_store is not None and bool(sources)
        utility = [] if stored else gather("utility", sources)
        known = EvaluatedTexts(evaluated, self.allow_overlap)  # type: ignore[arg-type]
        kept_harmful, kept_utility = self._apart_from(known, harmful, utility, encoder.problems)
        examples = _Examples(
            {
                "harmful": encoder.harmful(map(_learnable, kept_harmful)),
                "utility": self._stored(encoder, known) if stored else encoder.chats(kept_utility),
            }
        )
        for name in STREAMS:
            count = self.division.per_step(name)
            if count and not examples.rows[name]:
                raise no_usable_rows(name, encoder)
            log.info("%s stream: %d rows, %d per step", name, len(examples.rows[name]), count)
        return examples

    def _apart_from(
        self,
        known: EvaluatedTexts,
        harmful: Sequence[HarmfulRow | RowProblem],
        utility: Sequence[ChatRow | RowProblem],
        problems: list[RowProblem],
    ) -> tuple[list[HarmfulRow | RowProblem], list[ChatRow | RowProblem]]:
        """Both streams without rows that are also evaluated on, which are refused, or entered as problems."""
        found = [None if isinstance(row, RowProblem) else known.overlap(row) for row in (*harmful, *utility)]
        overlaps = [overlap for overlap in found if overlap is not None]
        if overlaps and self.on_overlap == "error":
            raise overlap_error(overlaps)
        problems += [overlap.problem for overlap in overlaps]
        of_harmful, of_utility = found[: len(harmful)], found[len(harmful) :]
        return (
            [row for row, overlap in zip(harmful, of_harmful, strict=True) if overlap is None],
            [row for row, overlap in zip(utility, of_utility, strict=True) if overlap is None],
        )

    def _stored(self, encoder: Encoder, known: EvaluatedTexts) -> StoredChats:
        """The utility rows on disk, encoded first where they are not there yet, by the first of several
        processes. Raises: as in memory, for the first rows that are wrong."""
        assert self.utility_store is not None

        def encode(rows: list[ChatRow | RowProblem]) -> tuple[list[EncodedChat], list[RowProblem]]:
            own = self.encoder
            kept = self._apart_from(known, [], rows, own.problems)[1]
            return own.chats(kept), own.problems

        decides = self.utility_sources, self.tokenizer_config, self.encoding, self.on_overlap, known.texts
        folder = Path(self.utility_store) / settings_digest(FORMAT, version("thundercat"), *decides)
        if not is_complete(folder) and (self.trainer is None or self.trainer.is_global_zero):
            write_store(folder, stream("utility", self.utility_sources), encode)
        if self.trainer is not None:
            self.trainer.strategy.barrier()
        rows = StoredChats(folder)
        twins = rows.twins()
        if twins is not None:
            raise twin_keys("utility", *twins)
        encoder.problems += rows.problems
        return rows


class _Examples(Dataset[tuple[str, Example]]):
    """Both streams' encoded rows by (stream, number)."""

    def __init__(self, rows: dict[str, list[EncodedHarmful] | list[EncodedChat] | StoredChats]) -> None:
        self.rows = rows

    def __getitem__(self, item: Item) -> tuple[str, Example]:  # type: ignore[override]
        name, index = item
        return name, self.rows["harmful" if name == ATTACKED else name][index]


class _StepLoader(DataLoader[TrainingBatch]):
    """A loader that Lightning may resume in the middle of an epoch: its sampler asks the trainer where
    training stands."""

    def state_dict(self) -> dict[str, int]:
        return {}

    def load_state_dict(self, state_dict: dict[str, int]) -> None:
        """Nothing to restore: the position is a pure function of the optimiser steps taken."""


def _collate(attackable: Attackable, division: Division, items: list[tuple[str, Example]]) -> TrainingBatch:
    rows: dict[str, list[Any]] = {name: [] for name in (ATTACKED, *STREAMS)}
    for name, example in items:
        rows[name].append(example)
    weights = division.weight("harmful"), division.weight("utility")
    return training_batch(rows["harmful"], rows["utility"], attackable, rows[ATTACKED], weights)


def _learnable(row: HarmfulRow | RowProblem) -> HarmfulRow | RowProblem:
    """The row, or that it asks to learn and to unlearn the same text."""
    if isinstance(row, HarmfulRow) and row.target.strip() == row.safe_reply.strip():
        return RowProblem(row.where, "the target and the safe reply are the same text")
    return row
