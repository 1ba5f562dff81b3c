"""Rows and measurements as an evaluation writes them, with every field filled in."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from datamodules.result_lines import Measurement, Row
from datamodules.results import ResultsStore

JUDGE, REFUSAL = "target_prefix@1", "keyword_refusal@1"


def measurement(quantity: str = "success_rate", **fields: Any) -> Measurement:
    """What was to be measured: by default the attack gcg in `fit` at step 0."""
    defaults: dict[str, Any] = {
        "evaluation": "robustness",
        "stage": "fit",
        "step": 0,
        "model": "m",
        "settings": "s",
        "subject": "harmful",
        "attack": "gcg" if quantity == "success_rate" else "",
        "quantity": quantity,
        "judge": JUDGE,
        "refusal": "",
        "judges": [],
        "n": 1,
    }
    return Measurement(**(defaults | fields))


def verdicts(right: bool) -> dict[str, dict[str, bool | float | None]]:
    """Success by the target's prefix, or else a refusal."""
    return {JUDGE: {"verdict": right, "score": None}, REFUSAL: {"verdict": not right, "score": None}}


def stored(folder: Path, *rows: Row) -> str:
    """A run folder that holds rows."""
    ResultsStore(folder).add(rows)
    return str(folder)


def row(example: str = "a", of: Measurement | None = None, verdict: bool = False, **fields: Any) -> Row:
    """A reply that belongs to a measurement, judged by its judges."""
    own = of or measurement()
    judges = [judge for judge in (own.judge, own.refusal, *own.judges) if judge]
    defaults: dict[str, Any] = {
        "settings": own.settings,
        "model": own.model,
        "stage": own.stage,
        "step": own.step,
        "subject": own.subject,
        "attack": own.attack,
        "example": example,
        "repetition": 0,
        "prompt": "p",
        "system": None,
        "expected": "t",
        "category": "",
        "functional": "",
        "attacked": "p x" if own.attack else None,
        "history": [],
        "prefill": "",
        "reply": "c",
        "verdicts": {judge: {"verdict": verdict, "score": None} for judge in judges},
    }
    return Row(**(defaults | fields))
