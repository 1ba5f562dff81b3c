"""What a person sees while waiting: one bar over all optimiser steps of a run, evaluations' bars below it.

On a terminal bars redraw themselves; anywhere else (a log file, a CI job) there is a line every tenth of the
way, and no bar.
"""

from __future__ import annotations

import logging
import math
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager, nullcontext
from typing import Any

from lightning import LightningModule, Trainer
from lightning.pytorch.callbacks import ProgressBar, RichProgressBar, TQDMProgressBar
from lightning.pytorch.callbacks.progress.tqdm_progress import Tqdm
from tqdm.auto import tqdm
from tqdm.contrib.logging import logging_redirect_tqdm

LINES = 10
"""Lines of a stage where the output is no terminal, beside the first."""
LOGGERS = ("", "lightning", "lightning.pytorch", "lightning.fabric", "transformers")


class StepProgressBar(TQDMProgressBar):
    """Counts optimiser steps, of all passes through the data, with the loss and the time left.

    The time left is that of training alone: what evaluations take is left out (see `nested`).
    """

    def __init__(self) -> None:
        super().__init__()
        self._stack = ExitStack()
        self._total: int | None = None
        self._first = 0
        self._began = 0.0
        self._told = -1
        self._aside = False

    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        super().setup(trainer, pl_module, stage)
        self._told = -1
        if self.is_enabled and on_terminal():
            # A log line written past a bar would leave half of the bar behind.
            loggers = [logging.getLogger(name) for name in LOGGERS]
            # Those without a handler hand their lines on: one of their own would write each line twice.
            redirected = logging_redirect_tqdm([logger for logger in loggers if logger.handlers])
            self._stack.enter_context(redirected)

    def teardown(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        self._stack.close()

    def on_exception(self, trainer: Trainer, pl_module: LightningModule, exception: BaseException) -> None:
        if self._train_progress_bar is not None:
            self._train_progress_bar.close()
        self._stack.close()

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        steps = trainer.estimated_stepping_batches
        self._total = None if math.isinf(steps) else int(steps)
        self._first, self._began = trainer.global_step, time.monotonic()
        self.train_progress_bar = self._bar("training", total=self._total, initial=self._first)
        self._tell("training", "step", self._first, self._total)

    def on_train_epoch_start(self, trainer: Trainer, *_: Any) -> None:
        """A further pass through the data is no new bar."""

    def on_train_epoch_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """The bar goes on."""

    def on_train_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        bar, done = self.train_progress_bar, trainer.global_step
        if done == bar.n and done != self._total:
            return  # a micro-batch of a step that is not complete
        if bar.disable:
            bar.n = done
            self._tell("training", "step", done, self._total, lambda: self._rest(trainer, pl_module, done))
        else:
            # Reading a number waits for a GPU to have computed it.
            every: int = trainer.log_every_n_steps  # type: ignore[attr-defined]
            if pl_module.device.type == "cpu" or done % max(1, every) == 0:
                bar.set_postfix(self.get_metrics(trainer, pl_module), refresh=False)
            bar.update(done - bar.n)

    def on_validation_batch_end(self, trainer: Trainer, *rest: Any, **named: Any) -> None:
        super().on_validation_batch_end(trainer, *rest, **named)
        self._count("validation", self.val_progress_bar, *rest)

    def on_test_batch_end(self, trainer: Trainer, *rest: Any, **named: Any) -> None:
        super().on_test_batch_end(trainer, *rest, **named)
        self._count("test", self.test_progress_bar, *rest)

    def on_predict_batch_end(self, trainer: Trainer, *rest: Any, **named: Any) -> None:
        super().on_predict_batch_end(trainer, *rest, **named)
        self._count("prediction", self.predict_progress_bar, *rest)

    def get_metrics(self, trainer: Trainer, pl_module: LightningModule) -> dict[str, Any]:
        """What was logged for the bar, without the loggers' version number."""
        found = super().get_metrics(trainer, pl_module)
        return {name.removeprefix("train/"): value for name, value in found.items() if name != "v_num"}

    @contextmanager
    def aside(self) -> Iterator[None]:
        """What is done within is no part of training; within each other, the outermost counts."""
        outermost, self._aside, began = not self._aside, True, time.monotonic()
        try:
            yield
        finally:
            if outermost:
                self._aside = False
                self._leave_out(time.monotonic() - began)

    def _leave_out(self, seconds: float) -> None:
        self._began += seconds
        bar = self._train_progress_bar
        if bar is not None and not bar.disable:
            bar.start_t += seconds
            bar.last_print_t += seconds

    def init_train_tqdm(self) -> Tqdm:
        return self._bar("training")

    def init_validation_tqdm(self) -> Tqdm:
        return self._bar("validation", leave=False)

    def init_sanity_tqdm(self) -> Tqdm:
        return self._bar("sanity check", leave=False)

    def init_test_tqdm(self) -> Tqdm:
        return self._bar("test", leave=False)

    def init_predict_tqdm(self) -> Tqdm:
        return self._bar("prediction", leave=False)

    def _bar(self, what: str, leave: bool = True, **counts: int | None) -> Tqdm:
        shown = self.is_enabled and on_terminal()
        # smoothing=0: the time left comes from the mean over the run, not from the last step.
        return Tqdm(
            desc=what, disable=not shown, leave=leave, dynamic_ncols=True, file=sys.stderr, smoothing=0,
            bar_format=self.BAR_FORMAT, **counts, unit=" steps" if what == "training" else " batches",
        )  # fmt: skip

    def _count(self, what: str, bar: tqdm[Any], *rest: Any) -> None:
        _module, _outputs, _batch, index, *_ = rest
        self._tell(what, "batch", index + 1, bar.total)

    def _rest(self, trainer: Trainer, pl_module: LightningModule, done: int) -> str:
        parts = [
            f"{k} {v:.4g}" for k, v in self.get_metrics(trainer, pl_module).items() if not isinstance(v, str)
        ]
        if self._total is not None and done > self._first:
            each = (time.monotonic() - self._began) / (done - self._first)
            parts.append(f"{tqdm.format_interval(each * (self._total - done))} left")
        return ", ".join(parts)

    def _tell(
        self,
        what: str,
        unit: str,
        done: int,
        total: int | float | None,
        rest: Callable[[], str] = lambda: "",
    ) -> None:
        """One line where the output is no terminal and a tenth of the way has passed; what else it says is
        asked for then."""
        tenth = int(LINES * done / total) if total else int(math.log2(done + 1))
        if self.is_enabled and not on_terminal() and tenth != self._told:
            self._told = tenth
            of = f" of {total:.0f}" if total else ""
            more = rest()
            print(f"{what}: {unit} {done}{of}{', ' if more else ''}{more}", file=sys.stderr, flush=True)


def install_progress(trainer: Trainer) -> None:
    """Put a StepProgressBar in the place of Lightning's own bar; a run without a bar stays without.

    It comes first: an evaluation that follows a step then is no part of that step's time.
    """
    callbacks: list[Any] = trainer.callbacks  # type: ignore[attr-defined]
    others = [each for each in callbacks if type(each) not in (TQDMProgressBar, RichProgressBar)]
    if len(others) < len(callbacks):
        callbacks[:] = [StepProgressBar(), *others]


@contextmanager
def nested(trainer: Trainer, total: int | None, what: str, silent: bool = False) -> Iterator[tqdm[Any]]:
    """A bar below the training's, gone when done; its time is left out of the training's time left.

    It shows nothing on other processes than the first, in a run without a progress bar, or off a terminal.
    """
    outer: ProgressBar | None = trainer.progress_bar_callback
    shown = outer is not None and trainer.is_global_zero and not silent and on_terminal()
    with (
        outer.aside() if isinstance(outer, StepProgressBar) else nullcontext(),
        tqdm(
            total=total,
            desc=what,
            leave=False,
            disable=not shown,
            dynamic_ncols=True,
            file=sys.stderr,
            unit=" rows",
        ) as bar,
    ):
        yield bar


def on_terminal() -> bool:
    """Whether progress is written to a terminal."""
    return sys.stderr.isatty()
