"""Classes that need a package beyond the project's own requirements."""

from __future__ import annotations

from collections.abc import Mapping
from importlib.util import find_spec
from typing import Any

from experiments.config.errors import ConfigError

EXTRAS = {
    "TensorBoardLogger": ("tensorboard", "tensorboard"),
    "MLFlowLogger": ("mlflow", "mlflow"),
    "CometLogger": ("comet_ml", "comet_ml"),
    "NeptuneLogger": ("neptune", "neptune"),
}
"""Lightning's class -> (module it imports, package that brings it)."""


def check_extra(path: str, cls: type, arguments: Mapping[str, Any]) -> None:
    """Raises: ConfigError naming the package that a class of Lightning needs and that is not installed."""
    module, package = EXTRAS.get(cls.__name__, ("", ""))
    if not module or not cls.__module__.startswith("lightning."):
        return
    modules = [module]
    if package == "mlflow" and str(arguments.get("tracking_uri", "")).startswith("sqlite:"):
        modules.append("sqlalchemy")  # mlflow-skinny has no database
    if any(find_spec(name) is None for name in modules):
        raise ConfigError(
            f"{path}: {cls.__name__} needs {package}, which is not installed; pip install {package}, or leave "
            "this logger out"
        )
