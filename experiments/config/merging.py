"""How one mapping is laid over another: files over files, a mapping's own keys over what it includes."""

from __future__ import annotations

from typing import Any

from experiments.config.errors import ConfigError


def merge(base: dict[str, Any], over: dict[str, Any]) -> dict[str, Any]:
    """`over` on top of `base`, neither changed.

    Lists are replaced, except that `callbacks+:` appends. Changing a `class_path` drops the old class's
    `init_args`.
    """
    merged = dict(base)
    if "class_path" in over and over["class_path"] != base.get("class_path", over["class_path"]):
        merged.pop("init_args", None)
    for key, value in over.items():
        if isinstance(key, str) and key.endswith("+"):
            # Without a list to append to yet, the addition waits under its own key for the file that brings
            # one.
            name = key[:-1] if key[:-1] in merged else key
            merged[name] = [*_list(name, merged.get(name)), *_list(key, value)]
        elif isinstance(value, dict) and isinstance(merged.get(key), dict):
            merged[key] = merge(merged[key], value)
        else:
            merged[key] = merge({}, value) if isinstance(value, dict) else value
            merged.pop(f"{key}+", None)
    return merged


def settle(node: Any) -> Any:
    """Turn additions that met no list into lists of their own."""
    if isinstance(node, dict):
        return {str(key).removesuffix("+"): settle(value) for key, value in node.items()}
    return [settle(item) for item in node] if isinstance(node, list) else node


def _list(key: str, value: Any) -> list[Any]:
    if value is not None and not isinstance(value, list):
        raise ConfigError(f"{key}: expected a list to append, got {value!r}")
    return value or []
