"""Training data: a harmful and a utility stream with fixed counts per step, plus the evaluation sets of the
run."""

from __future__ import annotations

import json
import logging
import math
from collections.abc import Iterator
from functools import partial
from pathlib import Path

from lightning import LightningDataModule
from torch.utils.data import DataLoader, Dataset

from datamodules.batch import AdversarialBatch, BehaviourBatch, TrainingBatch
from datamodules.evaluation import BehaviourData, EvaluationSets, Subject, find_overlap, overlap_error
from datamodules.rows import HarmfulRow, Row, RowProblem
from datamodules.sources.base import ChatSource, HarmfulSource
from datamodules.streams import Item, StepSampler, Stream
from datamodules.text.chat_format import Attackable, ChatFormat
from datamodules.text.encoding import (
    EncodedChat,
    EncodedHarmful,
    Encoder,
    OnBadRow,
    adversarial_batch,
    training_batch,
)
from datamodules.text.tokenizers import TokenizerConfig, load_tokenizer

log = logging.getLogger(__name__)


class AdversarialData(LightningDataModule):
    """Harmful and utility streams for training, behaviours for evaluation.

    Args:
        tokenizer: the model's tokenizer and chat template.
        harmful: harmful requests to train on; each optimiser step sees `harmful_per_step` of them.
        utility: conversations to keep the model useful on; `utility_per_step` per step.
        evaluation: what the run is judged on; training rows must not occur in it.
        harmful_per_step: harmful rows per optimiser step, over all micro-batches and devices.
        utility_per_step: utility rows per optimiser step, likewise.
        micro_batches: forward-backward passes per optimiser step; must equal trainer.accumulate_grad_batches.
        max_length: longest allowed prompt + reply, in tokens.
        attackable: which prompt tokens attacks may perturb: the user's (`user`), or all of them (`prompt`) as
            in the CAT authors' code.
        system: system message of every conversation; null for none, '' for an empty one.
        on_bad_row: `error` stops at a bad row; `skip` leaves such rows out, counts them and lists them in the
            run folder.
        on_overlap: a training row whose prompt is also evaluated on is an `error`, or left out and listed
            (`skip`).
        allow_overlap: evaluation sets (e.g. evaluation.harmful) that may overlap the training data.
        bucket_window: micro-batches that are sorted by length together; 1 switches bucketing off.
        eval_batch_size: rows per evaluation batch.
        seed: seed of the order of rows; null takes seed_everything's.
        num_workers: worker processes of the training loader; rows are tokenised once up front, so 0 is
            usually best.
    """

    def __init__(
        self,
        tokenizer: TokenizerConfig,
        harmful: list[HarmfulSource] | None = None,
        utility: list[ChatSource] | None = None,
        evaluation: EvaluationSets | None = None,
        harmful_per_step: int = 8,
        utility_per_step: int = 56,
        micro_batches: int = 1,
        max_length: int = 256,
        attackable: Attackable = "user",
        system: str | None = None,
        on_bad_row: OnBadRow = "error",
        on_overlap: OnBadRow = "error",
        allow_overlap: list[str] | None = None,
        bucket_window: int = 8,
        eval_batch_size: int = 32,
        seed: int | None = None,
        num_workers: int = 0,
    ) -> None:
        super().__init__()
        for field, count, sources in (
            ("harmful", harmful_per_step, harmful),
            ("utility", utility_per_step, utility),
        ):
            if count < 0:
                raise ValueError(f"data.{field}_per_step: expected >= 0, got {count}")
            if micro_batches < 1 or count % micro_batches:
                raise ValueError(
                    f"data.{field}_per_step: expected a multiple of micro_batches {micro_batches}, "
                    f"got {count}; "
                    "every micro-batch must hold the same number of rows"
                )
            if count and not sources:
                raise ValueError(
                    f"data.{field}: expected at least one source for {field}_per_step {count}, got "
                    "none; add one or set it to 0"
                )
        if harmful_per_step + utility_per_step == 0:
            raise ValueError(
                "data.harmful_per_step and data.utility_per_step: expected a positive count, got 0 for both"
            )
        if max_length < 2:
            raise ValueError(f"data.max_length: expected >= 2 tokens, got {max_length}")
        self.tokenizer_config = tokenizer
        self.harmful_sources = harmful or []
        self.utility_sources = utility or []
        self.evaluation = evaluation or EvaluationSets()
        self.per_step = {"harmful": harmful_per_step, "utility": utility_per_step}
        self.micro_batches = micro_batches
        self.max_length = max_length
        self.attackable: Attackable = attackable
        self.system = system
        self.on_bad_row: OnBadRow = on_bad_row
        self.on_overlap = on_overlap
        self.allow_overlap = allow_overlap or []
        self.bucket_window = bucket_window
        self.eval_batch_size = eval_batch_size
        self.seed = 0 if seed is None else seed
        self.num_workers = num_workers
        self._chat: ChatFormat | None = None
        self._behaviours: BehaviourData | None = None
        self._training: _Examples | None = None

    @property
    def chat(self) -> ChatFormat:
        """The chat format, loaded on first use."""
        if self._chat is None:
            self._chat = ChatFormat(load_tokenizer(self.tokenizer_config))
        return self._chat

    @property
    def behaviours(self) -> BehaviourData:
        """The encoded evaluation rows."""
        assert self._behaviours is not None, "setup() has not run"
        return self._behaviours

    def setup(self, stage: str) -> None:
        """Encode all rows once. Raises: BadRowError or ValueError before any step is taken."""
        encoder = Encoder(self.chat, self.max_length, self.on_bad_row, self.system, self.attackable)
        if self._behaviours is None:
            self._behaviours = BehaviourData(self.evaluation, encoder, self.eval_batch_size)
        if stage == "fit" and self._training is None:
            self._check_micro_batches()
            self._training = self._encode_training(encoder)
        self._report(encoder.problems)

    def train_dataloader(self) -> DataLoader[TrainingBatch]:
        """Micro-batches from where training stands; an epoch is one pass over the harmful rows (or else the
        utility rows)."""
        assert self.trainer is not None and self._training is not None
        streams = {
            name: Stream(
                self._training.lengths(name),
                self.per_step[name] // self.micro_batches,
                self.seed + i,
                self.bucket_window,
            )
            for i, name in enumerate(("harmful", "utility"))
            if self.per_step[name]
        }
        world = self.trainer.world_size
        for name, stream in streams.items():
            if stream.batch_size % world:
                raise ValueError(
                    f"data.{name}_per_step: expected a multiple of micro_batches x devices = "
                    f"{self.micro_batches} x {world}, "
                    f"got {self.per_step[name]}"
                )
        leading = next(iter(streams))
        steps = math.ceil(len(self._training.rows[leading]) / self.per_step[leading])
        sampler = StepSampler(
            streams, steps * self.micro_batches, self._position, self.trainer.global_rank, world
        )
        return _StepLoader(
            self._training,  # type: ignore[arg-type]
            batch_sampler=sampler,
            collate_fn=partial(_collate, self.attackable),
            num_workers=self.num_workers,
            persistent_workers=False,
        )

    def harmful_batches(self) -> Iterator[AdversarialBatch]:
        """All harmful training rows in order, for what is computed once per row."""
        assert self._training is not None, "setup('fit') has not run"
        rows = self._training.rows["harmful"]
        for start in range(0, len(rows), self.eval_batch_size):
            yield adversarial_batch(rows[start : start + self.eval_batch_size], self.attackable)  # type: ignore[arg-type]

    def predict_dataloader(self) -> list[DataLoader[BehaviourBatch]]:
        """All evaluation prompts, harmful ones first."""
        subjects: tuple[Subject, ...] = ("harmful", "harmless", "utility")
        return [self.behaviours.loader(name) for name in subjects if self.behaviours.examples[name]]

    def _position(self) -> int:
        """Absolute number of the next micro-batch: a pure function of the optimiser steps taken."""
        assert self.trainer is not None
        return self.trainer.global_step * self.micro_batches

    def _check_micro_batches(self) -> None:
        assert self.trainer is not None
        accumulate = self.trainer.accumulate_grad_batches
        if accumulate != self.micro_batches:
            raise ValueError(
                f"data.micro_batches: expected trainer.accumulate_grad_batches {accumulate}, got "
                f"{self.micro_batches}; "
                "set trainer.accumulate_grad_batches: ${data.micro_batches}"
            )

    def _encode_training(self, encoder: Encoder) -> _Examples:
        rows: dict[str, list[Row | RowProblem]] = {
            "harmful": [row for source in self.harmful_sources for row in source.rows()]
            if self.per_step["harmful"]
            else [],
            "utility": [row for source in self.utility_sources for row in source.rows()]
            if self.per_step["utility"]
            else [],
        }
        trained = [row for part in rows.values() for row in part if not isinstance(row, RowProblem)]
        overlaps = find_overlap(trained, self.evaluation, self.allow_overlap)
        if overlaps and self.on_overlap == "error":
            raise overlap_error(overlaps)
        encoder.problems += [overlap.problem for overlap in overlaps]
        left_out = {overlap.trained for overlap in overlaps}
        rows = {name: [row for row in part if row not in left_out] for name, part in rows.items()}
        examples = _Examples(
            {
                "harmful": encoder.harmful(
                    r for r in rows["harmful"] if isinstance(r, HarmfulRow | RowProblem)
                ),
                "utility": encoder.chats(r for r in rows["utility"] if not isinstance(r, HarmfulRow)),
            }
        )
        for name, count in self.per_step.items():
            if count and not examples.rows[name]:
                raise ValueError(
                    f"data.{name}: expected usable rows, got none ({len(encoder.problems)} bad); see "
                    "data.on_bad_row"
                )
            log.info("%s stream: %d rows, %d per step", name, len(examples.rows[name]), count)
        return examples

    def _report(self, problems: list[RowProblem]) -> None:
        if not problems or self.trainer is None or not self.trainer.is_global_zero:
            return
        folder = Path(self.trainer.default_root_dir)
        folder.mkdir(parents=True, exist_ok=True)
        path = folder / "skipped_rows.jsonl"
        with path.open("w", encoding="utf-8") as stream:
            for problem in problems:
                stream.write(json.dumps({"where": problem.where, "reason": problem.reason}) + "\n")
        log.warning("left out %d rows, listed in %s; the first: %s", len(problems), path, problems[0])


