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
from callbacks.run_folder.folder import RunFolder
from callbacks.run_folder.provenance import write_whole
from datamodules.results import measured_stages
from lightning_modules.defences.base import label

STAGES: tuple[Stage, ...] = ("fit", "validate", "test")


class RunReport(Callback):
    """Writes the report when training, validation or testing has ended and prints its table."""

    def on_fit_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        # A recipe may leave all evaluations to `thundercat test`: training has ended well all the same.
        if any(stage == "fit" for stage, _ in measured_stages(trainer.default_root_dir)):
            self._write(trainer, "fit")
        elif trainer.is_global_zero:
            print(f"nothing was evaluated inside fit: thundercat test {_again(trainer.default_root_dir)}")

    def on_validation_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        if trainer.state.fn == "validate":
            self._write(trainer, "validate", pl_module)

    def on_test_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self._write(trainer, "test", pl_module)

    def _write(self, trainer: Trainer, stage: Stage, module: LightningModule | None = None) -> None:
        if trainer.is_global_zero:
            print(write_report(trainer.default_root_dir, stage, label(getattr(module, "defence", None))))


def _again(folder: str) -> str:
    return f"--config {RunFolder.of(folder).config()} --ckpt_path last"


def write_report(folder: str | Path, stage: Stage = "fit", defence: str = "") -> str:
    """Write the report files of a run folder; returns what the terminal shows.

    Those of `validate` and `test` have the stage's name in front of their own, and the defence's where the
    model stood behind one.

    Raises: FileNotFoundError where the folder holds no evaluation of that stage.
    """
    return write(load(folder, stage, defence))


def write_reports(folder: str | Path) -> str:
    """The same for every stage that the folder holds; returns what the terminal shows.

    Raises: FileNotFoundError where it holds none.
    """
    found = measured_stages(folder)
    chosen = [(stage, own) for stage in STAGES for measured, own in found if measured == stage]
    return "\n".join(write_report(folder, stage, own) for stage, own in chosen or [("fit", "")])


def write(results: RunResults) -> str:
    """Write results as files of their folder; returns what the terminal shows."""
    folder, figures = RunFolder.of(results.folder), drawings(results)

    def own(name: str) -> Path:
        return folder.of_stage(results.stage, name, results.defence)

    place = own("figures")
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
        write_whole(own(name), text)
    return f"\n{terminal(results)}\n\nreport: {own('report.html')}"
