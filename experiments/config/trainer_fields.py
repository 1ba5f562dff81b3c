"""What the Trainer's fields may hold, where Lightning's own annotations say less."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Annotated, Any, Literal

from annotated_types import Ge, Gt, Le
from lightning.pytorch.accelerators import AcceleratorRegistry
from lightning.pytorch.callbacks import EarlyStopping, ModelCheckpoint, Timer
from lightning.pytorch.utilities.exceptions import MisconfigurationException

from datamodules.fields import Count, NonNegative, NonNegativeInt, Probability
from experiments.config.errors import ConfigError

OrUnlimited = Annotated[int, Ge(-1)]
"""A number of steps or epochs; -1 is no limit."""
Part = NonNegativeInt | Probability | None
"""So many batches, or a part of all."""

TRAINER_FIELDS: dict[str, Any] = {
    # `auto` and `gpu` are the Trainer's own words and stand in no registry.
    "accelerator": Literal[("auto", "gpu", *sorted(AcceleratorRegistry.available_accelerators()))],
    "devices": Count | Literal["auto", -1] | list[NonNegativeInt] | str,
    "num_nodes": Count,
    "fast_dev_run": NonNegativeInt | bool,
    "max_epochs": OrUnlimited | None,
    "min_epochs": NonNegativeInt | None,
    "max_steps": OrUnlimited,
    "min_steps": NonNegativeInt | None,
    "limit_train_batches": Part,
    "limit_val_batches": Part,
    "limit_test_batches": Part,
    "limit_predict_batches": Part,
    "overfit_batches": NonNegativeInt | Probability,
    "check_val_every_n_epoch": Count | None,
    "num_sanity_val_steps": OrUnlimited | None,
    "val_check_interval": Count | Annotated[float, Gt(0), Le(1)] | str | None,
    "default_root_dir": str,
    "log_every_n_steps": NonNegativeInt | None,
    "accumulate_grad_batches": Count,
    "gradient_clip_val": NonNegative | None,
    "gradient_clip_algorithm": Literal["norm", "value"] | None,
    "reload_dataloaders_every_n_epochs": NonNegativeInt,
}


LIGHTNING_FIELDS: dict[type, dict[str, Any]] = {
    EarlyStopping: {"patience": NonNegativeInt, "min_delta": NonNegative},
    ModelCheckpoint: {
        "save_top_k": Annotated[int, Ge(-1)],
        "every_n_train_steps": NonNegativeInt | None,
        "every_n_epochs": NonNegativeInt | None,
    },
}
"""The same of Lightning's own callbacks."""


def check_trainer(trainer: Mapping[str, Any]) -> None:
    """Raises: ConfigError for what no annotation can refuse."""
    _check_strategy(trainer.get("strategy"))
    if trainer.get("default_root_dir") == "":
        raise ConfigError("trainer.default_root_dir: expected a folder, got ''; name one, e.g. runs/mine")
    _check_time(trainer.get("max_time"))
    for unit in ("steps", "epochs"):
        least, most = trainer.get(f"min_{unit}"), trainer.get(f"max_{unit}")
        if isinstance(least, int) and isinstance(most, int) and 0 <= most < least:
            raise ConfigError(f"trainer.min_{unit}: expected at most max_{unit} ({most}), got {least}")


def _check_strategy(strategy: Any) -> None:
    """Raises: ConfigError for a strategy by name that would not synchronise gradients, before Lightning asks
    for the hardware that it needs; one of a class is refused when it is built (`check_strategy`)."""
    if isinstance(strategy, str) and strategy != "auto" and not strategy.startswith("ddp"):
        raise ConfigError(
            f"trainer.strategy: {strategy!r} is not supported (gradients would not be synchronised between "
            "processes); set trainer.strategy: ddp, trainer.devices: 1, or --config "
            "configs/trainer/fsdp2.yaml"
        )


def _check_time(given: Any) -> None:
    """Raises: ConfigError for a time limit that is none."""
    try:
        seconds = None if given is None else Timer(given)._duration
    except (TypeError, ValueError, MisconfigurationException) as error:
        raise ConfigError(
            f"trainer.max_time: expected DD:HH:MM:SS or fields like {{hours: 2}}, got {given!r}"
        ) from error
    if seconds is not None and seconds <= 0:
        raise ConfigError(f"trainer.max_time: expected some time, got {given!r}; set it above 0")
