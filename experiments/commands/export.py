"""`thundercat export RUN`: a finished run's model as PEFT adapters, as a whole model or with its adapters
merged, with a model card filled from what the run has measured until now; nothing is trained."""

from __future__ import annotations

import logging
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from callbacks.report.escape import printable
from callbacks.report.model_card import model_card
from callbacks.run_folder.export import kind_of, refuse_foreign, save_model
from callbacks.run_folder.folder import RunFolder
from callbacks.run_folder.lock import RunLock
from datamodules.fields import checked
from experiments.commands.loaded import build, loaded, node_of, run_configuration
from experiments.commands.run import guarded
from experiments.config.errors import ConfigError
from lightning_modules.models.fingerprint import fingerprint
from lightning_modules.models.loading import has_adapter
from lightning_modules.pretrained import PretrainedModel


@checked
@dataclass(frozen=True)
class ExportSettings:
    """What is exported, and where to."""

    run: str
    """A run folder."""
    ckpt_path: str | None = "last"
    """A checkpoint, or `last`; null takes the model before training."""
    merged: bool = False
    """Merge the adapters into the weights."""
    folder: str | None = None
    """Where to; null: RUN/model, with `merged` RUN/model_merged. What it holds is replaced."""


def export(settings: ExportSettings, show_traceback: bool = False) -> int:
    """Load the run's model and write it. Returns the exit status.

    Raises: ConfigError where there is no run.
    """
    own = RunFolder.of(settings.run)
    config = {**run_configuration(settings.run, "export"), "ckpt_path": settings.ckpt_path}
    config["model"] = node_of(config, PretrainedModel, ("base", "seed"))
    return guarded(lambda: _export(config, own, settings), own, show_traceback)


def _export(config: dict[str, Any], run: RunFolder, settings: ExportSettings) -> int:
    logging.getLogger("lightning.pytorch").setLevel(logging.ERROR)
    place = Path(settings.folder) if settings.folder else run.merged if settings.merged else run.model
    refuse_foreign(place, run.path, "--folder")
    module, data = build(config, PretrainedModel)
    with RunLock(run.path), loaded(config, "predict", module, data, run) as (step, _):
        if settings.merged and not has_adapter(module.model):
            raise ConfigError(
                "--merged: expected a run that trained adapters, got one without; leave it out: the export "
                "is the whole model already"
            )
        kind, weights = kind_of(module, settings.merged), fingerprint(module.model)
        card = model_card(run.path, step, kind, settings.merged, weights)
        save_model(module, place, card, settings.merged, "make room, then export again")
    print(f"step {step}: {printable(str(place), one_line=True)}")
    return 0
