"""Evaluation data: harmful behaviours, harmless prompts and benign tasks with one right answer, as loaders of
EvaluationBatch."""

from __future__ import annotations

import json
import logging
from collections.abc import Sequence
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Literal

from lightning import LightningDataModule
from torch.utils.data import DataLoader

from datamodules.batch import EvaluationBatch
from datamodules.fields import Count, checked
from datamodules.rows import Row, RowProblem
from datamodules.sources.base import ChatSource, HarmfulSource
from datamodules.sources.gather import evenly, gather
from datamodules.text.chat_format import ChatFormat
from datamodules.text.encoding import (
    EncodedChat,
    EncodedHarmful,
    Encoder,
    EncodingConfig,
    evaluation_batch,
)
from datamodules.text.tokenizers import TokenizerConfig, load_tokenizer

log = logging.getLogger(__name__)

Subject = Literal["harmful", "harmless", "utility"]
SUBJECTS: tuple[Subject, ...] = ("harmful", "harmless", "utility")


@checked
@dataclass
class Block:
    """A named set of evaluation prompts, e.g. one kind of prompt that training has not seen."""

    harmful: list[HarmfulSource] = field(default_factory=list)
    """Harmful requests with targets: refused, or served."""
    harmful_prompts: list[ChatSource] = field(default_factory=list)
    """Harmful requests without targets: refused or not, and nothing that an attack could aim at."""
    harmless: list[ChatSource] = field(default_factory=list)
    """With the expected reply where there is one right one."""


@checked
@dataclass
class EvaluationSets:
    """What a run is judged on; none of it may occur in the training data."""

    harmful: list[HarmfulSource] = field(default_factory=list)
    """Harmful behaviours with targets: refusal and attack success."""
    harmless: list[ChatSource] = field(default_factory=list)
    """Harmless prompts, a reply is not needed: over-refusal."""
    utility: list[ChatSource] = field(default_factory=list)
    """Benign tasks with one right reply: exact match."""
    blocks: dict[str, Block] = field(default_factory=dict)
    """Further sets by name, each measured by itself (callbacks.evaluations.blocks)."""
    batch_size: Count = 32
    """Rows per evaluation batch."""


