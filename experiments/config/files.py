"""YAML files and what they include.

A file may name others under `include:` (relative to itself, else to the working directory, else to the
project); they are merged before it. An include may be placed, and a mapping anywhere may be one, with its own
keys merged over the included ones:

    include: [../trainer/default.yaml, {file: ../attack/gcg.yaml, at: model.init_args.attack}]
    attacks:
      gcg: {include: ../attack/gcg.yaml, init_args: {num_steps: 20}}

A fragment is a file that holds one building block without its place (`class_path` and `init_args`). Where
nobody says a place, that of its folder is meant: `attack/`, `objective/`, `term/` or `defence/`. A fragment's
`vars:` become variables of the configuration.
"""

from __future__ import annotations

import copy
import functools
import re
from pathlib import Path
from typing import Any

import yaml

from experiments.config.errors import PROJECT_ROOT, ConfigError
from experiments.config.merging import merge

TOP_LEVEL = ("seed_everything", "trainer", "model", "data", "ckpt_path")
MAX_NODES = 100_000
"""Values in one file: far above any configuration, far below what nine lines of nested aliases stand for."""
PLACES = {
    "attack": "model.init_args.attack",
    "objective": "model.init_args.objective",
    "term": "model.init_args.terms+",
    "defence": "model.init_args.defence",
}
"""Where the fragments of a folder belong; `+` appends to a list."""


def load(file: str) -> dict[str, Any]:
    """A file of the command line as a configuration: includes merged, a fragment put in its place.

    Raises: ConfigError naming the file (and line, for malformed YAML).
    """
    path = find(file, None, "--config")
    return _placed(path, _expanded(path, ()), None)


def expand(value: Any) -> Any:
    """A value of the command line with its includes read, e.g. `{include: configs/attack/gcg.yaml}`."""
    variables: dict[str, Any] = {}
    found = _with_includes(value, None, (), variables)
    if variables:
        raise ConfigError(f"{value}: this file has variables; give it with --config, where they can be set")
    return found


def find(file: str, beside: Path | None, named_by: str) -> Path:
    """The YAML file, looked for beside the file that names it, in the working directory, in the project."""
    if not isinstance(file, str) or not file:
        raise ConfigError(f"{named_by}: expected the path of a YAML file, got {file!r}")
    places = [place / file for place in ([beside] if beside else []) + [Path(), PROJECT_ROOT]]
    for place in places:
        if place.is_file():
            return place
    raise ConfigError(
        f"{named_by}: no file {file!r}; the project's own are below {PROJECT_ROOT.name}/configs"
    )


def _expanded(path: Path, chain: tuple[Path, ...]) -> dict[str, Any]:
    """The content of a file with its includes; `chain` are the files that led here."""
    if path.resolve() in chain:
        names = " -> ".join(p.name for p in (*chain, path))
        raise ConfigError(f"{path}: includes itself ({names}); remove one include")
    chain = (*chain, path.resolve())
    content = read(path)
    includes = content.pop("include", None) or []
    config: dict[str, Any] = {}
    for include in includes if isinstance(includes, list) else [includes]:
        config = merge(config, _included(include, path, chain, is_fragment(content)))
    variables: dict[str, Any] = {}
    content = _with_includes(content, path, chain, variables)
    if variables:
        config = merge(config, {"vars": variables})
    return merge(config, content)


def _included(include: Any, path: Path, chain: tuple[Path, ...], into_fragment: bool) -> dict[str, Any]:
    """One entry of a file's `include:`. A fragment that includes a fragment varies it, in the same place."""
    place = None
    if isinstance(include, dict):
        if set(include) != {"file", "at"}:
            raise ConfigError(f"{path}: include: expected {{file: ..., at: ...}}, got {include!r}")
        include, place = include["file"], str(include["at"])
    file = find(include, path.parent, f"{path}: include")
    content = _expanded(file, chain)
    return content if place is None and into_fragment else _placed(file, content, place)


def _placed(path: Path, content: dict[str, Any], place: str | None) -> dict[str, Any]:
    if place is None:
        if not is_fragment(content):
            return content
        place = PLACES.get(path.resolve().parent.name)
        if place is None:
            raise ConfigError(
                f"{path}: a fragment without a place; write include: [{{file: {path.name}, at: "
                "model.init_args.attack}], or put it into a folder attack/, objective/, term/ or defence/"
            )
    variables = content.pop("vars", None)
    *parents, last = place.split(".")
    node: dict[str, Any] = {last: [content] if last.endswith("+") else content}
    for part in reversed(parents):
        node = {part: node}
    return merge({"vars": variables}, node) if variables else node


def is_fragment(content: dict[str, Any]) -> bool:
    """Whether a file's content is one class or changes to one, rather than a configuration."""
    return bool({"class_path", "init_args"} & set(content)) and not set(TOP_LEVEL) & set(content)


