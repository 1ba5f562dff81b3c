"""How a configuration says no: one line with the field or file, what was found, what to do."""

from __future__ import annotations

import difflib
from collections.abc import Iterable
from pathlib import Path

PROJECT_ROOT = Path(__file__).resolve().parents[2]


class ConfigError(ValueError):
    """A configuration that cannot be run, in words that name the field and the remedy."""


def suggest(name: str, known: Iterable[str]) -> str:
    """ ", did you mean ...?" with the closest known name, or nothing."""
    close = difflib.get_close_matches(name, list(known), n=1)
    return f", did you mean {close[0]!r}?" if close else ""
