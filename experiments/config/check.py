"""Strict checks of a resolved configuration, before anything is built: unknown keys, values that do not fit
their annotation, what the device lacks.

LightningCLI checks types too, but buries the field in nested messages; here every error is one line with the
field's name as the user wrote it.
"""

from __future__ import annotations

import dataclasses
import inspect
import math
import typing
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Annotated, Any

import torch
from annotated_types import Ge, Le
from lightning import LightningDataModule, LightningModule, Trainer

from datamodules.fields import constructor, describe, is_plain, options, problem
from experiments.config.classes import import_class
from experiments.config.errors import ConfigError, suggest
from experiments.config.extras import check_extra
from experiments.config.files import TOP_LEVEL
from experiments.config.trainer_fields import LIGHTNING_FIELDS, TRAINER_FIELDS, check_trainer

Seed = Annotated[int, Ge(0), Le(2**32 - 1)]

TINYCHAT = "datamodules.sources.tinychat"
"""Of whose rows the defences' files calibrate thresholds where nothing else is said."""


def check(config: Mapping[str, Any], command: str) -> None:
    """Raises: ConfigError for the first thing that cannot run."""
    check_known("", config, TOP_LEVEL)
    for path, number in _numbers("", config):
        if not math.isfinite(number):
            raise ConfigError(f"{path}: expected a finite number, got {number}")
    for name, base in (("model", LightningModule), ("data", LightningDataModule)):
        node = config.get(name)
        if not isinstance(node, Mapping) or "class_path" not in node:
            raise ConfigError(
                f"{name}: expected class_path and init_args, got {node!r}; add a {name} file with --config"
            )
        _check_class(name, node, base)
    defence = (config["model"].get("init_args") or {}).get("defence")
    if command == "fit" and defence is not None:
        raise ConfigError(
            "model.defence: expected null in fit, where it would hide what training does to the model; leave "
            "it out here, and test the finished run with it"
        )
    base = str((config["model"].get("init_args") or {}).get("base"))
    if TINYCHAT in str(defence) and TINYCHAT not in str(config["data"]) and "tinychat:" not in base:
        raise ConfigError(
            "model.defence: it would be fitted to and calibrated on requests of the packaged tiny model, "
            "which is neither the model nor in the data; set the vars at the top of the defence's file to "
            "requests like yours "
            "(configs/data/smollm2_filters.yaml does so for SmolLM2)"
        )
    trainer = config.get("trainer") or {}
    if not isinstance(trainer, Mapping):
        raise ConfigError(f"trainer: expected fields of the Trainer, got {trainer!r}")
    _check_arguments("trainer", trainer, Trainer, TRAINER_FIELDS)
    for name in ("max_steps", "max_epochs", "limit_train_batches") if command == "fit" else ():
        if trainer.get(name) == 0 and not isinstance(trainer[name], bool):
            raise ConfigError(f"trainer.{name}: expected some training, got 0; set it above 0, or use test")
    check_trainer(trainer)
    check_precision(trainer.get("precision"), str(trainer.get("accelerator", "auto")))
    if config.get("seed_everything") is not None:
        check_value("seed_everything", config["seed_everything"], Seed)
    ckpt_path = config.get("ckpt_path")
    check_value("ckpt_path", ckpt_path, str | None)
    if ckpt_path not in (None, "last", "best") and not Path(ckpt_path).exists():
        raise ConfigError(f"ckpt_path: no file {ckpt_path!r}; give a checkpoint of this run, or `last`")


def check_precision(precision: Any, accelerator: str) -> None:
    """Raises: ConfigError for a precision that the device of this run lacks."""
    if precision is None:
        return
    on_gpu = accelerator in ("gpu", "cuda") or (accelerator == "auto" and torch.cuda.is_available())
    name = str(precision)
    if name.startswith("16") and not on_gpu and accelerator != "mps":
        raise ConfigError(
            f"trainer.precision: {name!r} needs a GPU and this run is on {accelerator}; set "
            "bf16-mixed or 32-true"
        )
    if name.startswith("transformer-engine") and not on_gpu:
        raise ConfigError(f"trainer.precision: {name!r} needs a Hopper GPU; set bf16-mixed or 32-true")
    has_gpu = on_gpu and torch.cuda.is_available()
    if name.startswith("bf16") and has_gpu and not torch.cuda.is_bf16_supported():
        raise ConfigError(
            f"trainer.precision: {name!r} is not supported by {torch.cuda.get_device_name()}; set "
            "32-true or 16-mixed"
        )


