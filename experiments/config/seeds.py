"""`seed_everything` is the seed of everything that names none of its own."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from datamodules.fields import constructor
from experiments.config.classes import import_class
from experiments.config.errors import ConfigError


def with_seeds(config: Mapping[str, Any]) -> dict[str, Any]:
    """The configuration with every open seed set.

    A seed is open where a class's constructor takes `seed: int | None = None` and the configuration gives it
    none or null. Seeds that decide which rows exist (of data sources) are numbers with a default and stay.

    Raises: ConfigError where seed_everything is no whole number >= 0.
    """
    seed = config.get("seed_everything")
    if isinstance(seed, bool) or not isinstance(seed, int) or not 0 <= seed < 2**32:
        raise ConfigError(f"seed_everything: expected an integer within [0, 2^32), got {seed!r}")
    return {key: _filled(key, value, seed) for key, value in config.items()}


def seeds_of(config: Mapping[str, Any]) -> dict[str, int]:
    """Every seed that a resolved configuration sets, by its place: {"model.seed": 0, ...}."""
    return dict(_found("", config))


def _filled(path: str, node: Any, seed: int) -> Any:
    if isinstance(node, list):
        return [_filled(f"{path}.{i}", item, seed) for i, item in enumerate(node)]
    if not isinstance(node, Mapping):
        return node
    filled = {key: _filled(f"{path}.{key}", value, seed) for key, value in node.items()}
    if "class_path" in filled:
        cls = import_class(path, filled["class_path"])
        seed_of = constructor(cls).get("seed") if isinstance(cls, type) else None
        arguments = dict(filled.get("init_args") or {})
        is_open = seed_of is not None and seed_of[0].default is None
        if is_open and arguments.get("seed") is None:
            filled["init_args"] = {**arguments, "seed": seed}
    return filled


def _found(path: str, node: Any) -> list[tuple[str, int]]:
    if isinstance(node, list):
        return [pair for i, item in enumerate(node) for pair in _found(f"{path}.{i}", item)]
    if not isinstance(node, Mapping):
        return []
    inner = node.get("init_args") or {} if "class_path" in node else node
    own = [(f"{path}.seed", inner["seed"])] if isinstance(inner.get("seed"), int) else []
    return own + [pair for key, item in inner.items() for pair in _found(f"{path}.{key}".strip("."), item)]
