"""Results on disk: one JSON line per judged reply, written as it comes; every number is computed from them.

`RUN/rows/rows_rank<r>.jsonl` holds the rows that a process judged, `RUN/rows/measurements.jsonl` what was to
be measured, so that an evaluation that was cut short is known as such. A later line replaces an earlier one
of the same identity: verdicts of another judge are added without generating again. A last line without its
newline is a write that a kill interrupted and counts as not written. Either file may be packed.
"""

from __future__ import annotations

import json
import logging
import secrets
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import asdict, dataclass, field, fields, replace
from pathlib import Path
from typing import Any, Literal, TypeVar, get_type_hints

from datamodules.fields import NonNegativeInt, fitting, problem
from datamodules.line_files import append_lines, drop_torn_line, in_order, whole_lines

log = logging.getLogger(__name__)

SCHEMA = 2
"""Version of the lines' fields; lines of another version are refused."""
ADDED = {"samples", "block", "call", "against", "base_reply", "counts", "defence", "document", "answer"}
ADDED |= {"forbidden", "pieces", "contributions"}
"""Fields that came later with a default: lines written before them lack them and mean the default."""
BASE = "base:"
"""In front of a judge's label: what it said of `base_reply`."""
ROWS, MEASUREMENTS = "rows", "measurements.jsonl"
"""Folder of the results within a run folder, and of what was to be measured."""

Stage = Literal["fit", "validate", "test", "attack"]
Identity = tuple[str, str, str, int, str, str, str, int]
Slot = tuple[str, int, str, str, str, str, str]


@dataclass
class Row:
    """One reply and what judges say of it."""

    settings: str
    """Digest of what decides the reply besides the weights: attack, length, seed and the encoded batch."""
    model: str
    """Fingerprint of the weights."""
    stage: Stage
    step: NonNegativeInt
    """Optimiser step of the model."""
    subject: Literal["harmful", "harmless", "utility"]
    attack: str
    """Name of the attack in its suite; '' without one."""
    example: str
    """Key of the example."""
    repetition: NonNegativeInt
    """Number of the reply where one example is replied to several times."""
    prompt: str
    system: str | None
    expected: str
    """The harmful target, or the one right reply; '' where there is none."""
    category: str
    functional: str
    attacked: str | None
    """What a user types to replay the attack; null for none and for attacks on embeddings."""
    history: list[list[str]]
    """Earlier turns, [user, assistant] each, that were sent before the prompt."""
    prefill: str
    """What the reply was forced to begin with; `reply` contains it."""
    reply: str
    loss_curve: list[float | None] = field(default_factory=list)
    """Attacked loss at every iterate, in nats per token; null once the example was done."""
    steps: NonNegativeInt = 0
    forward_passes: NonNegativeInt = 0
    backward_passes: NonNegativeInt = 0
    queries: NonNegativeInt = 0
    seconds: float = 0.0
    """Wall time of the example's batch divided by its size."""
    flags: dict[str, bool] = field(default_factory=dict)
    """Warning sign -> whether the attack on this example shows it."""
    verdicts: dict[str, dict[str, bool | float | None]] = field(default_factory=dict)
    """`name@revision` of a judge -> {"verdict": bool, "score": float or null}."""
    base_reply: str | None = None
    """What the model before training replied to the same; null where it was not asked."""
    counts: dict[str, NonNegativeInt] = field(default_factory=dict)
    """Of a scored text: its `tokens`, `words` and `bytes`; of a reply through a defence, what it cost."""
    document: str | None = None
    """The untrusted document beside the prompt; where `attacked` is a document, that stood in its place."""
    answer: str = ""
    """The reply to the prompt, where `expected` is what a document's hidden instruction wants."""
    forbidden: str = ""
    """What must not appear in the reply; '' for `expected`."""
    defence: str = ""
    """`name-digest` of the defence around the model; '' for none."""
    pieces: list[str] = field(default_factory=list)
    """Of an attribution: the texts of the prompt's attackable tokens."""
    contributions: dict[str, list[float | None]] = field(default_factory=dict)
    """`name@revision` of an attribution, `base:` in front for the model before training -> one per piece."""
    schema: int = SCHEMA
    where: str = field(default="", compare=False)
    """file:line it was read from; not stored."""

    @property
    def identity(self) -> Identity:
        model = self.settings, self.model, self.stage, self.step
        return (*model, self.subject, self.attack, self.example, self.repetition)

    def verdict(self, judge: str) -> bool:
        """What a judge (`name@revision`) said. Raises: KeyError where it was not asked."""
        return bool(self.verdicts[judge]["verdict"])

    def accepted(self, judge: str, asked_by: str) -> bool:
        """What a judge said in any of its revisions, or in the one that is named. Raises: ValueError where it
        was not asked, naming the field (`asked_by`) that wants it."""
        names = [name for name in self.verdicts if judge in (name, name.split("@")[0])]
        if not names:
            raise ValueError(
                f"{asked_by}: {self.where} has no verdict of {judge!r}, got {sorted(self.verdicts)}"
            )
        return any(self.verdict(name) for name in names)


