"""Strict checks of a resolved configuration, before anything is built: unknown keys, wrong types, what the
device lacks.

LightningCLI checks types too, but buries the field in nested messages; here every error is one line with the
field's name.
"""

from __future__ import annotations

import dataclasses
import importlib
import inspect
import types
import typing
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, Literal, Union

import torch
from lightning import Trainer

from experiments.config.compose import ConfigError, suggest

TOP_LEVEL = ("seed_everything", "trainer", "model", "data", "ckpt_path")


def check(config: Mapping[str, Any], command: str) -> None:
    """Raises: ConfigError for the first thing that cannot run."""
    _known("", config, TOP_LEVEL)
    for name in ("model", "data"):
        node = config.get(name)
        if not isinstance(node, Mapping) or "class_path" not in node:
            raise ConfigError(
                f"{name}: expected class_path and init_args, got {node!r}; add a {name} file with --config"
            )
        _check_class(name, node)
    trainer = config.get("trainer") or {}
    _check_arguments("trainer", trainer, Trainer.__init__, required=False)
    check_precision(trainer.get("precision"), str(trainer.get("accelerator", "auto")))
    ckpt_path = config.get("ckpt_path")
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
    if (
        name.startswith("bf16")
        and on_gpu
        and torch.cuda.is_available()
        and not torch.cuda.is_bf16_supported()
    ):
        raise ConfigError(
            f"trainer.precision: {name!r} is not supported by {torch.cuda.get_device_name()}; set "
            "32-true or 16-mixed"
        )


def import_class(path: str, class_path: Any) -> type:
    """The class behind a class_path. Raises: ConfigError naming the field."""
    if not isinstance(class_path, str) or "." not in class_path:
        raise ConfigError(f"{path}.class_path: expected package.module.Class, got {class_path!r}")
    module_name, _, name = class_path.rpartition(".")
    try:
        module = importlib.import_module(module_name)
    except ImportError as error:
        raise ConfigError(f"{path}.class_path: cannot import {module_name!r}: {error}") from error
    found = getattr(module, name, None)
    if not inspect.isclass(found):
        classes = [n for n, c in vars(module).items() if inspect.isclass(c)]
        raise ConfigError(f"{path}.class_path: no class {name!r} in {module_name}{suggest(name, classes)}")
    return found


def _check_class(path: str, node: Mapping[str, Any]) -> None:
    _known(path, node, ("class_path", "init_args"))
    arguments = node.get("init_args") or {}
    _check_arguments(path, arguments, import_class(path, node["class_path"]).__init__, required=True)  # type: ignore[misc]


def _check_arguments(
    path: str, arguments: Mapping[str, Any], function: Callable[..., Any], required: bool
) -> None:
    if not isinstance(arguments, Mapping):
        raise ConfigError(f"{path}: expected fields, got {arguments!r}")
    parameters = {n: p for n, p in inspect.signature(function).parameters.items() if n != "self"}
    if not any(p.kind is p.VAR_KEYWORD for p in parameters.values()):
        _known(path, arguments, tuple(parameters))
    hints = typing.get_type_hints(function)
    for name, value in arguments.items():
        _check_value(f"{path}.{name}", value, hints.get(name, Any))
    missing = [
        n
        for n, p in parameters.items()
        if p.default is p.empty and p.kind is p.POSITIONAL_OR_KEYWORD and n not in arguments
    ]
    if required and missing:
        raise ConfigError(f"{path}.{missing[0]}: expected a value, got none; this field has no default")


def _check_value(path: str, value: Any, hint: Any) -> None:
    if isinstance(value, Mapping) and "class_path" in value:
        _check_class(path, value)
        return
    if isinstance(value, list):
        for i, item in enumerate(value):
            _check_value(f"{path}.{i}", item, _item_hint(hint))
        if _plain(hint) and not _fits(value, hint):
            raise ConfigError(f"{path}: expected {_name(hint)}, got {value!r}")
        return
    if isinstance(value, Mapping):
        if _plain(hint) and hint is not Any:
            raise ConfigError(f"{path}.{next(iter(value), '')}: expected {_name(hint)} at {path}, got fields")
        record = _dataclass(hint)
        if record is not None:
            _check_arguments(path, value, record.__init__, required=True)  # type: ignore[misc]
        else:
            for key, item in value.items():
                _check_value(f"{path}.{key}", item, _item_hint(hint))
        return
    if not _plain(hint):
        if (
            isinstance(value, str | bool | int | float)
            and _dataclass(hint) is not None
            and not _scalar_allowed(hint)
        ):
            raise ConfigError(f"{path}: expected fields of {_dataclass(hint).__name__}, got {value!r}")  # type: ignore[union-attr]
        return
    if not _fits(value, hint):
        raise ConfigError(f"{path}: expected {_name(hint)}, got {value!r}")


def _known(path: str, given: Mapping[str, Any], known: tuple[str, ...]) -> None:
    for key in given:
        if key not in known:
            where = f"{path}.{key}" if path else str(key)
            raise ConfigError(f"{where}: unknown field{suggest(str(key), known)}; known: {', '.join(known)}")


def _options(hint: Any) -> tuple[Any, ...]:
    """The members of a union, or the hint alone."""
    return typing.get_args(hint) if typing.get_origin(hint) in (Union, types.UnionType) else (hint,)


def _plain(hint: Any) -> bool:
    """Whether values of this type can be checked here: numbers, texts, literals, None and lists or tuples of
    them."""
    for option in _options(hint):
        origin = typing.get_origin(option)
        if origin in (list, tuple):
            if not all(_plain(item) for item in typing.get_args(option) if item is not Ellipsis):
                return False
        elif origin is not Literal and option not in (int, float, str, bool, type(None)):
            return False
    return True


def _fits(value: Any, hint: Any) -> bool:
    for option in _options(hint):
        origin = typing.get_origin(option)
        if origin is Literal:
            ok = any(value == allowed and type(value) is type(allowed) for allowed in typing.get_args(option))
        elif origin in (list, tuple):
            items = [i for i in typing.get_args(option) if i is not Ellipsis]
            ok = isinstance(value, list | tuple) and all(any(_fits(v, i) for i in items) for v in value)
        elif option is float:
            ok = isinstance(value, int | float) and not isinstance(value, bool)
        elif option is int:
            ok = isinstance(value, int) and not isinstance(value, bool)
        else:
            ok = isinstance(value, option)
        if ok:
            return True
    return False


def _item_hint(hint: Any) -> Any:
    """The hint of a container's items, from the option that has one."""
    for option in _options(hint):
        if typing.get_origin(option) in (list, tuple, dict) and typing.get_args(option):
            return typing.get_args(option)[-1]
    return Any


def _dataclass(hint: Any) -> type | None:
    return next(
        (
            option
            for option in _options(hint)
            if dataclasses.is_dataclass(option) and isinstance(option, type)
        ),
        None,
    )


def _scalar_allowed(hint: Any) -> bool:
    return any(option in (str, int, float, bool) for option in _options(hint))


def _name(hint: Any) -> str:
    def one(option: Any) -> str:
        if option is type(None):
            return "null"
        if typing.get_origin(option) is Literal:
            return " | ".join(repr(v) for v in typing.get_args(option))
        return (
            option.__name__ if isinstance(option, type) and typing.get_origin(option) is None else str(option)
        )

    return " or ".join(one(option) for option in _options(hint))
