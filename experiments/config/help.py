"""`--help`: every field of the classes a configuration names, with type, default and documentation."""

from __future__ import annotations

import dataclasses
import inspect
import typing
from collections.abc import Iterator, Mapping
from typing import Any

import docstring_parser

from experiments.cli import USAGE
from experiments.config.classes import import_class, moved_to, project_classes
from experiments.config.errors import ConfigError, suggest

WIDTH = 110


def print_help(flag: str, config: Mapping[str, Any]) -> None:
    """Print the fields of one class (`--help.CLASS`), or usage and the fields of every class of a
    configuration."""
    if flag.startswith("--help."):
        _print_class(_find_class(flag.removeprefix("--help.")))
        return
    print(USAGE)
    for path, cls in _classes(config):
        print(f"\n{path}:")
        _print_class(cls)


def _classes(node: Any, path: str = "") -> Iterator[tuple[str, type]]:
    if isinstance(node, Mapping):
        if "class_path" in node:
            yield path, import_class(path, node["class_path"])
        for key, value in node.items():
            inner = path if key == "init_args" else f"{path}.{key}".lstrip(".")
            yield from _classes(value, inner)
    elif isinstance(node, list):
        for i, value in enumerate(node):
            yield from _classes(value, f"{path}.{i}")


def _print_class(cls: type) -> None:
    parsed = docstring_parser.parse(inspect.getdoc(cls) or "")
    print(f"  {cls.__module__}.{cls.__qualname__}: {parsed.short_description or ''}")
    for name, kind, default, text in fields(cls):
        print(f"    {name} ({kind}{default}): {' '.join(text.split())}")


def fields(cls: type) -> Iterator[tuple[str, str, str, str]]:
    """(name, type, default, documentation) of every constructor field, those of nested settings with a dotted
    name."""
    hints = typing.get_type_hints(cls.__init__)  # type: ignore[misc]
    texts = _documentation(cls)
    for name, parameter in inspect.signature(cls).parameters.items():
        hint = hints.get(name, Any)
        if parameter.default is parameter.empty:
            default = ", required"
        else:
            default = (
                "" if dataclasses.is_dataclass(parameter.default) else f", default {parameter.default!r}"
            )
        yield name, str(parameter.annotation).replace("typing.", ""), default, texts.get(name, "")
        for option in (hint, *typing.get_args(hint)):
            if isinstance(option, type) and dataclasses.is_dataclass(option):
                yield from ((f"{name}.{inner}", *rest) for inner, *rest in fields(option))  # type: ignore[misc]


def _documentation(cls: type) -> dict[str, str]:
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


def _find_class(name: str) -> type:
    known = name if "." in name else moved_to(name)
    if known is None:
        raise ConfigError(f"--help.{name}: no such class in the project{suggest(name, project_classes())}")
    return import_class("--help", known)
