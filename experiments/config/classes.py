"""From a class path or a bare class name to the class; where a class of an older version is now."""

from __future__ import annotations

import ast
import importlib
import inspect
import sys
from functools import cache
from pathlib import Path
from typing import Any

from experiments.config.errors import PROJECT_ROOT, ConfigError, suggest

PACKAGES = ("datamodules", "lightning_modules", "callbacks")
RENAMED = {
    "AttackRow": "Row",
    "AttackRunner": "Session",
    "BehaviourBatch": "EvaluationBatch",
    "BehaviourData": "EvaluationData",
    "Conversation": "Request",
    "EvaluationRun": "Session",
    "Findings": "Snapshot",
    "Mean": "Estimate",
    "OrganismBenign": "TinyChatBenign",
    "OrganismHarmful": "TinyChatHarmful",
    "Outcomes": "Measured",
    "Rate": "Estimate",
    "Restarts": "Repeat",
    "RewriteAttack": "Rewrite",
    "Summary": "RunResults",
    "Victim": "LanguageModel",
}
"""Old name of a class -> its name now; a class that only moved is found by its name."""


def search_working_directory() -> None:
    """Make a user's own modules beside the configuration importable, after everything that is installed."""
    here = str(Path.cwd())
    if here not in sys.path and "" not in sys.path:
        sys.path.append(here)


def import_class(field: str, class_path: Any) -> type:
    """The class behind a class path. Raises: ConfigError naming the field, and where the class moved to."""
    if not isinstance(class_path, str) or not all(part.isidentifier() for part in class_path.split(".")):
        raise ConfigError(f"{field}.class_path: expected package.module.Class, got {class_path!r}")
    module_name, _, name = class_path.rpartition(".")
    if not module_name:
        known = moved_to(name)
        hint = f"; write {known}" if known else ""
        raise ConfigError(f"{field}.class_path: expected package.module.Class, got {class_path!r}{hint}")
    try:
        module = importlib.import_module(module_name)
    except Exception as error:  # a user's module may raise anything while it is imported
        _refuse_moved(field, class_path)
        raise ConfigError(
            f"{field}.class_path: cannot import {module_name!r}: {_first_line(error)}"
        ) from error
    found = getattr(module, name, None)
    if not inspect.isclass(found):
        _refuse_moved(field, class_path)
        classes = [n for n, c in vars(module).items() if inspect.isclass(c)]
        raise ConfigError(f"{field}.class_path: no class {name!r} in {module_name}{suggest(name, classes)}")
    return found


def _refuse_moved(field: str, class_path: str) -> None:
    package, name = class_path.partition(".")[0], class_path.rpartition(".")[2]
    new = moved_to(name) if package in PACKAGES else None
    if new:
        raise ConfigError(f"{field}.class_path: {class_path} moved to {new}; write that")


def moved_to(name: str) -> str | None:
    """The class path of the project's class of this name, by its older name too; None if there is none."""
    return project_classes().get(RENAMED.get(name, name))


def beside(name: str, class_path: str) -> str:
    """The class path of a bare class name: the project's class, or one in the module of `class_path`.

    Raises: ConfigError if there is none.
    """
    known = moved_to(name)
    if known:
        return known
    module = class_path.rpartition(".")[0]
    try:
        if inspect.isclass(getattr(importlib.import_module(module), name, None)):
            return f"{module}.{name}"
    except Exception:  # the class that is replaced may be wrong, too: then there is nothing beside it
        pass
    raise ConfigError(
        f"class {name!r}: not found beside {class_path}{suggest(name, project_classes())}; "
        "give the full class path"
    )


@cache
def project_classes() -> dict[str, str]:
    """Class path of every public class of the project by its name, read without importing anything."""
    # Importing them all would take seconds, for what is often the hint of an error message.
    found: dict[str, str] = {}
    for package in PACKAGES:
        for file in sorted((PROJECT_ROOT / package).rglob("*.py")):
            module = ".".join(file.relative_to(PROJECT_ROOT).with_suffix("").parts)
            for node in ast.parse(file.read_text(encoding="utf-8")).body:
                if isinstance(node, ast.ClassDef) and not node.name.startswith("_"):
                    found.setdefault(node.name, f"{module}.{node.name}")
    return found


def _first_line(error: BaseException) -> str:
    lines = str(error).strip().splitlines()
    return lines[0] if lines else type(error).__name__