def check_value(path: str, value: Any, hint: Any) -> None:
    """Raises: ConfigError where the value, or anything in it, does not fit the annotation."""
    if isinstance(value, Mapping) and "class_path" in value:
        _check_class(path, value, hint)
    elif isinstance(value, Mapping):
        _check_mapping(path, value, hint)
    elif isinstance(value, list):
        _check_list(path, value, hint)
    elif not any(_takes(option, value) for option in options(hint)):
        raise ConfigError(f"{path}: expected {expected(hint)}, got {_shown(value)}")


def check_known(path: str, given: Mapping[str, Any], known: tuple[str, ...]) -> None:
    """Raises: ConfigError for the first key that is none of the known ones."""
    for key in given:
        if key not in known:
            where = f"{path}.{key}" if path else str(key)
            raise ConfigError(f"{where}: unknown field{suggest(str(key), known)}; known: {', '.join(known)}")


def parameters_of(function: Callable[..., Any]) -> dict[str, inspect.Parameter]:
    """The parameters of a constructor, `self` left out."""
    parameters = dict(inspect.signature(function).parameters)
    parameters.pop("self", None)
    return parameters


def _check_class(path: str, node: Mapping[str, Any], hint: Any) -> None:
    check_known(path, node, ("class_path", "init_args"))
    cls = import_class(path, node["class_path"])
    if inspect.isabstract(cls):
        raise ConfigError(f"{path}.class_path: {cls.__name__} is abstract; name a class that builds on it")
    wanted = [option for option in options(hint) if not is_plain(option)]
    if wanted and all(_is_class(option) for option in wanted) and not issubclass(cls, tuple(wanted)):
        names = " or ".join(option.__name__ for option in wanted)
        raise ConfigError(f"{path}.class_path: expected a kind of {names}, got {node['class_path']}")
    protocols = [option for option in wanted if getattr(option, "_is_protocol", False)]
    if protocols and len(protocols) == len(wanted) and not any(implements(cls, p) for p in protocols):
        names = " or ".join(option.__name__ for option in protocols)
        raise ConfigError(f"{path}.class_path: expected a kind of {names}, got {node['class_path']}")
    arguments = node.get("init_args") or {}
    _check_arguments(path, arguments, cls, LIGHTNING_FIELDS.get(cls, {}), required=True)
    check_extra(path, cls, arguments)
    _check_together(cls, arguments)


def _check_together(cls: type, arguments: Mapping[str, Any]) -> None:
    """Fields that are right one by one, and wrong together: a class whose constructor hands some on to
    another says so (`CHECKED_TOGETHER`). Raises: ConfigError."""
    for part in getattr(cls, "CHECKED_TOGETHER", ()):
        defaults = {name: own.default for name, own in parameters_of(cls).items()}
        names = [own.name for own in dataclasses.fields(part) if own.name in defaults]
        try:
            part(**{name: arguments.get(name, defaults[name]) for name in names})
        except (TypeError, ValueError) as error:
            raise ConfigError(str(error)) from error


def implements(cls: type, protocol: type) -> bool:
    """Whether a class has a protocol's methods, inherited ones too, with parameters of the same names."""
    protocols = [own for own in reversed(protocol.__mro__) if getattr(own, "_is_protocol", False)]
    for name, wanted in {name: own for base in protocols for name, own in vars(base).items()}.items():
        if not inspect.isfunction(wanted) or (name.startswith("_") and name != "__call__"):
            continue
        if name == "__init__" or getattr(wanted, "__module__", "").startswith("typing"):
            continue
        own = inspect.getattr_static(cls, name, None)
        own = own.__func__ if isinstance(own, staticmethod | classmethod) else own
        if not inspect.isfunction(own):
            return False
        given, asked = (list(inspect.signature(f).parameters.values()) for f in (own, wanted))
        # A protocol may leave the names open by positional-only parameters.
        same = (a.kind is a.POSITIONAL_ONLY or a.name == g.name for a, g in zip(asked, given, strict=False))
        if len(given) != len(asked) or not all(same):
            return False
    return True


def _is_class(option: Any) -> bool:
    """Whether `issubclass` decides what fits; of a protocol its methods do."""
    return isinstance(option, type) and option is not Any and not getattr(option, "_is_protocol", False)


