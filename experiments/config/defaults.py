"""What every run has unless its YAML says otherwise: gradients in evaluation, a CSV log, a run folder."""

from __future__ import annotations

from enum import Enum
from typing import Any

import torch

from datamodules.fields import constructor
from experiments.config.classes import import_class

CSV = "callbacks.run_folder.loggers.RunCSVLogger"


def with_defaults(config: dict[str, Any]) -> dict[str, Any]:
    """The configuration with the trainer's defaults filled in; a CSV log beside whatever loggers are
    named, and none with `logger: false`."""
    trainer = dict(config.get("trainer") or {})
    if trainer.get("default_root_dir") is None:
        trainer["default_root_dir"] = "runs/unnamed"
    trainer.setdefault("inference_mode", False)
    # The data deals its rows out to the processes itself; Lightning's sampler would divide them again.
    trainer.setdefault("use_distributed_sampler", False)
    trainer.setdefault("log_every_n_steps", 1)
    loggers = trainer.get("logger")
    loggers = [] if loggers in (None, True) else [loggers] if isinstance(loggers, dict) else loggers
    if isinstance(loggers, list) and not any(logger.get("class_path") == CSV for logger in loggers):
        csv = {"class_path": CSV, "init_args": {"save_dir": trainer["default_root_dir"]}}
        loggers = [csv, *loggers]
    trainer["logger"] = loggers
    return {"seed_everything": 0, **config, "trainer": trainer}


def with_plain_defaults(node: Any) -> Any:
    """The configuration with what constructors have as defaults and the parser cannot put in words written
    out: members of enumerations, devices (Lightning's Timer and StochasticWeightAveraging have one)."""
    if isinstance(node, list):
        return [with_plain_defaults(item) for item in node]
    if not isinstance(node, dict):
        return node
    found = {key: with_plain_defaults(value) for key, value in node.items()}
    if "class_path" in found:
        cls = import_class("", found["class_path"])
        parameters = constructor(cls) if isinstance(cls, type) else {}
        defaults = {name: own.default for name, (own, _) in parameters.items()}
        plain = {name: default.value for name, default in defaults.items() if isinstance(default, Enum)}
        plain |= {
            name: str(default) for name, default in defaults.items() if isinstance(default, torch.device)
        }
        if plain:
            found["init_args"] = plain | (found.get("init_args") or {})
    return found
