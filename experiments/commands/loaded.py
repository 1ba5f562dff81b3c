"""A run's model as it would compute in that run, for the commands that use no loop: `attack`, `chat`
and `export`."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any, TypeVar

import torch
from jsonargparse import ArgumentParser
from lightning import LightningDataModule, Trainer
from lightning.pytorch.plugins import Precision
from lightning.pytorch.utilities.exceptions import MisconfigurationException

from callbacks.run_folder.checkpoint_files import load_weights
from callbacks.run_folder.checkpoints import find_checkpoint
from callbacks.run_folder.folder import RunFolder
from datamodules.evaluation import EvaluationData
from experiments.commands.run import innermost
from experiments.config.compose import compose
from experiments.config.errors import ConfigError
from lightning_modules.pretrained import PretrainedModel

M = TypeVar("M", bound=PretrainedModel)


def node_of(config: Mapping[str, Any], cls: type, fields: tuple[str, ...]) -> dict[str, Any]:
    """The configuration's model as another class: those of its fields that this one takes.

    Raises: ConfigError where there is no model with a base.
    """
    node = config.get("model")
    arguments = node.get("init_args") if isinstance(node, Mapping) else None
    if not isinstance(arguments, Mapping) or "base" not in arguments:
        raise ConfigError(
            "model: expected a model with a base; add one, e.g. --config configs/model/tinychat.yaml"
        )
    own = {key: arguments[key] for key in fields if key in arguments}
    return {"class_path": f"{cls.__module__}.{cls.__name__}", "init_args": own}


def run_configuration(run: str, command: str) -> dict[str, Any]:
    """The resolved configuration of a run folder's training. Raises: ConfigError where there is none."""
    path = RunFolder.of(run).config()
    if not path.is_file():
        raise ConfigError(f"{command}: no run in {run!r} (it has no config.yaml); name a run folder")
    config = compose([str(path)], [])
    if "data" not in config:
        raise ConfigError(f"{path}: expected model and data, got no data; name a run folder")
    return config


def build(config: Mapping[str, Any], cls: type[M]) -> tuple[M, EvaluationData]:
    """Module and data, no model loaded yet. Raises: ConfigError."""
    parser = ArgumentParser(exit_on_error=False)
    parser.add_argument("--model", type=cls)
    parser.add_argument("--data", type=LightningDataModule)
    try:
        parsed = parser.parse_object({name: config[name] for name in ("model", "data")})
        built = parser.instantiate(parsed)
    except Exception as error:  # jsonargparse wraps every constructor's error in its own
        raise ConfigError(innermost(error)) from error
    return built.model, built.data


@contextmanager
def loaded(
    config: Mapping[str, Any], command: str, module: PretrainedModel, data: EvaluationData, folder: RunFolder
) -> Iterator[tuple[int, str]]:
    """The module's model in evaluation mode on its device, with a checkpoint's weights where the
    configuration names one, in the run's own arithmetic: a model may refuse in one precision what it answers
    in another. Gives the weights' step and the precision.

    Raises: RunError for a checkpoint that is missing, damaged or of another configuration.
    """
    checkpoint = find_checkpoint(folder.path, config.get("ckpt_path"), command, config)
    module.attach(data.chat)
    module.configure_model()
    step = load_weights(module, checkpoint) if checkpoint is not None else 0
    precision = _precision(config)
    module.to(_device(config))
    precision.convert_module(module)
    module.eval()
    with precision.forward_context():
        yield step, str(precision.precision)


def _precision(config: Mapping[str, Any]) -> Precision:
    """Lightning's plugin for `trainer.precision`, as a run has it."""
    trainer = config["trainer"]
    wanted = {name: trainer[name] for name in ("precision", "accelerator") if name in trainer}
    try:
        own = Trainer(**wanted, logger=False, enable_model_summary=False, enable_checkpointing=False)
    except MisconfigurationException as error:
        raise ConfigError(f"trainer: {' '.join(str(error).split())}") from error
    return own.precision_plugin


def _device(config: Mapping[str, Any]) -> torch.device:
    wants = config["trainer"].get("accelerator", "auto") in ("auto", "gpu", "cuda")
    return torch.device("cuda" if wants and torch.cuda.is_available() else "cpu")
