"""Results on disk: one JSON line per judged reply, written as it comes; every number is computed from them.

`RUN/rows/rows_rank<r>.jsonl` holds the rows that a process judged, `RUN/rows/measurements.jsonl` what was to
be measured, so that an evaluation that was cut short is known as such. A later line replaces an earlier one
of the same identity, also one of another process: verdicts of another judge are added without generating
again. A last line without its
newline is a write that a kill interrupted and counts as not written. Either file may be packed.
"""

from __future__ import annotations

import logging
import secrets
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import replace
from pathlib import Path

from datamodules.line_files import append_lines, drop_torn_line, in_order
from datamodules.result_lines import Identity, Measurement, Row, Stage, dumped, lines_of

log = logging.getLogger(__name__)

ROWS, MEASUREMENTS = "rows", "measurements.jsonl"
"""Folder of the results within a run folder, and of what was to be measured."""


class ResultsStore:
    """The results of a run folder; every process appends to its own file and has read those of all.

    Args:
        folder: the run folder.
        rank: number of this process.

    Raises: ValueError `file:line: found ...; remedy` for a line that is none of ours.
    """

    def __init__(self, folder: str | Path, rank: int = 0) -> None:
        self.path = Path(folder) / ROWS / f"rows_rank{rank}.jsonl"
        self.rank = rank
        self._call = secrets.token_hex(4)
        self.path.parent.mkdir(parents=True, exist_ok=True)
        for path in (self.path, self.path.with_name(MEASUREMENTS)):
            if rank == 0 or path == self.path:
                drop_torn_line(path)
        self._rows = {row.identity: row for row in read_rows(folder)}
        self._announced = list(_measurement_lines(folder))

    def get(self, identity: Identity) -> Row | None:
        return self._rows.get(identity)

    def __iter__(self) -> Iterator[Row]:
        return iter(self._rows.values())

    @property
    def measurements(self) -> list[Measurement]:
        """The latest of every slot, of the model that was measured last at every step, in the order of their
        first appearance."""
        return _of_last_models(self._announced)

    def add(self, rows: Iterable[Row]) -> None:
        """Append rows that are new or have changed; they are on disk when this returns."""
        new = []
        for row in rows:
            before = self._rows.get(row.identity)
            if before is None:
                new.append(row)
            elif before != row:
                new.append(replace(row, edition=before.edition + 1))
        append_lines(self.path, map(dumped, new))
        self.learn(new)

    def learn(self, rows: Iterable[Row]) -> None:
        """Take rows into account that other processes have written."""
        self._rows.update({row.identity: row for row in rows})

    def announce(self, measurements: Iterable[Measurement]) -> None:
        """Say what is about to be measured; the first process writes it down, once.

        What is known is written again where a stage goes back to another model or step: the last line of a
        stage says of which model a report is.
        """
        known = {item.slot: item for item in self._announced}
        last = {(item.stage, item.defence): (item.step, item.model) for item in self._announced}
        for own in {item.slot: item for item in measurements}.values():
            item = replace(own, call=self._call) if own.stage in ("validate", "test") else own
            earlier, where = known.get(item.slot), (item.stage, item.defence)
            if earlier is not None and earlier.call == item.call and _another(earlier, item):
                what = " ".join(part for part in (item.subject, item.block, item.attack) if part)
                log.warning("%s: %s replaces what %s says of it", what, item.evaluation, earlier.evaluation)
            if earlier != item or last.get(where) != (item.step, item.model):
                if self.rank == 0:
                    append_lines(self.path.with_name(MEASUREMENTS), [dumped(item)])
                self._announced.append(item)
                last[where] = item.step, item.model


def _another(one: Measurement, other: Measurement) -> bool:
    """Whether the same slot was measured in another way."""
    return (one.evaluation, one.settings) != (other.evaluation, other.settings)


def read_rows(folder: str | Path) -> list[Row]:
    """The latest row of every identity, of all processes. Raises: ValueError naming file and line."""
    paths = in_order((Path(folder) / ROWS).glob("rows_rank*.jsonl*"))
    latest: dict[Identity, Row] = {}
    for row in (row for path in paths for row in lines_of(path, Row)):
        before = latest.get(row.identity)
        if before is None or before.edition <= row.edition:
            latest[row.identity] = row
    return list(latest.values())


def read_measurements(folder: str | Path, defence: str = "") -> list[Measurement]:
    """What was to be measured behind this defence ('' for none), as `ResultsStore.measurements`."""
    return _of_last_models([item for item in _measurement_lines(folder) if item.defence == defence])


def measured_stages(folder: str | Path) -> list[tuple[Stage, str]]:
    """Every stage that has measured something, with the defence around the model."""
    return list(dict.fromkeys((item.stage, item.defence) for item in _measurement_lines(folder)))


def last_step(folder: str | Path, stage: Stage, defence: str = "") -> int | None:
    """The step that a stage measured last behind this defence; null where it has measured none."""
    lines = _measurement_lines(folder)
    steps = [item.step for item in lines if (item.stage, item.defence) == (stage, defence)]
    return steps[-1] if steps else None


def measurement_files(folder: str | Path) -> list[Path]:
    """Where it stands what was to be measured; none in a folder without results."""
    return in_order((Path(folder) / ROWS).glob(f"{MEASUREMENTS}*"))


def _measurement_lines(folder: str | Path) -> Iterator[Measurement]:
    return (line for path in measurement_files(folder) for line in lines_of(path, Measurement))


def _of_last_models(lines: Sequence[Measurement]) -> list[Measurement]:
    """Two models that were tested in one folder have a report each, never a table of both, and so have two
    calls."""
    last = {(item.stage, item.step, item.defence): (item.model, item.call) for item in lines}
    latest = {item.slot: item for item in lines}
    return [
        item
        for item in latest.values()
        if last[item.stage, item.step, item.defence] == (item.model, item.call)
    ]
