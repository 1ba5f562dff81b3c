"""What the tests of a run's trust share."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest

from tests.support.small_run import small_config

Run = Callable[..., tuple[int, str, str]]


@pytest.fixture
def fit(thundercat: Run, tmp_path: Path) -> Run:
    """`thundercat fit` of the small configuration: returns (exit status, stdout, stderr)."""
    config = small_config(tmp_path)

    def run(*arguments: str) -> tuple[int, str, str]:
        return thundercat("fit", "--config", str(config), *arguments)

    return run
