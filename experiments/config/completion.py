"""Shell completion: commands, options, YAML files, and the fields of the configuration that is being written.

For bash (zsh alike): eval "$(register-python-argcomplete thundercat)"
"""

from __future__ import annotations

import argparse
from collections.abc import Iterator, Sequence
from typing import Any

from argcomplete.finders import CompletionFinder

from experiments.config.compose import compose
from experiments.config.errors import ConfigError
from experiments.config.files import TOP_LEVEL


class FieldFinder(CompletionFinder):
    """Offers `--model.attack.epsilon=` beside the parser's own options, from the files given so far."""

    def collect_completions(
        self,
        active_parsers: list[argparse.ArgumentParser],
        parsed_args: argparse.Namespace,
        cword_prefix: str,
    ) -> list[str]:
        found: list[str] = super().collect_completions(active_parsers, parsed_args, cword_prefix)
        if cword_prefix.startswith("--"):
            names = field_names(getattr(parsed_args, "config", None) or [])
            found += [f"--{name}=" for name in names if f"--{name}".startswith(cword_prefix)]
        return found


def field_names(files: Sequence[str]) -> list[str]:
    """The dotted names of every field that these files set, without `init_args`; none where they do not
    compose."""
    try:
        return sorted(set(_names(compose(files, []))))
    except ConfigError:
        return []


def _names(node: Any, path: str = "") -> Iterator[str]:
    if isinstance(node, dict) and (path or set(node) <= set(TOP_LEVEL)):
        for key, value in node.items():
            inner = path if key in ("init_args", "class_path") else f"{path}.{key}".lstrip(".")
            if inner:
                yield from _names(value, inner)
    elif isinstance(node, list) and any(isinstance(item, dict) for item in node):
        for i, value in enumerate(node):
            yield from _names(value, f"{path}.{i}")
    elif path:
        yield path


def complete(parser: argparse.ArgumentParser) -> None:
    """Answer the shell's question and leave the process; does nothing outside a completion."""
    FieldFinder()(parser, append_space=False)
