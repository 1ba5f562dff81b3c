"""`--help`: the Trainer's fields and those of every class a configuration names, with type, default and
documentation; each class once."""

from __future__ import annotations

import dataclasses
import inspect
import re
import textwrap
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import docstring_parser
from lightning import Trainer

from datamodules.fields import constructor, options
from experiments.config.check import expected, parameters_of
from experiments.config.classes import import_class, moved_to, project_classes
from experiments.config.compose import compose
from experiments.config.errors import ConfigError, suggest
from experiments.config.trainer_fields import TRAINER_FIELDS

QUICKSTART = "configs/quickstart.yaml"
WIDTH = 110


def print_fields(files: Sequence[str], overrides: Sequence[tuple[str, str]]) -> None:
    """Print the fields of every class of a configuration under the places where it stands."""
    config = compose(files or [QUICKSTART], overrides)
    places: dict[type, list[str]] = {}
    for path, cls in classes(config):
        places.setdefault(cls, []).append(path)
    told: set[type] = set()
    for cls, paths in places.items():
        print(_filled("", ", ".join(paths) + ":", indent="  "))
        _print_class(cls, told)
    print("\ntrainer:")
    _print_class(Trainer, told)


def print_class(name: str) -> None:
    """Print the fields of one class. Raises: ConfigError if there is none of this name."""
    known = name if "." in name else moved_to(name)
    if known is None:
        raise ConfigError(f"--help.{name}: no such class in the project{suggest(name, project_classes())}")
    _print_class(import_class("--help", known), set())


def classes(node: Any, path: str = "") -> Iterator[tuple[str, type]]:
    """Every class of a configuration with its place."""
    if isinstance(node, Mapping):
        if "class_path" in node:
            yield path, import_class(path, node["class_path"])
        for key, value in node.items():
            inner = path if key == "init_args" else f"{path}.{key}".lstrip(".")
            yield from classes(value, inner)
    elif isinstance(node, list):
        for i, value in enumerate(node):
            yield from classes(value, f"{path}.{i}")


def fields(cls: type, told: set[type] | None = None) -> Iterator[tuple[str, str, str, str]]:
    """(name, type, default, documentation) of every constructor field, those of nested settings with a dotted
    name.

    Args:
        told: settings whose fields have been given already, and are not given again; grows.
    """
    hints = {name: hint for name, (_, hint) in constructor(cls).items()}
    hints |= TRAINER_FIELDS if cls is Trainer else {}
    texts = documentation(cls)
    for name, parameter in parameters_of(cls).items():
        hint, default = hints.get(name, Any), parameter.default
        if default is parameter.empty:
            said = ", required"
        else:
            said = "" if dataclasses.is_dataclass(default) else f", default {_shown(default)}"
        yield name, expected(hint), said, texts.get(name, "")
        for option in options(hint):
            if isinstance(option, type) and dataclasses.is_dataclass(option) and option not in (told or ()):
                if told is not None:
                    told.add(option)
                for inner, *rest in fields(option, told):
                    yield f"{name}.{inner}", *rest  # type: ignore[misc]


def _print_class(cls: type, told: set[type]) -> None:
    parsed = docstring_parser.parse(inspect.getdoc(cls) or "")
    about = f": {' '.join(parsed.short_description.split())}" if parsed.short_description else ""
    print(_filled("  ", f"{cls.__module__}.{cls.__qualname__}{about}", indent="    "))
    for name, kind, default, documentation in fields(cls, told):
        # Lightning's texts refer to its web pages: :paramref:`~lightning.pytorch.trainer.Trainer.logger`.
        text = re.sub(r":\w+:`~?(?:\w+\.)*(\w+)`", r"`\1`", documentation)
        print(
            _filled(
                "    ", f"{name} ({kind}{default}): {' '.join(text.split())}".rstrip(": "), indent="      "
            )
        )


def _filled(start: str, text: str, indent: str) -> str:
    return textwrap.fill(
        text,
        WIDTH,
        initial_indent=start,
        subsequent_indent=indent,
        break_on_hyphens=False,
        break_long_words=False,
    )


def _shown(default: Any) -> str:
    return {"None": "null", "True": "true", "False": "false"}.get(repr(default), repr(default))


def documentation(cls: type) -> dict[str, str]:
    """Field texts from `Args:`, from strings below dataclass fields, and from the base class where a field is
    inherited."""
    texts: dict[str, str] = {}
    for base in reversed(cls.__mro__[:-1]):
        for source in (base, getattr(base, "__init__", None)):
            for parameter in docstring_parser.parse(inspect.getdoc(source) or "").params:
                texts[parameter.arg_name] = parameter.description or ""
        if dataclasses.is_dataclass(base):
            for parameter in docstring_parser.parse_from_object(base).params:
                texts[parameter.arg_name] = parameter.description or ""
    return texts
