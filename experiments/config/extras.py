"""Classes that need a package beyond the project's own requirements."""

from __future__ import annotations

from collections.abc import Mapping
from importlib.util import find_spec
from typing import Any

from experiments.config.errors import ConfigError

EXTRAS = {"TensorBoardLogger": "tensorboard", "MLFlowLogger": "mlflow"}
"""Lightning's class -> the package it needs, which is also the name of the project's extra."""


def check_extra(path: str, cls: type, arguments: Mapping[str, Any]) -> None:
    """Raises: ConfigError naming the package that a class of Lightning needs and that is not installed."""
    package = EXTRAS.get(cls.__name__)
    if package is None or not cls.__module__.startswith("lightning."):
        return
    modules = [package]
    if package == "mlflow" and str(arguments.get("tracking_uri", "")).startswith("sqlite:"):
        modules.append("sqlalchemy")  # mlflow-skinny has no database
    if any(find_spec(name) is None for name in modules):
        raise ConfigError(
            f"{path}: {cls.__name__} needs {package}, which is not installed; pip install {package} "
            f"(the project's extra `{package}`)"
        )
