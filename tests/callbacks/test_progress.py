"""Progress: optimiser steps of the whole run, on a terminal and off it."""

from __future__ import annotations

import io
import re
import sys
import time
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from lightning import Callback, LightningModule, Trainer
from lightning.pytorch.callbacks import TQDMProgressBar
from torch.utils.data import DataLoader

from callbacks.progress import StepProgressBar, install_progress, nested


class Terminal(io.StringIO):
    def __init__(self, is_terminal: bool) -> None:
        super().__init__()
        self.is_terminal = is_terminal

    def isatty(self) -> bool:
        return self.is_terminal


class Slope(LightningModule):
    def __init__(self) -> None:
        super().__init__()
        self.linear = torch.nn.Linear(2, 1)

    def training_step(self, batch: torch.Tensor, batch_idx: int) -> torch.Tensor:
        loss = self.linear(batch).mean()
        self.log("train/loss", loss.detach() * 0 + 0.5, prog_bar=True)
        return loss

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.SGD(self.parameters(), 0.1)


class Bar:
    """A bar on a terminal that counts and shows nothing."""

    n, disable = 0, False

    def update(self, steps: int) -> None:
        self.n += steps

    def set_postfix(self, *_: Any, **__: Any) -> None:
        """Nothing."""


class Pause(Callback):
    """An evaluation of `seconds` before the first step, in two bars one within the other."""

    def __init__(self, seconds: float) -> None:
        self.seconds = seconds

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        with nested(trainer, 1, "evaluation") as bar, nested(trainer, 1, "attack") as inner:
            time.sleep(self.seconds)
            inner.update()
            bar.update()


def run(monkeypatch: pytest.MonkeyPatch, terminal: bool, steps: int, *more: Callback, **settings: Any) -> str:
    """Train in passes of three micro-batches, two a step; returns what stderr got."""
    stream = Terminal(terminal)
    monkeypatch.setattr(sys, "stderr", stream)
    monkeypatch.setenv("COLUMNS", "100")
    trainer = Trainer(
        max_steps=steps, max_epochs=-1, accumulate_grad_batches=2, accelerator="cpu", logger=False,
        enable_checkpointing=False, enable_model_summary=False, callbacks=list(more), **settings,
    )  # fmt: skip
    install_progress(trainer)
    trainer.fit(Slope(), DataLoader(torch.ones(3, 2), batch_size=1))
    return stream.getvalue()


def test_lines_count_steps_of_all_passes_where_there_is_no_terminal(monkeypatch: pytest.MonkeyPatch) -> None:
    lines = [line for line in run(monkeypatch, False, 40).splitlines() if line.startswith("training")]
    assert lines[0] == "training: step 0 of 40"
    assert [re.match(r"training: step (\d+) of 40", line)[1] for line in lines] == [  # type: ignore[index]
        str(step) for step in range(0, 41, 4)
    ]
    assert re.fullmatch(r"training: step 40 of 40, loss 0\.5, 00:00 left", lines[-1])


def test_numbers_are_read_where_they_are_told(monkeypatch: pytest.MonkeyPatch) -> None:
    """Of a number on a GPU, reading it waits until it is computed."""
    read: list[int] = []
    original = StepProgressBar.get_metrics

    def counted(self: StepProgressBar, trainer: Trainer, pl_module: LightningModule) -> dict[str, Any]:
        read.append(trainer.global_step)
        return original(self, trainer, pl_module)

    monkeypatch.setattr(StepProgressBar, "get_metrics", counted)
    run(monkeypatch, False, 100)
    assert read == list(range(10, 101, 10))


@pytest.mark.parametrize(("device", "read"), [("cpu", 20), ("cuda", 4)])
def test_a_bar_reads_a_gpu_s_numbers_as_often_as_loggers_do(
    device: str, read: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    steps: list[int] = []
    monkeypatch.setattr(Slope, "device", torch.device(device))
    monkeypatch.setattr(
        StepProgressBar, "get_metrics", lambda _, trainer, __: steps.append(trainer.global_step) or {}
    )
    bar, module = StepProgressBar(), Slope()
    bar._train_progress_bar = Bar()  # type: ignore[assignment]
    for step in range(1, 21):
        trainer = SimpleNamespace(global_step=step, log_every_n_steps=5)
        bar.on_train_batch_end(trainer, module, None, None, step)  # type: ignore[arg-type]
    assert len(steps) == read


def test_no_bar_is_written_where_there_is_no_terminal(monkeypatch: pytest.MonkeyPatch) -> None:
    text = run(monkeypatch, False, 4, Pause(0.0))
    assert "\r" not in text and "evaluation" not in text


def test_one_bar_counts_steps_of_all_passes(monkeypatch: pytest.MonkeyPatch) -> None:
    text = run(monkeypatch, True, 40, Pause(0.0))
    last = text.rstrip().split("\r")[-1]
    assert "training: 100%" in last and "40/40" in last and "loss=0.5" in last and "steps/s" in last
    assert "0/40" in text and "/?" not in text and "Epoch" not in text
    assert "evaluation" in text and "attack" in text


def test_evaluations_are_left_out_of_the_time_left(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Slope, "on_train_batch_start", lambda *_: time.sleep(0.02))
    text = run(monkeypatch, False, 40, Pause(3.0))
    first = re.search(r"step 4 of 40.* (\d\d):(\d\d) left", text)
    # Twice 0.02 s a step; with the evaluation it would be 3 s / 4 a step, 27 s in all.
    assert first is not None and int(first[1]) == 0 and int(first[2]) < 10


def test_only_lightnings_own_bar_is_replaced_and_ours_comes_first() -> None:
    class Own(TQDMProgressBar):
        pass

    quiet = Trainer(
        enable_progress_bar=False, logger=False, enable_checkpointing=False, accelerator="cpu",
        enable_model_summary=False,
    )  # fmt: skip
    install_progress(quiet)
    assert quiet.progress_bar_callback is None
    custom = Trainer(logger=False, enable_checkpointing=False, accelerator="cpu", callbacks=[Own()])
    install_progress(custom)
    assert isinstance(custom.progress_bar_callback, Own)
    usual = Trainer(logger=False, enable_checkpointing=False, accelerator="cpu")
    install_progress(usual)
    assert isinstance(usual.callbacks[0], StepProgressBar)
    with nested(quiet, 3, "evaluation") as bar:
        assert bar.disable