class EvaluationData(LightningDataModule):
    """What a model is judged on, without any training data.

    Args:
        tokenizer: the model's tokenizer and chat template.
        evaluation: the evaluation sources.
        encoding: how rows become tokens, and what happens to those that cannot.
    """

    def __init__(
        self,
        tokenizer: TokenizerConfig,
        evaluation: EvaluationSets | None = None,
        encoding: EncodingConfig | None = None,
    ) -> None:
        super().__init__()
        self.tokenizer_config = tokenizer
        self.evaluation = evaluation or EvaluationSets()
        self.encoding = encoding or EncodingConfig()
        self.examples: dict[str, list[EncodedHarmful] | list[EncodedChat]] = {}
        """The encoded evaluation rows by subject, in file order; filled by `setup`."""
        self.blocks: dict[str, dict[Subject, list[EncodedHarmful] | list[EncodedChat]]] = {}
        """The same of every named set."""
        self._chat: ChatFormat | None = None

    @property
    def chat(self) -> ChatFormat:
        """The chat format, loaded on first use."""
        if self._chat is None:
            self._chat = ChatFormat(load_tokenizer(self.tokenizer_config), self.encoding.data_marks)
        return self._chat

    @property
    def encoder(self) -> Encoder:
        """A new encoder with this run's settings and an empty account of problems."""
        return Encoder(self.chat, self.encoding)

    def setup(self, stage: str) -> None:
        """Encode all evaluation rows once. Raises: BadRowError or ValueError before any model is asked."""
        if not self.examples:
            encoder = self.encoder
            self._encode_evaluation(encoder)
            self._report(encoder.problems, stage)

    def loader(
        self,
        subject: Subject,
        limit: int | None = None,
        rank: int = 0,
        world_size: int = 1,
        block: str = "",
        against: str = "",
    ) -> DataLoader[EvaluationBatch]:
        """Batches of one subject in file order; `limit` takes an evenly spaced subset, ranks take every n-th
        row; `block` is the named set, '' the main one, and `against` one under the same keys: a limit takes
        the rows whose partners it takes there."""
        rows = evenly(self.rows_of(subject, block), limit)
        if against and limit is not None:
            partners = {own.row.key for own in evenly(self.rows_of(subject, against), limit)}
            rows = [own for own in self.rows_of(subject, block) if own.row.key in partners] or rows
        rows = rows[rank::world_size]
        collate = partial(evaluation_batch, attackable=self.encoding.attackable)
        size = self.evaluation.batch_size
        return DataLoader(rows, batch_size=size, collate_fn=collate)  # type: ignore[arg-type]

    def rows_of(self, subject: Subject, block: str = "") -> Sequence[EncodedHarmful | EncodedChat]:
        """The encoded rows of a subject in a named set, or in the main one."""
        return self.blocks[block].get(subject, []) if block else self.examples[subject]

    def predict_dataloader(self) -> list[DataLoader[EvaluationBatch]]:
        """All evaluation prompts, harmful ones first; of several processes each has its share.

        Raises: ValueError where a process would have none: it would leave the others waiting.
        """
        rank, world_size = (self.trainer.global_rank, self.trainer.world_size) if self.trainer else (0, 1)
        most = max((len(rows) for rows in self.examples.values()), default=0)
        if 0 < most < world_size:
            raise ValueError(
                f"data.evaluation: expected a prompt for each of {world_size} processes, got {most}; set "
                f"trainer.devices: {most}, or add rows"
            )
        return [
            self.loader(subject, rank=rank, world_size=world_size)
            for subject in SUBJECTS
            if len(self.examples[subject]) > rank
        ]

    def _encode_evaluation(self, encoder: Encoder) -> dict[Subject, list[Row]]:
        """Encode the evaluation rows; returns them as text, by subject."""
        sets = self.evaluation
        harmful = gather("evaluation.harmful", sets.harmful)
        harmless = gather("evaluation.harmless", sets.harmless)
        utility = gather("evaluation.utility", sets.utility)
        self.examples = {
            "harmful": encoder.harmful(harmful),
            "harmless": encoder.chats(harmless, need_reply=False),
            "utility": encoder.chats(utility),
        }
        rows: dict[Subject, list[Row | RowProblem]] = {
            "harmful": [*harmful],
            "harmless": [*harmless],
            "utility": [*utility],
        }
        for subject in SUBJECTS:
            if rows[subject] and not self.examples[subject]:
                raise no_usable_rows(f"evaluation.{subject}", encoder)
        for name, block in sets.blocks.items():
            place = f"evaluation.blocks.{name}"
            if block.harmful and block.harmful_prompts:
                raise ValueError(f"data.{place}: expected harmful or harmful_prompts, got both; use two sets")
            targeted = gather(f"{place}.harmful", block.harmful)
            prompts = gather(f"{place}.harmful_prompts", block.harmful_prompts)
            harmless = gather(f"{place}.harmless", block.harmless)
            own: dict[Subject, list[Row | RowProblem]] = {
                "harmful": [*targeted, *prompts],
                "harmless": [*harmless],
            }
            self.blocks[name] = {
                "harmful": encoder.harmful(targeted)
                if targeted
                else encoder.chats(prompts, need_reply=False),
                "harmless": encoder.chats(harmless, need_reply=False),
            }
            for subject, found in own.items():
                if found and not self.blocks[name][subject]:
                    raise no_usable_rows(f"{place}.{subject}", encoder)
                rows[subject] += found
        return {s: [row for row in part if not isinstance(row, RowProblem)] for s, part in rows.items()}

    def _report(self, problems: list[RowProblem], stage: str) -> None:
        """List the rows that were left out in the run folder; `skipped_rows.jsonl` is training's."""
        if not problems or self.trainer is None or not self.trainer.is_global_zero:
            return
        # Lightning says "fit", and for prediction a member of an enum that is no text.
        named = str(getattr(stage, "value", stage))
        name = "skipped_rows.jsonl" if named == "fit" else f"skipped_rows_{named}.jsonl"
        path = Path(self.trainer.default_root_dir) / name
        path.parent.mkdir(parents=True, exist_ok=True)
        lines = [json.dumps({"where": problem.where, "reason": problem.reason}) for problem in problems]
        path.write_text("\n".join(lines) + "\n", encoding="utf-8")
        log.warning("left out %d rows, listed in %s; the first: %s", len(problems), path, problems[0])


def no_usable_rows(field: str, encoder: Encoder) -> ValueError:
    """The refusal to go on with a set of which every row is bad."""
    return ValueError(
        f"data.{field}: expected usable rows, got none ({len(encoder.problems)} bad, the last: "
        f"{encoder.problems[-1]}); mend the rows or see data.encoding.max_length"
    )
