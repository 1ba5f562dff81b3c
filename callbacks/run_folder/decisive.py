"""What of a configuration decides the weights, so that a resumed run is the run that was begun.

May differ between a run and its continuation, because the weights of a given step do not depend on it: steps
and time limits (the learning rate follows the schedule of the new total from there on), loggers, evaluations
and callbacks but for those that change the weights, hardware (accelerator, devices, attention
kernel, activation checkpointing) and folders. All else must be equal: model, attack, objective, terms, data,
optimiser, seed, precision, plugins, clipping and how a step is divided; and the files that these fields name
must hold what they held.
"""

from __future__ import annotations

import dataclasses
import hashlib
import importlib
import inspect
import json
import typing
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import yaml
from lightning import Trainer

from datamodules.contents import CONTENT, fingerprints
from datamodules.fields import constructor

TRAINER = (
    "precision",
    "gradient_clip_val",
    "gradient_clip_algorithm",
    "accumulate_grad_batches",
)
"""The trainer's fields that decide the weights."""
DECIDING_CALLBACKS = (
    "BackboneFinetuning",
    "BaseFinetuning",
    "BatchSizeFinder",
    "EMAWeightAveraging",
    "Float32Products",
    "GradientAccumulationScheduler",
    "LearningRateFinder",
    "ModelPruning",
    "StochasticWeightAveraging",
    "WeightAveraging",
)
"""Callbacks that change the weights: Lightning's own, and what rounds otherwise."""
WITHOUT_EFFECT = [
    {"class_path": "callbacks.float32_products.Float32Products", "precision": "highest"},
]
"""As torch is without them."""
ALL_ROWS = {"limit_train_batches": (None, 1.0), "overfit_batches": (None, 0.0)}
"""Further ones, kept only where they take rows away; the values that take none."""
STEPS = ("trainer.max_steps", "trainer.max_epochs")
"""Kept beside them, to say so where they have changed."""
ORDER = "data.order"
"""Not a field: how the rows of a step in several micro-batches are drawn."""
FREE = (
    "model.reference_cache",
    "model.defence",
    "model.base.attn_implementation",
    "model.base.gradient_checkpointing",
    "model.base.compile_attacks",
    "data.evaluation",
    "data.utility_store",
)
"""Fields of model and data that do not."""
LEFT_OUT = "data.on_overlap.evaluated"
"""Not a field: what is evaluated on, where training rows that occur there are left out of training."""
LOADING = (
    "model.base.name_or_path",
    "model.base.gguf_file",
    "model.base.revision",
    "model.base.lora",
    "model.base.config",
)
"""What must be equal for an evaluation to load the weights: it may have data, attack and precision of its
own."""
COMPUTING = ("model.base.lora.merge",)
"""Fields below those that do not: how attacks compute with the weights."""

Flat = dict[str, Any]
"""`model.attack.epsilon` -> value, `init_args` left out."""


def decisive(config: Mapping[str, Any]) -> Flat:
    """The fields that decide the weights with their values, defaults included."""
    fields = {"seed_everything": config.get("seed_everything")}
    given = config.get("trainer") or {}
    defaults = inspect.signature(Trainer.__init__).parameters
    for name in (*TRAINER, *(field.removeprefix("trainer.") for field in STEPS)):
        fields[f"trainer.{name}"] = given.get(name, defaults[name].default)
    for name, without in ALL_ROWS.items():
        value = given.get(name)
        # One batch (1) is not all of them (1.0).
        if value not in without or (name == "limit_train_batches" and type(value) is int):
            fields[f"trainer.{name}"] = value
    for i, node in enumerate(given.get("plugins") or []):
        fields |= flat(f"trainer.plugins.{i}", filled(node))
    for node in given.get("callbacks") or []:
        name = str(node.get("class_path", "")).rpartition(".")[2]
        if name in DECIDING_CALLBACKS and (own := filled(node)) not in WITHOUT_EFFECT:
            fields |= flat(f"trainer.callbacks.{name}", own)
    for name in ("model", "data"):
        fields |= flat(name, filled(config.get(name)))
    if fields.get("data.micro_batches", 1) != 1:
        # Until 0.2.0 the micro-batches decided which rows a step holds: such a run would go on with others.
        fields[ORDER] = "rows drawn by the step"
    if fields.get("data.on_overlap") == "skip":
        fields[LEFT_OUT] = _evaluated(fields)
    kept = {key: value for key, value in fields.items() if not _below(key, FREE)}
    # As the checkpoint gives it back: no tuples, no enums.
    plain = typing.cast(Flat, json.loads(json.dumps(kept, default=str)))
    return plain | fingerprints(plain)