class _Examples(Dataset[list[tuple[str, EncodedHarmful | EncodedChat]]]):
    """Both streams' encoded rows, indexed by a whole micro-batch at a time."""

    def __init__(self, rows: dict[str, list[EncodedHarmful] | list[EncodedChat]]) -> None:
        self.rows = rows

    def __getitem__(self, item: Item) -> tuple[str, EncodedHarmful | EncodedChat]:  # type: ignore[override]
        name, index = item
        return name, self.rows[name][index]

    def lengths(self, name: str) -> list[int]:
        return [example.length for example in self.rows[name]]


class _StepLoader(DataLoader[TrainingBatch]):
    """A loader that Lightning may resume in the middle of an epoch: its sampler asks the trainer where
    training stands."""

    def state_dict(self) -> dict[str, int]:
        return {}

    def load_state_dict(self, state_dict: dict[str, int]) -> None:
        """Nothing to restore: the position is a pure function of the optimiser steps taken."""


def _collate(attackable: Attackable, items: list[tuple[str, EncodedHarmful | EncodedChat]]) -> TrainingBatch:
    harmful = [example for _, example in items if isinstance(example, EncodedHarmful)]
    utility = [example for _, example in items if isinstance(example, EncodedChat)]
    return training_batch(harmful, utility, attackable)
