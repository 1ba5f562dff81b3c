"""A YAML mapping as an object of a dataclass, each error with its place: how studies and sweeps are read."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import MISSING, fields
from typing import Any, TypeVar, get_origin, get_type_hints

from datamodules.fields import problem
from experiments.config.errors import ConfigError, suggest

T = TypeVar("T")


def made(cls: type[T], node: Any, nested: Mapping[str, type], place: str = "") -> T:
    """An object of a mapping.

    Args:
        cls: a dataclass.
        node: what the YAML holds.
        nested: field -> class of what it holds, as a list, by name, or alone, as its annotation says.
        place: dotted place of the node.

    Raises: ConfigError with the place of what does not fit.
    """
    where = place or cls.__name__.lower()
    if not isinstance(node, Mapping):
        raise ConfigError(f"{where}: expected fields, got {node!r:.60}")
    own_fields = {own.name: own for own in fields(cls)}  # type: ignore[arg-type]
    hints = get_type_hints(cls, include_extras=True)
    values: dict[str, Any] = {}
    for name, value in node.items():
        at = f"{place}.{name}".lstrip(".")
        if name not in own_fields:
            raise ConfigError(
                f"{at}: unknown field{suggest(str(name), own_fields)}; known: {', '.join(own_fields)}"
            )
        if name in nested:
            values[name] = _nested(nested[name], value, at, get_origin(hints[name]))
            continue
        found = problem(value, hints[name])
        if found:
            raise ConfigError(f"{at}: {found}")
        values[name] = value
    missing = [
        name
        for name, own in own_fields.items()
        if name not in values and own.default is MISSING and own.default_factory is MISSING
    ]
    if missing:
        raise ConfigError(f"{where}: expected the field {missing[0]!r}, it is missing")
    return cls(**values)


def _nested(cls: type, node: Any, place: str, kind: Any) -> Any:
    if kind is dict:
        if not isinstance(node, Mapping) or not node:
            raise ConfigError(f"{place}: expected names with fields, got {node!r:.60}")
        return {str(name): made(cls, own, {}, f"{place}.{name}") for name, own in node.items()}
    if kind is list:
        if not isinstance(node, list):
            raise ConfigError(f"{place}: expected a list, got {node!r:.60}")
        return [made(cls, own, {}, f"{place}.{number}") for number, own in enumerate(node)]
    return made(cls, node, {}, place)


def known(name: str, names: Iterable[str], place: str) -> None:
    """Raises: ConfigError where there is nothing of this name."""
    there = list(names)
    if name not in there:
        raise ConfigError(f"{place}: expected one of {', '.join(there)}, got {name!r}{suggest(name, there)}")
