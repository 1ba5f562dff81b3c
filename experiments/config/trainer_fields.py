"""What the Trainer's fields may hold, where Lightning's own annotations say less."""

from __future__ import annotations

from typing import Annotated, Any, Literal

from annotated_types import Ge
from lightning.pytorch.accelerators import AcceleratorRegistry

from datamodules.fields import Count, NonNegative, NonNegativeInt, Probability

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
    "log_every_n_steps": NonNegativeInt | None,
    "accumulate_grad_batches": Count,
    "gradient_clip_val": NonNegative | None,
    "gradient_clip_algorithm": Literal["norm", "value"] | None,
    "reload_dataloaders_every_n_epochs": NonNegativeInt,
}
