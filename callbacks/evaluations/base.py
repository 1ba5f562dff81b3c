"""When an evaluation runs and where its numbers go; subclasses say what is measured.

Inside `fit` an evaluation runs at the start, every N optimiser steps and at the end; under `validate` and
`test` once. Numbers go to the loggers, the trainer's results table and `evaluations.jsonl` in the run folder;
sample rows to `samples/` and to W&B.
"""

from __future__ import annotations

import json
import logging
from abc import ABC, abstractmethod
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from lightning import Callback, LightningModule, Trainer
from tqdm.auto import tqdm

from callbacks.evaluations.undisturbed import undisturbed
from callbacks.metrics.means import Mean
from callbacks.metrics.rates import Rate
from callbacks.run_folder.loggers import log_table
from datamodules.batch import EvaluationBatch
from datamodules.evaluation import EvaluationData, Subject
from lightning_modules.base import FineTuning
from lightning_modules.models.language_model import LanguageModel

log = logging.getLogger(__name__)
EVALUATIONS_FILE = "evaluations.jsonl"


@dataclass
class Findings:
    """What one evaluation found: scalar metrics, JSON-able details (curves) and sample rows."""

    metrics: dict[str, float]
    details: dict[str, Any] = field(default_factory=dict)
    samples: list[dict[str, Any]] = field(default_factory=list)