def _with_includes(value: Any, path: Path | None, chain: tuple[Path, ...], variables: dict[str, Any]) -> Any:
    """The value with every inner `{include: FILE, ...}` replaced; the files' variables go to `variables`."""
    if isinstance(value, list):
        return [_with_includes(item, path, chain, variables) for item in value]
    if not isinstance(value, dict):
        return value
    own = {
        key: _with_includes(item, path, chain, variables) for key, item in value.items() if key != "include"
    }
    if "include" not in value:
        return own
    named_by = f"{path}: include" if path else "include"
    content = _expanded(find(value["include"], path.parent if path else None, named_by), chain)
    variables.update(merge(variables, content.pop("vars", None) or {}))
    return merge(content, own)


def read(path: Path) -> dict[str, Any]:
    """A YAML file's mapping. Raises: ConfigError naming file and line for what is none."""
    try:
        content = copy.deepcopy(_loaded(path.read_text(encoding="utf-8")))
    except yaml.YAMLError as error:
        raise ConfigError(f"{_place(path, error)}: not valid YAML: {_problem(error)}") from error
    except UnicodeDecodeError as error:
        raise ConfigError(f"{path}: not UTF-8 text (byte {error.start}); save it as UTF-8") from error
    except OSError as error:
        raise ConfigError(f"{path}: cannot be read: {error.strerror}") from error
    except RecursionError as error:
        raise ConfigError(f"{path}: nested too deeply to be a configuration") from error
    _check_finite(str(path), content)
    if content is None:
        return {}
    if not isinstance(content, dict):
        raise ConfigError(f"{path}: expected a mapping at the top, got {type(content).__name__}")
    return content


@functools.lru_cache(maxsize=256)
def _loaded(text: str) -> Any:
    """One command reads the same files many times."""
    return yaml.load(text, Loader=_Loader)


def parse(key: str, text: str) -> Any:
    """The value of an override. Raises: ConfigError naming the key."""
    try:
        value = yaml.load(text, Loader=_Loader)
    except (yaml.YAMLError, RecursionError) as error:
        raise ConfigError(f"--{key}: not a valid YAML value: {text!r}") from error
    _check_finite(f"--{key}", value)
    return value


def _check_finite(where: str, content: Any) -> None:
    """Raises: ConfigError where an alias leads back to what holds it (`&a [*a]`), or aliases of aliases make
    a value that no machine can hold."""
    left = MAX_NODES
    above: set[int] = set()

    def walk(node: Any) -> None:
        nonlocal left
        left -= 1
        if left < 0:
            raise ConfigError(f"{where}: more than {MAX_NODES:,} values; is an alias repeated without end?")
        if not isinstance(node, dict | list):
            return
        if id(node) in above:
            raise ConfigError(f"{where}: an alias (*name) stands inside what it names; write the value out")
        above.add(id(node))
        for item in node.values() if isinstance(node, dict) else node:
            walk(item)
        above.discard(id(node))

    walk(content)


def _place(path: Path, error: yaml.YAMLError) -> str:
    mark = getattr(error, "problem_mark", None)
    return f"{path}:{mark.line + 1}" if mark else str(path)


def _problem(error: yaml.YAMLError) -> str:
    return " ".join(str(getattr(error, "problem", None) or error).split())


class _Loader(yaml.SafeLoader):  # libyaml's is faster, and dies of deep nesting
    """YAML 1.2 floats (`1e-4` is a number); a key given twice is an error, as the first would be lost."""

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[Any, Any]:
        seen: set[Any] = set()
        for key_node, _ in node.value:
            if key_node.tag == "tag:yaml.org,2002:merge":
                continue
            if not isinstance(key_node, yaml.ScalarNode):
                raise yaml.constructor.ConstructorError(
                    None, None, "a key that is no text", key_node.start_mark
                )
            key = key_node.value
            if key in seen:
                raise yaml.constructor.ConstructorError(
                    None, None, f"key {key!r} is given twice; remove one", key_node.start_mark
                )
            seen.add(key)
        return super().construct_mapping(node, deep)


# PyYAML reads by YAML 1.1: `1:30` would be 90 and `010` would be 8. Neither is a number here.
_NUMBERS = ("tag:yaml.org,2002:int", "tag:yaml.org,2002:float")
_Loader.yaml_implicit_resolvers = {
    first: [(tag, pattern) for tag, pattern in resolvers if tag not in _NUMBERS]
    for first, resolvers in yaml.SafeLoader.yaml_implicit_resolvers.items()
}
_Loader.add_implicit_resolver(
    "tag:yaml.org,2002:int",
    re.compile(r"^[-+]?(?:0|[1-9][\d_]*|0x[\da-fA-F_]+)$"),
    list("-+0123456789"),
)
_Loader.add_implicit_resolver(
    "tag:yaml.org,2002:float",
    re.compile(
        r"^[-+]?(?:\d[\d_]*\.?[\d_]*(?:[eE][-+]?\d+)|\d[\d_]*\.[\d_]*|\.\d+(?:[eE][-+]?\d+)?|\.(?:inf|nan))$"
    ),
    list("-+0123456789."),
)
