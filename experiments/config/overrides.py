"""Fields set from the command line: `--model.attack.epsilon=0.1`, `--model.attack=NoAttack`."""

from __future__ import annotations

from typing import Any

from experiments.config.classes import beside
from experiments.config.errors import ConfigError

CLASS_KEYS = {"class_path", "init_args"}
STRATEGY = "trainer.strategy"
"""Takes a class, or a name of Lightning's own (`auto`, `ddp`)."""


def set_dotted(config: dict[str, Any], key: str, value: Any) -> None:
    """Set `a.b.c`, stepping through `init_args` where a class is on the way; a class name alone replaces the
    class.

    List elements are addressed by number (`trainer.callbacks.0.init_args.limit`).
    """
    node: Any = config
    *parents, last = key.split(".")
    if not all(key.split(".")):
        raise ConfigError(f"--{key}: expected names joined by dots, got an empty one")
    for part in parents:
        node = _step(node, part, key)
    if isinstance(node, list):
        node[_index(node, last, key)] = value
        return
    if "class_path" in node and last not in CLASS_KEYS:
        node = node.setdefault("init_args", {})
    named = key == STRATEGY and isinstance(value, str) and value.islower() and "." not in value
    if (
        isinstance(value, str)
        and not named
        and isinstance(node.get(last), dict)
        and "class_path" in node[last]
    ):
        class_path = value if "." in value else beside(value, str(node[last]["class_path"]))
        value = {"class_path": class_path}
    node[last] = value


def _step(node: Any, part: str, key: str) -> Any:
    if isinstance(node, list):
        found = node[_index(node, part, key)]
    else:
        if "class_path" in node and part not in CLASS_KEYS:
            node = node.setdefault("init_args", {})
        if node.get(part) is None:
            node[part] = {}
        found = node[part]
    if not isinstance(found, dict | list):
        raise ConfigError(f"--{key}: {part!r} is a plain value ({found!r}), so nothing below it can be set")
    return found


def _index(node: list[Any], part: str, key: str) -> int:
    if not part.isdigit() or int(part) >= len(node):
        raise ConfigError(f"--{key}: expected a number below {len(node)} for a list element, got {part!r}")
    return int(part)