def _evaluated(fields: Flat) -> str:
    """A digest of the sets that training rows must not occur in, with what their files hold."""
    allowed = [str(name) for name in fields.get("data.allow_overlap") or ()]
    free = ("data.evaluation.batch_size", *(f"data.{name}" for name in allowed))
    sets = {k: v for k, v in fields.items() if _below(k, ("data.evaluation",)) and not _below(k, free)}
    plain = json.loads(json.dumps(sets, default=str))
    text = json.dumps(plain | fingerprints(plain), sort_keys=True)
    return hashlib.blake2b(text.encode(), digest_size=8).hexdigest()


def differences(then: Flat, now: Flat, only: tuple[str, ...] | None = None) -> list[str]:
    """`field: X then, Y now` for every field that differs, of those below `only` that decide how weights are
    loaded; of all but the steps where it is not given."""
    keys = sorted(key for key in {*then, *now} if (_loads(key, only) if only else key not in STEPS))
    return [
        f"{key}: {_word(then.get(key, '(unset)'))} then, {_word(now.get(key, '(unset)'))} now"
        for key in keys
        # A field that came to its class later is null where it does nothing.
        if not _equal(then.get(key), now.get(key))
        # Runs of earlier versions do not say.
        and not (key == LEFT_OUT and not (key in then and key in now))
        # A file that is not here is its loader's to name; where a path differs, so does what it holds.
        and not (
            key.endswith(f".{CONTENT}") and not (key in then and key in now and _same_path(key, then, now))
        )
    ]


def _same_path(key: str, then: Flat, now: Flat) -> bool:
    field = key.removesuffix(f".{CONTENT}")
    return _equal(then.get(field), now.get(field))


def _equal(a: Any, b: Any) -> bool:
    # In Python True == 1; in a configuration they are different values.
    return bool(a == b) and isinstance(a, bool) == isinstance(b, bool)


def _word(value: Any) -> str:
    return value if value == "(unset)" else json.dumps(value, ensure_ascii=False)


def _loads(key: str, only: tuple[str, ...]) -> bool:
    return _below(key, only) and not _below(key, COMPUTING)


def _below(key: str, parents: tuple[str, ...]) -> bool:
    return any(key == parent or key.startswith(f"{parent}.") for parent in parents)


def filled(node: Any, hint: Any = None) -> Any:
    """A configuration's node with the defaults of its classes filled in: leaving a field out and writing its
    default are the same run."""
    if isinstance(node, list):
        inner = _items_hint(hint)
        return [filled(item, inner) for item in node]
    if not isinstance(node, Mapping):
        return node
    if "class_path" in node:
        module, _, name = str(node["class_path"]).rpartition(".")
        cls = getattr(importlib.import_module(module), name)
        return {"class_path": node["class_path"], **_filled_arguments(cls, node.get("init_args") or {})}
    record = next((h for h in _options(hint) if dataclasses.is_dataclass(h) and isinstance(h, type)), None)
    if record is not None:
        return _filled_arguments(record, node)
    return {key: filled(value) for key, value in node.items()}


def _filled_arguments(cls: type, given: Mapping[str, Any]) -> dict[str, Any]:
    values: dict[str, Any] = {}
    parameters = constructor(cls)
    for name, (parameter, hint) in parameters.items():
        if name in given:
            values[name] = filled(given[name], hint)
        elif parameter.default is not parameter.empty:
            default = parameter.default
            values[name] = (
                default if isinstance(default, bool | int | float | str | None) else _plain(default)
            )
    # What a constructor takes without naming it decides no less.
    return values | {name: filled(value) for name, value in given.items() if name not in parameters}


def _plain(default: Any) -> Any:
    if isinstance(default, tuple | list):
        return [_plain(item) for item in default]
    # A dataclass's factory has no value before it is called.
    return default if isinstance(default, bool | int | float | str | None) else None


def _options(hint: Any) -> tuple[Any, ...]:
    return typing.get_args(hint) or (hint,)


def _items_hint(hint: Any) -> Any:
    for option in (hint, *_options(hint)):
        if typing.get_origin(option) is list:
            return typing.get_args(option)[0]
    return None


def flat(path: str, node: Any) -> Flat:
    """Every value below a node by its dotted place, `init_args` kept where `filled` has not dropped it."""
    return dict(_leaves(path, node))


def _leaves(path: str, node: Any) -> Iterator[tuple[str, Any]]:
    if isinstance(node, Mapping) and node:
        for key, value in node.items():
            yield from _leaves(f"{path}.{key}", value)
    elif isinstance(node, list) and any(isinstance(item, Mapping) for item in node):
        for i, item in enumerate(node):
            yield from _leaves(f"{path}.{i}", item)
    elif node not in ({}, []):
        yield path, node


def begun_with(path: Path) -> Flat | None:
    """What decides the weights of a run, by the configuration that it began with; None where that cannot be
    read."""
    if not path.is_file():
        return None
    try:
        config = yaml.safe_load(path.read_text(encoding="utf-8"))
        return decisive(config)
    except (yaml.YAMLError, UnicodeDecodeError, AttributeError, ImportError, TypeError):
        return None  # nothing was trained: an unreadable record of it protects nothing
