"""The judged replies of a run as files that the page loads when they are asked for.

A page that is opened as a file may not fetch; it may run a script from beside it. Every file is one call of
the page's own function with a name and a gzipped JSON text in base64, so that no text of a model is ever
script. Ten thousand short rows with those before training take 0.7 MB in all (tests/support/many_runs.py).
"""

from __future__ import annotations

import base64
import gzip
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from callbacks.report.escape import printable
from callbacks.report.events import NO_SHARES
from callbacks.report.measured import Measured
from callbacks.report.page import TITLES
from callbacks.report.results import RunResults
from callbacks.report.tables import facts, warnings
from datamodules.result_lines import Measurement, Row


@dataclass(frozen=True)
class RowSet:
    """The replies to one set of prompts, under one attack or without."""

    title: str
    harmful: bool
    judge: str
    """The judge that decides."""
    way: str
    """How it was measured; sets of two runs can be compared only where it is equal."""
    file: str
    n: int


def write_packed(folder: Path, name: str, value: Any) -> None:
    """`folder/NAME.js`, which hands `value` to the page."""
    text = json.dumps(value, ensure_ascii=True, separators=(",", ":"))
    packed = base64.b64encode(gzip.compress(text.encode(), compresslevel=6, mtime=0)).decode()
    (folder / f"{name}.js").write_text(f'thundercat("{name}","{packed}");\n', encoding="ascii")


def write_run(
    folder: Path, number: int, results: RunResults, measured: Mapping[int, Sequence[Measured]]
) -> list[RowSet]:
    """All files of a run: one a set, and `run_NUMBER` which lists them with the run's facts and warnings."""
    after, before = measured[results.snapshots[-1].step], _before(results, measured)
    sets: list[RowSet] = []
    for own in after:
        item = own.measurement
        if not own.rows or item.quantity in NO_SHARES:
            continue
        name = f"rows_{number:03}_{len(sets):03}"
        earlier = _rows_of(before.get(_slot(item)))
        rows = [_row(row, earlier.get((row.example, row.repetition))) for row in _in_order(own)]
        write_packed(folder, name, rows)
        harmful = item.subject == "harmful"
        way = f"{item.judge} {item.settings}"
        sets.append(RowSet(_title(item), harmful, item.judge, way, name, len(rows)))
    listed = [vars(own) for own in sets]
    known = {name: printable(text) for name, text in facts(results).items()}
    said = [printable(text) for text in warnings(results)]
    write_packed(folder, f"run_{number:03}", {"facts": known, "warnings": said, "sets": listed})
    return sets


def _before(
    results: RunResults, measured: Mapping[int, Sequence[Measured]]
) -> dict[tuple[str, str, str, str], Measured]:
    """What was measured of the model before training in the same way, by its slot."""
    if results.before is None or results.before is results.after:
        return {}
    return {_slot(own.measurement): own for own in measured[results.before.step]}


def _slot(item: Measurement) -> tuple[str, str, str, str]:
    return item.subject, item.attack, item.block, item.settings


def _in_order(own: Measured) -> list[Row]:
    return [row for kind in (own.rows, own.sampled) for rows in kind.values() for row in rows]


def _rows_of(own: Measured | None) -> dict[tuple[str, int], Row]:
    return {} if own is None else {(row.example, row.repetition): row for row in _in_order(own)}


def _title(item: Measurement) -> str:
    subject = TITLES.get(item.subject, item.subject)
    further = [name.replace("_", " ") for name in (item.block, item.attack) if name]
    return printable(": ".join([subject, *further]), one_line=True)


def _row(row: Row, before: Row | None) -> dict[str, Any]:
    """What the page shows of a row; what is empty is left out."""
    found = {
        "key": printable(row.example, one_line=True),
        "category": printable(row.category, one_line=True),
        "again": row.repetition,
        "history": [[printable(user), printable(assistant)] for user, assistant in row.history],
        "prompt": printable(row.prompt),
        "attacked": "" if row.attacked in (None, row.prompt) else printable(row.attacked or ""),
        "prefill": printable(row.prefill),
        "expected": printable(row.expected),
        "reply": printable(row.reply) or "(empty)",
        "base": None if row.base_reply is None else printable(row.base_reply) or "(empty)",
        "verdicts": _verdicts(row),
    }
    if before is not None:
        changed = before.attacked if before.attacked not in (row.attacked, None, row.prompt) else ""
        found["before"] = {
            "attacked": printable(changed or ""),
            "reply": printable(before.reply) or "(empty)",
            "verdicts": _verdicts(before),
        }
    return {name: value for name, value in found.items() if value}


def _verdicts(row: Row) -> dict[str, bool | float]:
    """By judge: what it said, or the grade that it gave."""
    found: dict[str, bool | float] = {}
    for judge, own in row.verdicts.items():
        score, verdict = own.get("score"), own["verdict"]
        found[printable(judge, one_line=True)] = (
            score if verdict is None and score is not None else bool(verdict)
        )
    return found
