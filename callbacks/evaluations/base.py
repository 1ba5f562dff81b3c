"""An evaluation as a callback: its schedule inside `fit`, and where its numbers go.

Inside `fit` an evaluation runs before the first step, every N optimiser steps and after the last one. Its
values stand in `trainer.callback_metrics` as `eval/<Metric.key>` before any checkpoint callback looks, so
that Lightning's EarlyStopping and ModelCheckpoint can monitor them, and go to the loggers; n and intervals
are in the rows and the report. `validate` and `test` run evaluations through Lightning's loop
(callbacks/evaluations/measuring.py).
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from lightning import Callback, LightningDataModule, LightningModule, Trainer
from tqdm.auto import tqdm

from callbacks.evaluations.asking import Job, Work
from callbacks.evaluations.probe import Probe
from callbacks.evaluations.schedule import Schedule
from callbacks.evaluations.session import Place, Session
from callbacks.evaluations.undisturbed import undisturbed
from callbacks.progress import nested
from callbacks.report.results import Snapshot
from callbacks.run_folder.loggers import log_table
from datamodules.adversarial import AdversarialData
from datamodules.evaluation import EvaluationData
from datamodules.result_lines import Row
from lightning_modules.adversarial import AdversarialFineTuning
from lightning_modules.attacks.progress import observed
from lightning_modules.models.frozen import Reference
from lightning_modules.pretrained import PretrainedModel

PREFIX = "eval/"
"""In front of every metric's key in loggers and monitors."""


class Evaluation(Callback, ABC):
    """Base of the evaluation callbacks: a schedule, and what is measured.

    Args:
        schedule: when it runs and on how many rows; null takes the defaults.
        max_new_tokens: longest generated reply.
        seed: seed of what is random about it.
    """

    name = "evaluation"

    def __init__(self, schedule: Schedule | None = None, max_new_tokens: int = 64, seed: int = 0) -> None:
        self.schedule = schedule or Schedule()
        self.max_new_tokens = max_new_tokens
        self.seed = seed
        self._last_step = self._seen_step = -1
        self._values: dict[str, float] = {}
        self._data: EvaluationData | None = None

    def attach(self, data: EvaluationData) -> None:
        """Hand over the rows that are measured."""
        self._data = data

    def began(self, place: Place) -> tuple[EvaluationData, Reference, str]:
        """The rows, the model before training, and the digest of its weights.

        Raises: ValueError where rows or that model are missing.
        """
        if self._data is None or place.base is None:
            raise ValueError(f"{type(self).__name__}: expected evaluation data and a base model, got none")
        with undisturbed(place.model.module):
            return self._data, place.base, place.base.key

    @abstractmethod
    def probes(self) -> list[Probe]:
        """What is measured, in the order in which it is reported."""

    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Raises: ValueError where nobody has attached evaluation rows."""
        if stage == "fit" and self._data is None:
            raise ValueError(f"{type(self).__name__} expects data: datamodules.evaluation.EvaluationData")

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self._seen_step = trainer.global_step
        # EarlyStopping on what an evaluation found would otherwise find nothing after a resume.
        _monitor(trainer, self._values)
        if self.schedule.at_start and trainer.global_step == 0:
            self._run(trainer, pl_module)

    def on_save_checkpoint(
        self, trainer: Trainer, pl_module: LightningModule, checkpoint: dict[str, Any]
    ) -> None:
        checkpoint.setdefault("found", {}).setdefault(self.name, {}).update(self._values)

    def on_load_checkpoint(
        self, trainer: Trainer, pl_module: LightningModule, checkpoint: dict[str, Any]
    ) -> None:
        self._values = checkpoint.get("found", {}).get(self.name, {})

    def on_train_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: object, batch: object, batch_idx: int
    ) -> None:
        step = trainer.global_step
        # Between two steps of an accumulation the weights have not changed.
        stepped, self._seen_step = step != self._seen_step, step
        if not stepped or step == self._last_step:
            return
        if self.schedule.due(step, int(trainer.estimated_stepping_batches)):
            self._run(trainer, pl_module)

    def on_train_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        # Stopped early: by EarlyStopping, or by time.
        if self.schedule.at_end and trainer.global_step != self._last_step:
            self._run(trainer, pl_module)

    def _run(self, trainer: Trainer, pl_module: LightningModule) -> None:
        assert isinstance(pl_module, PretrainedModel) and self._data is not None
        self._last_step = trainer.global_step
        place = Place(
            pl_module.language_model,
            Path(trainer.default_root_dir),
            "fit",
            trainer.global_step,
            trainer.global_rank,
            trainer.world_size,
            str(trainer.precision),
            pl_module.before_training(),
        )
        with undisturbed(pl_module), pl_module.language_model.gathered():
            session = Session(place, self._data, [self])
            with nested(trainer, sum(len(job) for job in session.jobs), self.name) as bar:
                for job in session.jobs:
                    do(session, job, bar)
                    bar.update(len(job))
        values = monitored(session.finish())
        self._values = values
        _monitor(trainer, values)
        for logger in trainer.loggers:
            logger.log_metrics(values, step=trainer.global_step)
        show_rows(trainer, f"fit/{self.name}", session.rows)


def introduce(module: LightningModule, data: LightningDataModule, callbacks: Sequence[Callback]) -> None:
    """Hand the data to the module and to the evaluations among the callbacks, before a trainer runs them.
    Raises: ValueError for terms of the loss that would see micro-batches without a stream."""
    if not isinstance(data, EvaluationData):
        return
    if isinstance(module, AdversarialFineTuning) and isinstance(data, AdversarialData):
        check_terms(module, data)
    if isinstance(module, PretrainedModel):
        module.attach(data.chat, getattr(data, "harmful_batches", None))
    for callback in callbacks:
        if isinstance(callback, Evaluation):
            callback.attach(data)


def check_terms(module: AdversarialFineTuning, data: AdversarialData) -> None:
    """Raises: ValueError where the data's streams are divided unlike each other and a term may need both."""
    if module.terms and not data.division.even:
        raise ValueError(
            "data.outer_batch and data.utility_batch: expected both streams in every micro-batch for "
            f"model.terms ({', '.join(type(term).__name__ for term in module.terms)}), got "
            f"{data.division.passes('harmful')} and {data.division.passes('utility')} of "
            f"{data.micro_batches}; set both to null"
        )