def _check_arguments(
    path: str, arguments: Any, cls: type, fields: Mapping[str, Any], required: bool = False
) -> None:
    """A constructor's arguments; `fields` are annotations that say more than its own."""
    if not isinstance(arguments, Mapping):
        raise ConfigError(f"{path}: expected fields, got {arguments!r}")
    parameters = parameters_of(cls)
    if not any(p.kind is p.VAR_KEYWORD for p in parameters.values()):
        check_known(path, arguments, tuple(parameters))
    hints = {name: hint for name, (_, hint) in constructor(cls).items()} | dict(fields)
    for name, value in arguments.items():
        check_value(f"{path}.{name}", value, hints.get(name, Any))
    named = (inspect.Parameter.POSITIONAL_OR_KEYWORD, inspect.Parameter.KEYWORD_ONLY)
    missing = [n for n, p in parameters.items() if p.default is p.empty and p.kind in named]
    for name in missing if required else ():
        if name not in arguments:
            raise ConfigError(f"{path}.{name}: expected a value, got none; this field has no default")


def _check_mapping(path: str, value: Mapping[str, Any], hint: Any) -> None:
    record = next((o for o in options(hint) if isinstance(o, type) and dataclasses.is_dataclass(o)), None)
    if record is not None:
        _check_arguments(path, value, record, {}, required=True)
        return
    if not any(_is_a(option, Mapping) for option in options(hint)):
        field = f"{path}.{next(iter(value))}" if value else path
        raise ConfigError(f"{field}: expected {expected(hint)} at {path}, got fields")
    for key, item in value.items():
        check_value(f"{path}.{key}", item, _item_hint(hint))


def _check_list(path: str, value: list[Any], hint: Any) -> None:
    if not any(_is_a(option, list | tuple) for option in options(hint)):
        raise ConfigError(f"{path}: expected {expected(hint)}, got {_shown(value)}")
    for i, item in enumerate(value):
        check_value(f"{path}.{i}", item, _item_hint(hint))
    found = problem(value, hint)  # what relates the items: the length of a tuple
    if found is not None:
        raise ConfigError(f"{path}: {found}")


def _takes(option: Any, value: Any) -> bool:
    """Whether a plain value may stand for this annotation."""
    if is_plain(option):
        return problem(value, option) is None
    if option is Any or isinstance(option, typing.TypeVar):
        return True
    # Paths, durations and enums are written as texts; building them says what is wrong with one.
    is_record = isinstance(option, type) and option.__module__ not in ("datetime", "pathlib")
    return isinstance(value, str) and not is_record and typing.get_origin(option) is None


def _is_a(option: Any, kind: Any) -> bool:
    """Whether a list or mapping (`kind`) may stand for this annotation."""
    origin = typing.get_origin(option) or option
    if option is Any or isinstance(option, typing.TypeVar):
        return True
    if getattr(origin, "_is_protocol", False) and origin.__module__ != "collections.abc":
        return False
    return isinstance(origin, type) and any(
        issubclass(concrete, origin) for concrete in ((dict,) if kind is Mapping else (list, tuple))
    )


def _item_hint(hint: Any) -> Any:
    """The hint of a container's items, from the option that has one."""
    for option in options(hint):
        origin = typing.get_origin(option)
        items = [item for item in typing.get_args(option) if item is not Ellipsis]
        # The bounds of Annotated[int, Ge(1)] are no items.
        if isinstance(origin, type) and items and origin is not type and not is_plain(option):
            return items[-1]
    return Any


def expected(hint: Any) -> str:
    """An annotation in words, for errors and help."""
    return " or ".join(_expected_one(option) for option in options(hint))


def _expected_one(option: Any) -> str:
    if isinstance(option, type) and dataclasses.is_dataclass(option):
        return f"fields of {option.__name__}"
    origin = typing.get_origin(option)
    if isinstance(origin, type) and issubclass(origin, list) and typing.get_args(option):
        return f"a list of ({expected(typing.get_args(option)[0])})"
    if isinstance(origin, type) and not is_plain(option):
        return "fields by name" if issubclass(origin, Mapping) else "a list"
    if isinstance(option, type) and not is_plain(option):
        return f"class_path and init_args ({option.__name__})"
    return describe(option)


def _shown(value: Any) -> str:
    """As YAML writes it."""
    return {"None": "null", "True": "true", "False": "false"}.get(repr(value), repr(value))


def _numbers(path: str, node: Any) -> Iterator[tuple[str, float]]:
    """Every number of a configuration with its place."""
    if isinstance(node, float):
        yield path, node
    elif isinstance(node, Mapping):
        for key, value in node.items():
            yield from _numbers(path if key == "init_args" else f"{path}.{key}".lstrip("."), value)
    elif isinstance(node, list):
        for i, value in enumerate(node):
            yield from _numbers(f"{path}.{i}", value)
