"""report.html, report.md, results.json and figures of a run folder: outputs, written anew from its rows."""

from __future__ import annotations

import json
from pathlib import Path

from lightning import Callback, LightningModule, Trainer

from callbacks.report.drawing import save
from callbacks.report.figures import drawings
from callbacks.report.load import export, load
from callbacks.report.markdown import document, terminal
from callbacks.report.page import page
from callbacks.report.results import RunResults, Stage
from callbacks.run_folder.provenance import write_whole
from datamodules.results import read_measurements

STAGES: tuple[Stage, ...] = ("fit", "validate", "test")


class RunReport(Callback):
    """Writes the report when training, validation or testing has ended and prints its table."""

    def on_fit_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self._write(trainer, "fit")

    def on_validation_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        if trainer.state.fn == "validate":
            self._write(trainer, "validate")

    def on_test_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self._write(trainer, "test")

    def _write(self, trainer: Trainer, stage: Stage) -> None:
        if trainer.is_global_zero:
            print(write_report(trainer.default_root_dir, stage))


def write_report(folder: str | Path, stage: Stage = "fit") -> str:
    """Write the report files of a run folder; returns what the terminal shows.

    Those of `validate` and `test` have the stage's name in front of their own.

    Raises: FileNotFoundError where the folder holds no evaluation of that stage.
    """
    return write(load(folder, stage))


def write_reports(folder: str | Path) -> str:
    """The same for every stage that the folder holds; returns what the terminal shows.

    Raises: FileNotFoundError where it holds none.
    """
    measured = {item.stage for item in read_measurements(folder)}
    stages: list[Stage] = [stage for stage in STAGES if stage in measured] or ["fit"]
    return "\n".join(write_report(folder, stage) for stage in stages)


def write(results: RunResults) -> str:
    """Write results as files of their folder; returns what the terminal shows."""
    folder, prefix = results.folder, "" if results.stage == "fit" else f"{results.stage}_"
    figures = drawings(results)
    place = folder / f"{prefix}figures"
    place.mkdir(parents=True, exist_ok=True)
    paths = {
        drawing.title: f"{place.name}/{save(drawing, place / f'{stem}.svg').name}"
        for stem, drawing in figures.items()
    }
    data = json.dumps(export(results), indent=2)
    for name, text in (
        ("results.json", data + "\n"),
        ("report.md", document(results, paths)),
        ("report.html", page(results, figures)),
    ):
        write_whole(folder / f"{prefix}{name}", text)
    return f"\n{terminal(results)}\n\nreport: {folder / f'{prefix}report.html'}"
