"""One resolved configuration from several YAML files and overrides.

Files are merged in the order given; a file may name others under `include:` (relative to itself), which are
merged before it. Overrides come last, then `${...}` is resolved by OmegaConf: an interpolation never sees a
value that an override replaces. Lists are replaced, except that `callbacks+:` appends. Changing a
`class_path` drops the old class's `init_args`. Values under a top-level `vars:` can be interpolated and are
then dropped.
"""

from __future__ import annotations

import difflib
import re
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

import yaml
from omegaconf import OmegaConf
from omegaconf.errors import OmegaConfBaseException

PROJECT_ROOT = Path(__file__).resolve().parents[2]
CLASS_KEYS = {"class_path", "init_args"}


class ConfigError(ValueError):
    """A configuration that cannot be run, in words that name the field and the remedy."""


def compose(files: Sequence[str], overrides: Sequence[tuple[str, str]]) -> dict[str, Any]:
    """Merge, override and resolve.

    Args:
        files: paths of YAML files, relative to the working directory or else to the project.
        overrides: (dotted key, YAML text) pairs.

    Raises: ConfigError naming the file or key, also for a variable that no file uses.
    """
    config: dict[str, Any] = {}
    for file in files:
        config = merge(config, load(find(file)))
    config = _settle(config)
    _check_variables(config, overrides)
    for key, text in overrides:
        set_dotted(config, key, _parse(key, text))
    try:
        resolved = OmegaConf.to_container(OmegaConf.create(config), resolve=True)
    except OmegaConfBaseException as error:
        raise ConfigError(
            f"{error.full_key or 'config'}: {str(error).splitlines()[0]}; check the ${{...}} in this value"
        ) from error
    assert isinstance(resolved, dict)
    resolved.pop("vars", None)
    return {str(key): value for key, value in resolved.items()}


def _check_variables(config: dict[str, Any], overrides: Sequence[tuple[str, str]]) -> None:
    """Raises: ConfigError for a variable that nothing declares or uses: it would be set and never read."""
    used = re.findall(r"\$\{vars\.(\w+)", f"{config} {[text for _, text in overrides]}")
    variables = {*(config.get("vars") or {}), *used}
    for key, _ in overrides:
        top, _, rest = key.partition(".")
        name = rest.partition(".")[0]
        if top == "vars" and name and name not in variables:
            raise ConfigError(
                f"vars.{name}: unknown variable{suggest(name, variables)}; these files use: "
                f"{', '.join(sorted(variables))}"
            )


def suggest(name: str, known: Iterable[str]) -> str:
    """ ", did you mean ...?" with the closest known name, or nothing."""
    close = difflib.get_close_matches(name, list(known), n=1)
    return f", did you mean {close[0]!r}?" if close else ""


def find(file: str, beside: Path | None = None) -> Path:
    """The YAML file, looked for beside the including file, in the working directory and in the project.
    Raises: ConfigError."""
    places = [place / file for place in ([beside] if beside else []) + [Path(), PROJECT_ROOT]]
    for place in places:
        if place.is_file():
            return place
    raise ConfigError(f"--config: no file {file!r}; the project's own are below {PROJECT_ROOT.name}/configs")


def load(path: Path) -> dict[str, Any]:
    """Read a YAML file with its includes merged before it. Raises: ConfigError for malformed YAML, naming
    file and line."""
    try:
        content = yaml.load(path.read_text(encoding="utf-8"), Loader=_Loader)
    except yaml.YAMLError as error:
        raise ConfigError(f"{path}: not valid YAML: {' '.join(str(error).split())}") from error
    if not isinstance(content, dict):
        raise ConfigError(f"{path}: expected a mapping at the top, got {type(content).__name__}")
    includes = content.pop("include", [])
    config: dict[str, Any] = {}
    for include in [includes] if isinstance(includes, str) else includes:
        config = merge(config, load(find(include, path.parent)))
    return merge(config, content)


def merge(base: dict[str, Any], over: dict[str, Any]) -> dict[str, Any]:
    """`over` on top of `base`, neither changed; see the module's rules for lists and classes."""
    merged = dict(base)
    if "class_path" in over and over["class_path"] != base.get("class_path", over["class_path"]):
        merged.pop("init_args", None)
    for key, value in over.items():
        if key.endswith("+"):
            # Without a list to append to yet, the addition waits under its own key for the file that brings
            # one.
            name = key[:-1] if key[:-1] in merged else key
            merged[name] = [*(merged.get(name) or []), *value]
        elif isinstance(value, dict) and isinstance(merged.get(key), dict):
            merged[key] = merge(merged[key], value)
        else:
            merged[key] = merge({}, value) if isinstance(value, dict) else value
            merged.pop(f"{key}+", None)
    return merged


def _settle(node: Any) -> Any:
    """Turn additions that met no list into lists of their own."""
    if isinstance(node, dict):
        return {str(key).removesuffix("+"): _settle(value) for key, value in node.items()}
    return [_settle(item) for item in node] if isinstance(node, list) else node


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


def _parse(key: str, text: str) -> Any:
    try:
        return yaml.load(text, Loader=_Loader)
    except yaml.YAMLError as error:
        raise ConfigError(f"--{key}: not a valid YAML value: {text!r}") from error


class _Loader(yaml.SafeLoader):
    """YAML 1.2 floats: `1e-4` is a number."""


_Loader.add_implicit_resolver(
    "tag:yaml.org,2002:float",
    re.compile(
        r"^[-+]?(?:\d[\d_]*\.?[\d_]*(?:[eE][-+]?\d+)|\d[\d_]*\.[\d_]*|\.\d+(?:[eE][-+]?\d+)?|\.(?:inf|nan))$"
    ),
    list("-+0123456789."),
)
