"""The results store: one JSON row per (model, attack, example, restart), written as it goes and read back
after a kill.

Rows are appended to `attacks/rows_rank<r>.jsonl` in the run folder; a later row replaces an earlier one with
the same identity, so that verdicts of another judge are added without attacking again. A line that a kill cut
short is dropped when the file is opened.
"""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Iterable, Iterator
from dataclasses import asdict, dataclass, field, fields
from pathlib import Path
from typing import Any

from datamodules.batch import EvaluationBatch

SCHEMA = 1
"""Version of the rows' fields; rows of another version are refused."""
FOLDER = "attacks"


@dataclass
class AttackRow:
    """One attack on one example."""

    model: str
    """Fingerprint of the attacked weights."""
    attack: str
    settings: str
    """Digest of the attack's settings, the generation's length and the seed."""
    example: str
    """Key of the example."""
    restart: int
    step: int
    """Optimiser step of the attacked model."""
    prompt: str
    target: str
    category: str
    functional: str
    attacked: str | None
    """What a user types to replay the attack; null for attacks on embeddings."""
    history: list[list[str]]
    prefill: str
    completion: str
    loss_curve: list[float | None]
    """Attacked loss at every iterate, in nats per token; null once the example was done."""
    steps: int
    forward_passes: int
    backward_passes: int
    queries: int
    seconds: float
    """Wall time of the example's batch divided by its size."""
    flags: dict[str, bool]
    verdicts: dict[str, dict[str, Any]] = field(default_factory=dict)
    """`name@revision` of a judge -> {"verdict": bool, "score": float or null}."""
    schema: int = SCHEMA

    @property
    def identity(self) -> tuple[str, str, str, str, int]:
        return self.model, self.attack, self.settings, self.example, self.restart


class ResultsStore:
    """The rows of a run folder; every process writes its own file and reads all.

    Args:
        folder: the run folder.
        rank: number of this process.

    Raises: ValueError for rows of another schema version or a damaged line, naming file and line.
    """

    def __init__(self, folder: str | Path, rank: int = 0) -> None:
        self.path = Path(folder) / FOLDER / f"rows_rank{rank}.jsonl"
        self.path.parent.mkdir(parents=True, exist_ok=True)
        _drop_torn_line(self.path)
        self._rows = {
            row.identity: row
            for path in sorted(self.path.parent.glob("rows_rank*.jsonl"))
            for row in _read(path)
        }

    def get(self, identity: tuple[str, str, str, str, int]) -> AttackRow | None:
        return self._rows.get(identity)

    def __iter__(self) -> Iterator[AttackRow]:
        return iter(self._rows.values())

    def add(self, rows: Iterable[AttackRow]) -> None:
        """Append rows; they are on disk when this returns."""
        rows = list(rows)
        with self.path.open("a", encoding="utf-8") as stream:
            stream.write("".join(json.dumps(asdict(row), ensure_ascii=False) + "\n" for row in rows))
            stream.flush()
            os.fsync(stream.fileno())
        self._rows.update({row.identity: row for row in rows})


def clear_store(folder: str | Path) -> None:
    """Remove the rows of an earlier run."""
    for path in (Path(folder) / FOLDER).glob("rows_rank*.jsonl"):
        path.unlink()


def _read(path: Path) -> Iterator[AttackRow]:
    known = {f.name for f in fields(AttackRow)}
    for number, line in enumerate(path.read_text(encoding="utf-8").split("\n"), start=1):
        if not line:
            continue
        try:
            record = json.loads(line)
        except json.JSONDecodeError as error:
            # Another process may be writing its last line right now; this one's own torn line is gone
            # already.
            if number == 1 + path.read_bytes().count(b"\n"):
                return
            raise ValueError(
                f"{path}:{number}: not JSON ({error}); remove the line to attack its example again"
            ) from error
        if record.get("schema") != SCHEMA or set(record) != known:
            raise ValueError(
                f"{path}:{number}: expected a row of schema {SCHEMA}, got {record.get('schema')!r}; "
                "move the file away"
            )
        yield AttackRow(**record)


def _drop_torn_line(path: Path) -> None:
    """Cut what follows the last newline: a write that a kill interrupted."""
    if path.is_file():
        content = path.read_bytes()
        whole = content.rfind(b"\n") + 1
        if whole < len(content):
            with path.open("r+b") as stream:
                stream.truncate(whole)


def contents(batch: EvaluationBatch) -> list[Any]:
    """What an attack sees of a batch, as JSON."""
    assert batch.adversarial is not None
    sent = batch.adversarial
    return [
        t.tolist()
        for t in (
            sent.prompt_ids,
            sent.prompt_mask,
            sent.attackable_mask,
            sent.harmful_ids,
            sent.harmful_mask,
        )
    ]


def settings_digest(*things: object) -> str:
    """Digest of everything that decides an attack's outcome, from the public attributes of its objects."""
    return hashlib.blake2b(
        json.dumps([describe(thing) for thing in things], sort_keys=True).encode(), digest_size=6
    ).hexdigest()


def describe(thing: object) -> Any:
    """Public attributes, recursively, as JSON; objects without any are named by their class."""
    if thing is None or isinstance(thing, bool | int | float | str):
        return thing
    if isinstance(thing, list | tuple):
        return [describe(item) for item in thing]
    if isinstance(thing, dict):
        return {str(key): describe(value) for key, value in thing.items()}
    attributes = (
        {name: describe(value) for name, value in vars(thing).items() if not name.startswith("_")}
        if hasattr(thing, "__dict__")
        else {}
    )
    return {"class": f"{type(thing).__module__}.{type(thing).__qualname__}", **attributes}