def _monitor(trainer: Trainer, values: Mapping[str, float]) -> None:
    trainer.callback_metrics.update({name: torch.tensor(value) for name, value in values.items()})


def do(session: Session, job: Job | Work, bar: tqdm[Any]) -> None:
    """One job, with the attack's iterate and loss behind the progress bar."""
    bar.set_description(job.title)
    with observed(_Postfix(bar)):
        session.do(job)


def monitored(own: Snapshot) -> dict[str, float]:
    """One value per metric, under the name that loggers and monitors know."""
    return {PREFIX + metric.key: measure.estimate.value for metric, measure in own.measures.items()}


def show_rows(trainer: Trainer, title: str, rows: list[Row]) -> None:
    """Sample rows in the loggers that can show tables."""
    shown = [
        {
            "subject": row.subject,
            "attack": row.attack,
            "example": row.example,
            "prompt": row.prompt,
            "attacked": row.attacked or "",
            "reply": row.reply,
            "verdicts": ", ".join(judge for judge in row.verdicts if row.verdict(judge)),
        }
        for row in rows
    ]
    if shown and trainer.is_global_zero:
        log_table(trainer, title, shown)


class _Postfix:
    """Shows an attack's iterate and mean loss behind the progress bar."""

    def __init__(self, bar: tqdm[Any]) -> None:
        self.bar = bar
        self.iterate = 0

    def __call__(self, losses: torch.Tensor, texts: object) -> None:
        self.iterate += 1
        if not self.bar.disable:
            self.bar.set_postfix_str(f"iterate {self.iterate}, loss {losses.nanmean().item():.3f}")
