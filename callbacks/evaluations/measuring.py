"""`validate` and `test`: evaluations as the steps of Lightning's own loop.

    trainer.test(Measuring(module, data, evaluations, step))

The loop's items are jobs, a batch of one measurement each; a step attacks, replies, judges and appends the
rows. Each process takes its share of every subject's rows.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import cast

from lightning import LightningModule

from callbacks.evaluations.base import Evaluation, do, monitored, show_rows
from callbacks.evaluations.session import Place, Session
from callbacks.progress import nested
from datamodules.evaluation import EvaluationData
from datamodules.result_lines import Stage
from lightning_modules.defences.base import Defence
from lightning_modules.pretrained import PretrainedModel, check_strategy


class Measuring(LightningModule):
    """Runs evaluations in `trainer.validate` or `trainer.test`.

    Args:
        module: holds the model, with the weights to measure.
        data: the evaluation rows.
        evaluations: what is measured.
        step: optimiser step of the weights.
    """

    def __init__(
        self, module: PretrainedModel, data: EvaluationData, evaluations: Sequence[Evaluation], step: int = 0
    ) -> None:
        super().__init__()
        self.module = module
        self.data = data
        self.evaluations = evaluations
        self.step = step
        self._session: Session | None = None

    def setup(self, stage: str) -> None:
        """Raises: ValueError where nothing is to be measured, or where the trainer forbids gradients."""
        if not self.evaluations:
            raise ValueError(
                "trainer.callbacks: expected an evaluation, got none; add one, e.g. "
                "--config configs/evaluation/suite.yaml"
            )
        loop = self.trainer.validate_loop if self.trainer.state.fn == "validate" else self.trainer.test_loop
        if loop.inference_mode:
            raise ValueError("attacks need gradients; set trainer.inference_mode: false")
        check_strategy(self.trainer.strategy)
        # As Lightning does for a datamodule: it writes what it left out to the run folder.
        self.data.trainer = self.trainer
        self.data.setup(stage)
        for evaluation in self.evaluations:
            evaluation.attach(self.data)

    @property
    def defence(self) -> Defence | None:
        """What stands around the model."""
        return self.module.defence

    def configure_model(self) -> None:
        self.module.attach(self.data.chat)
        self.module.configure_model()

    def val_dataloader(self) -> list[int]:
        """The numbers of the jobs."""
        return list(range(len(self._opened().jobs)))

    test_dataloader = val_dataloader

    def validation_step(self, job: int, batch_idx: int) -> None:
        """One job."""
        session = self._opened()
        with nested(self.trainer, None, "") as bar:
            do(session, session.jobs[job], bar)

    test_step = validation_step

    def on_validation_epoch_end(self) -> None:
        session = self._opened()
        # Every process has the same numbers; without sync_dist Lightning warns that they might differ.
        self.log_dict(monitored(session.finish()), sync_dist=True)
        show_rows(self.trainer, f"{session.place.stage}/evaluation", session.rows)

    on_test_epoch_end = on_validation_epoch_end

    def _opened(self) -> Session:
        """The session; it needs the weights on their device, so it opens with the loop's first question."""
        if self._session is None:
            trainer = self.trainer
            place = Place(
                self.module.language_model,
                Path(trainer.default_root_dir),
                cast(Stage, str(trainer.state.fn.value if trainer.state.fn else "test")),
                self.step,
                trainer.global_rank,
                trainer.world_size,
                str(trainer.precision),
                self.module.before_training(),
                self.module.defence,
            )
            self._session = Session(place, self.data, self.evaluations)
        return self._session