class Evaluation(Callback, ABC):
    """Base of the evaluation callbacks.

    Args:
        every_n_steps: evaluate after every so many optimiser steps; null for no periodic evaluation.
        at_start: evaluate before the first training step.
        at_end: evaluate after the last training step.
        limit: use at most so many rows per subject, evenly spaced, inside `fit`.
        max_new_tokens: longest generated reply.
        test_limit: the same for `validate` and `test`; null uses all rows.
    """

    name = "evaluation"

    def __init__(
        self,
        every_n_steps: int | None = None,
        at_start: bool = False,
        at_end: bool = True,
        limit: int | None = None,
        max_new_tokens: int = 64,
        test_limit: int | None = None,
    ) -> None:
        if every_n_steps is not None and every_n_steps < 1:
            raise ValueError(
                f"{type(self).__name__}.every_n_steps: expected >= 1 or null, got {every_n_steps}"
            )
        if max_new_tokens < 1:
            raise ValueError(f"{type(self).__name__}.max_new_tokens: expected >= 1, got {max_new_tokens}")
        self.every_n_steps = every_n_steps
        self.at_start = at_start
        self.at_end = at_end
        for name, rows in (("limit", limit), ("test_limit", test_limit)):
            if rows is not None and rows < 1:
                raise ValueError(f"{type(self).__name__}.{name}: expected >= 1 or null, got {rows}")
        self.limit = limit
        self.test_limit = test_limit
        self.max_new_tokens = max_new_tokens
        self._last_step = -1

    @abstractmethod
    def evaluate(self, run: EvaluationRun) -> Findings:
        """Measure the model; called in evaluation mode with gradients as the caller had them."""

    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Raises: ValueError where the datamodule has no evaluation rows or the trainer forbids gradients."""
        if not isinstance(getattr(trainer, "datamodule", None), EvaluationData):
            raise ValueError(f"{type(self).__name__} expects data: datamodules.evaluation.EvaluationData")
        loop = {"validate": trainer.validate_loop, "test": trainer.test_loop}.get(stage)
        if loop is not None and loop.inference_mode:
            raise ValueError(
                f"{type(self).__name__} needs gradients in {stage}; set trainer.inference_mode: false"
            )

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        if self.at_start and trainer.global_step == 0:
            self._run(trainer, pl_module, "fit")

    def on_train_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: object, batch: object, batch_idx: int
    ) -> None:
        step = trainer.global_step
        if step == self._last_step or (batch_idx + 1) % trainer.accumulate_grad_batches:
            return
        periodic = self.every_n_steps is not None and step % self.every_n_steps == 0
        if periodic or (self.at_end and step == int(trainer.estimated_stepping_batches)):
            self._run(trainer, pl_module, "fit")

    def on_validation_epoch_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        if trainer.state.fn == "validate":
            self._run(trainer, pl_module, "validate")

    def on_test_epoch_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self._run(trainer, pl_module, "test")

    def _run(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        assert isinstance(pl_module, FineTuning)
        self._last_step = trainer.global_step
        with undisturbed(pl_module):
            findings = self.evaluate(
                EvaluationRun(
                    trainer, pl_module, self.limit if stage == "fit" else self.test_limit, self.max_new_tokens
                )
            )
        metrics = {f"eval/{key}": value for key, value in findings.metrics.items()}
        if stage == "fit":
            for logger in trainer.loggers:
                logger.log_metrics(metrics, step=trainer.global_step)
        else:
            pl_module.log_dict(metrics)
        if trainer.is_global_zero:
            self._write(Path(trainer.default_root_dir), trainer, stage, findings)

    def _write(self, folder: Path, trainer: Trainer, stage: str, findings: Findings) -> None:
        folder.mkdir(parents=True, exist_ok=True)
        entry = {
            "name": self.name,
            "stage": stage,
            "step": trainer.global_step,
            "metrics": findings.metrics,
            "details": findings.details,
        }
        with (folder / EVALUATIONS_FILE).open("a", encoding="utf-8") as stream:
            stream.write(json.dumps(entry) + "\n")
        if findings.samples:
            samples = folder / "samples" / f"{self.name}_{stage}_{trainer.global_step:06d}.jsonl"
            samples.parent.mkdir(exist_ok=True)
            samples.write_text(
                "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in findings.samples),
                encoding="utf-8",
            )
            log_table(trainer, f"{stage}/{self.name}", findings.samples)


@dataclass
class EvaluationRun:
    """One evaluation's access to the model, its data and text generation."""

    trainer: Trainer
    module: FineTuning
    limit: int | None
    max_new_tokens: int

    @property
    def model(self) -> LanguageModel:
        return self.module.language_model

    @property
    def data(self) -> EvaluationData:
        data: EvaluationData = self.trainer.datamodule  # type: ignore[attr-defined]
        return data

    def batches(
        self, subject: Subject, what: str | None = None, limit: int | None = None
    ) -> Iterator[EvaluationBatch]:
        """This process's share of a subject's rows on the model's device; with a progress bar where it is
        given a name.

        `limit` lowers the evaluation's own.
        """
        least = min((n for n in (self.limit, limit) if n is not None), default=None)
        loader = self.data.loader(subject, least, self.trainer.global_rank, self.trainer.world_size)
        with self.progress(len(loader), f"{what} ({subject})", silent=what is None) as bar:
            for batch in loader:
                yield batch.to(self.module.device)
                bar.update()

    def progress(self, total: int, what: str, silent: bool = False) -> tqdm[Any]:
        """A progress bar on the first process, unless the run has none."""
        silent = silent or not self.trainer.is_global_zero or self.trainer.progress_bar_callback is None
        return tqdm(total=total, desc=what, leave=False, disable=silent)

    def has(self, subject: Subject) -> bool:
        return bool(self.data.examples[subject])

    def replies(
        self, embeds: torch.Tensor, mask: torch.Tensor, forced: Sequence[Sequence[int]] = ()
    ) -> list[str]:
        """Greedy replies to prompts given as embeddings; `forced` ids, which end the prompts already, are
        part of the replies."""
        chat = self.data.chat
        generated = self.model.generate(embeds, mask, self.max_new_tokens, chat.stop_ids)
        starts = forced or [()] * len(generated)
        return [chat.decode([*start, *ids]) for start, ids in zip(starts, generated, strict=True)]

    def clean_replies(self, batch: EvaluationBatch) -> list[str]:
        """Greedy replies to the prompts as they are."""
        with torch.no_grad():
            return self.replies(self.model.embed(batch.prompt_ids), batch.prompt_mask)


def flatten(name: str, metric: Rate | Mean) -> dict[str, float]:
    """{name, name/low, name/high, name/n} of a rate or a mean."""
    value = metric.compute()
    return {name: value["rate"], **{f"{name}/{key}": value[key] for key in ("low", "high", "n")}}