@dataclass
class Measurement:
    """What an evaluation set out to measure, written when it begins."""

    evaluation: str
    stage: Stage
    step: NonNegativeInt
    model: str
    settings: str
    subject: Literal["harmful", "harmless", "utility"]
    attack: str
    quantity: str
    """What the judge's verdict is called (callbacks/metrics/names.py)."""
    judge: str
    """`name@revision` of the judge that decides."""
    refusal: str
    """The judge of refusals beside it; '' where there is none."""
    judges: list[str]
    """Further judges that are asked."""
    n: NonNegativeInt
    """Number of examples, over all processes."""
    samples: NonNegativeInt = 0
    """Sampled replies per example; where there are any, repetition 0 is the greedy reply and 1 to `samples`
    are those."""
    block: str = ""
    """Name of the set of prompts where the subject has several; '' for its main one."""
    against: str = ""
    """Name of the set that asks for the same things in other words, under the same keys; '' for none."""
    call: str = ""
    """The `validate` or `test` that it is of: a report shows one of them, never what an earlier one measured
    on other rows; '' in `fit`, whose evaluations are told one by one."""
    defence: str = ""
    """`name-digest` of the defence around the model: what is measured behind one is of another system."""
    schema: int = SCHEMA
    where: str = field(default="", compare=False)

    @property
    def slot(self) -> Slot:
        """What it replaces an earlier measurement of."""
        return self.stage, self.step, self.model, self.subject, self.attack, self.block, self.defence

    def identity(self, example: str, repetition: int = 0) -> Identity:
        """Of the row of an example."""
        own = self.settings, self.model, self.stage, self.step, self.subject, self.attack
        return *own, example, repetition

    def row(self, example: str, prompt: str, expected: str, **known: Any) -> Row:
        """The greedy row of an example, with what is known of it beside; the rest is as of a plain prompt
        without a reply."""
        plain: dict[str, Any] = {"system": None, "attacked": None, "history": []}
        plain |= dict.fromkeys(("category", "functional", "prefill", "reply"), "")
        return Row(
            settings=self.settings,
            model=self.model,
            stage=self.stage,
            step=self.step,
            subject=self.subject,
            attack=self.attack,
            example=example,
            repetition=0,
            prompt=prompt,
            expected=expected,
            defence=self.defence,
            **(plain | known),
        )


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
        new = [row for row in rows if self._rows.get(row.identity) != row]
        append_lines(self.path, map(_dumped, new))
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
                    append_lines(self.path.with_name(MEASUREMENTS), [_dumped(item)])
                self._announced.append(item)
                last[where] = item.step, item.model


def _another(one: Measurement, other: Measurement) -> bool:
    """Whether the same slot was measured in another way."""
    return (one.evaluation, one.settings) != (other.evaluation, other.settings)


def read_rows(folder: str | Path) -> list[Row]:
    """The latest row of every identity, of all processes. Raises: ValueError naming file and line."""
    paths = in_order((Path(folder) / ROWS).glob("rows_rank*.jsonl*"))
    return list({row.identity: row for path in paths for row in _read(path, Row)}.values())


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
    return (line for path in measurement_files(folder) for line in _read(path, Measurement))


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


Line = TypeVar("Line", Row, Measurement)


def _dumped(line: Row | Measurement) -> str:
    # ASCII: a reply may hold half a surrogate pair, which no UTF-8 file can.
    return json.dumps({key: value for key, value in asdict(line).items() if key != "where"})


def _read(path: Path, kind: type[Line]) -> Iterator[Line]:
    return (_parsed(line, where, kind) for where, line in whole_lines(path))


def _parsed(line: bytes, where: str, kind: type[Line]) -> Line:
    remedy = "remove the line (its example is evaluated again), or move the folder away"
    try:
        record = json.loads(line.decode("utf-8"))
    except (ValueError, RecursionError) as error:
        raise ValueError(f"{where}: not JSON ({error}); {remedy}") from error
    if not isinstance(record, dict):
        raise ValueError(f"{where}: expected a JSON object, got {record!r:.60}; {remedy}")
    if record.get("schema") != SCHEMA:
        raise ValueError(
            f"{where}: expected a {kind.__name__} of schema {SCHEMA}, got {record.get('schema')!r:.60}; "
            f"{remedy}"
        )
    hints = FIELDS[kind.__name__]
    for name, fits in TESTS[kind.__name__].items():
        if name not in record:
            if name not in ADDED:
                raise ValueError(f"{where}: {name}: expected a value, got none; {remedy}")
        elif not fits(record[name]):
            raise ValueError(f"{where}: {name}: {problem(record[name], hints[name]):.120}; {remedy}")
    if not record.keys() <= hints.keys():
        raise ValueError(f"{where}: unknown field {min(record.keys() - hints.keys())!r:.60}; {remedy}")
    return kind(**record, where=where)


def _fields_of(kind: type[Row] | type[Measurement]) -> dict[str, Any]:
    hints = get_type_hints(kind, include_extras=True)
    return {f.name: hints[f.name] for f in fields(kind) if f.name != "where"}


FIELDS = {kind.__name__: _fields_of(kind) for kind in (Row, Measurement)}
"""Stored fields of a line with their types."""
TESTS = {
    kind: {name: test for name, hint in hints.items() if (test := fitting(hint)) is not None}
    for kind, hints in FIELDS.items()
}
"""The same as functions: results are read by the ten thousand."""
