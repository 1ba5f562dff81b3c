"""One resolved configuration from several YAML files and overrides.

Files are merged in the order given (files.py says what they may include, merging.py how they are merged).
Overrides come last, then `${...}` is resolved by OmegaConf: an interpolation never sees a value that an
override replaces. Values under a top-level `vars:` can be interpolated and are then dropped.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping, Sequence
from difflib import get_close_matches
from typing import Any

from omegaconf import OmegaConf
from omegaconf.errors import OmegaConfBaseException

from experiments.config.classes import import_class
from experiments.config.errors import PROJECT_ROOT, ConfigError, suggest
from experiments.config.files import expand, load, parse
from experiments.config.merging import merge, settle
from experiments.config.overrides import set_dotted

MISSPELT = 0.9
"""Likeness from which a name that nothing uses is another one's: a letter or two of ten."""
__all__ = ["PROJECT_ROOT", "ConfigError", "compose", "merge", "suggest"]


def compose(files: Sequence[str], overrides: Sequence[tuple[str, str]]) -> dict[str, Any]:
    """Merge, override and resolve.

    Args:
        files: paths of YAML files, relative to the working directory or else to the project.
        overrides: (dotted key, YAML text) pairs.

    Raises: ConfigError naming the file or key, also for a variable that no file uses.
    """
    config: dict[str, Any] = {}
    for file in files:
        config = merge(config, load(file))
    config = settle(config)
    _check_variables(config, overrides)
    for key, text in overrides:
        set_dotted(config, key, expand(parse(key, text)))
    try:
        resolved = OmegaConf.to_container(OmegaConf.create(config), resolve=True)
    except OmegaConfBaseException as error:
        # A class that has moved takes its fields along: that is what has to be said first.
        for path, class_path in _class_paths("", config):
            import_class(path, class_path)
        raise ConfigError(_unresolved(error)) from error
    assert isinstance(resolved, dict)
    resolved.pop("vars", None)
    return {str(key): value for key, value in resolved.items()}


def _class_paths(path: str, node: Any) -> Iterator[tuple[str, Any]]:
    if isinstance(node, Mapping):
        if "class_path" in node:
            yield path, node["class_path"]
        for key, value in node.items():
            yield from _class_paths(f"{path}.{key}".lstrip("."), value)
    elif isinstance(node, list):
        for i, value in enumerate(node):
            yield from _class_paths(f"{path}.{i}", value)


def _unresolved(error: OmegaConfBaseException) -> str:
    """Which value could not take over another one, and which field to mend."""
    key, text = error.full_key or "config", str(error).splitlines()[0]
    through = re.search(r"trying to access (\S+): node `(\S+)` is not a container", text)
    if through:
        return f"{key}: takes its value from {through[1]}, but {through[2]} is no group of fields; name them"
    unset = re.search(r"Interpolation key '(vars\.\w+)' not found", text)
    if unset:
        return f"{key}: takes its value from {unset[1]}, which no file sets; set it, or --{unset[1]}=VALUE"
    return f"{key}: {text}; check the ${{...}} in this value"


def _letters(name: str) -> str:
    return re.sub(r"\d", "", name)


def _shipped(name: str) -> bool:
    """Whether one of the project's own files uses a variable: what used it here may have been replaced."""
    files = (PROJECT_ROOT / "configs").rglob("*.yaml")
    return any(re.search(rf"vars\.{name}\b", path.read_text(encoding="utf-8")) for path in files)


def _check_variables(config: dict[str, Any], overrides: Sequence[tuple[str, str]]) -> None:
    """Raises: ConfigError for a variable that nothing declares or uses: it would be set and never read. In a
    file, where a recipe's variables may be of use to some of its methods only, one that is nearly the name of
    another that is used."""
    used = re.findall(r"\$\{(?:oc\.select:)?vars\.(\w+)", f"{config} {[text for _, text in overrides]}")
    declared = config.get("vars") or {}
    for name in set(declared) - set(used):
        meant = get_close_matches(name, used, 1, MISSPELT)
        if meant and _letters(name) != _letters(meant[0]) and not _shipped(name):
            raise ConfigError(f"vars.{name}: nothing uses it; did you mean {meant[0]!r}? Remove it otherwise")
    variables = {*declared, *used}
    for key, _ in overrides:
        top, _, rest = key.partition(".")
        name = rest.partition(".")[0]
        if top == "vars" and name and name not in variables:
            raise ConfigError(
                f"vars.{name}: unknown variable{suggest(name, variables)}; these files use: "
                f"{', '.join(sorted(variables))}"
            )
