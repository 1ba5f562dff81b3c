"""Fields set from the command line: `--model.attack.epsilon=0.1`, `--model.attack=NoAttack`."""

from __future__ import annotations

from typing import Any

from experiments.config.errors import PROJECT_ROOT, ConfigError

CLASS_KEYS = {"class_path", "init_args"}


def set_dotted(config: dict[str, Any], key: str, value: Any) -> None:
    """Set `a.b.c`, stepping through `init_args` where a class is on the way; a class name alone replaces the
    class.

    List elements are addressed by number (`trainer.callbacks.0.init_args.limit`).
    """
    node: Any = config
    *parents, last = key.split(".")
    for part in parents:
        node = _step(node, part, key)
    if isinstance(node, list):
        node[_index(node, last, key)] = value
        return
    if "class_path" in node and last not in CLASS_KEYS:
        node = node.setdefault("init_args", {})
    if isinstance(value, str) and isinstance(node.get(last), dict) and "class_path" in node[last]:
        value = {"class_path": _full_class_path(value, node[last]["class_path"])}
    node[last] = value


def _step(node: Any, part: str, key: str) -> Any:
    if isinstance(node, list):
        return node[_index(node, part, key)]
    if "class_path" in node and part not in CLASS_KEYS:
        node = node.setdefault("init_args", {})
    if node.get(part) is None:
        node[part] = {}
    if not isinstance(node[part], dict | list):
        raise ConfigError(
            f"--{key}: {part!r} is a plain value ({node[part]!r}), so nothing below it can be set"
        )
    return node[part]


def _index(node: list[Any], part: str, key: str) -> int:
    if not part.isdigit() or int(part) >= len(node):
        raise ConfigError(f"--{key}: expected a number below {len(node)} for a list element, got {part!r}")
    return int(part)


def _full_class_path(name: str, current: str) -> str:
    """A bare class name is looked for beside the class it replaces, then in the folders around it."""
    if "." in name:
        return name
    package = current.split(".")[:-2]
    while len(package) > 1 or package[:1] == current.split(".")[:1]:
        for file in sorted(PROJECT_ROOT.joinpath(*package).rglob("*.py")):
            if f"\nclass {name}" in file.read_text(encoding="utf-8"):
                return ".".join([*file.relative_to(PROJECT_ROOT).with_suffix("").parts, name])
        package = package[:-1]
    raise ConfigError(f"class {name!r}: not found beside {current}; give the full class path")
