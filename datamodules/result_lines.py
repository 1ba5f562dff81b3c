"""What a line of results holds: a reply with what judges say of it, or what was to be measured."""

from __future__ import annotations

import json
from collections.abc import Iterator
from dataclasses import asdict, dataclass, field, fields
from pathlib import Path
from typing import Any, Literal, TypeVar, get_type_hints

from datamodules.fields import NonNegativeInt, fitting, problem
from datamodules.line_files import whole_lines

SCHEMA = 2
"""Version of the lines' fields; lines of another version are refused."""
ADDED = {"samples", "block", "call", "against", "base_reply", "counts", "defence", "document", "answer"}
ADDED |= {"forbidden", "pieces", "contributions", "edition"}
"""Fields that came later with a default: lines written before them lack them and mean the default."""
BASE = "base:"
"""In front of a judge's label: what it said of `base_reply`."""

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
    edition: NonNegativeInt = field(default=0, compare=False)
    """How many lines of the same row it follows, whichever process wrote them."""
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


Line = TypeVar("Line", Row, Measurement)


def dumped(line: Row | Measurement) -> str:
    # ASCII: a reply may hold half a surrogate pair, which no UTF-8 file can.
    record = {key: value for key, value in asdict(line).items() if key != "where"}
    if not record.get("edition"):  # as most are
        record.pop("edition", None)
    return json.dumps(record)


def lines_of(path: Path, kind: type[Line]) -> Iterator[Line]:
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
