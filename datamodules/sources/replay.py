"""Red-team replay: what broke a model in an earlier evaluation becomes training data."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

from datamodules.fields import checked
from datamodules.rows import HarmfulRow, RowProblem
from datamodules.sources.base import DEFAULT_SAFE_REPLY
from datamodules.sources.files import parse_json


@checked
class RedTeamReplay:
    """Successful prompts of an earlier evaluation as training data: red-team replay.

    The rows come from the results store of a run (RUN/attacks); prompts that nobody can type, forced replies
    and conversations of several turns are left out. Attack training requests, not evaluation ones: a row is
    refused if the request behind it is evaluated on.

    Args:
        run: the run folder.
        safe_reply: the reply to learn.
        attacks: only what these attacks found; null for all.
        judge: name (`target_prefix`) or `name@revision` of the judge whose verdict counts.
    """

    def __init__(
        self,
        run: str,
        safe_reply: str = DEFAULT_SAFE_REPLY,
        attacks: list[str] | None = None,
        judge: str = "target_prefix",
    ) -> None:
        self.run = run
        self.safe_reply = safe_reply
        self.attacks = attacks
        self.judge = judge

    def rows(self) -> Iterator[HarmfulRow | RowProblem]:
        """Raises: ValueError where the run holds no results, no such attack, or no verdict of the judge."""
        paths = sorted((Path(self.run) / "attacks").glob("rows_rank*.jsonl"))
        if not paths:
            raise ValueError(
                f"RedTeamReplay.run: no attacks/rows_rank*.jsonl in {self.run!r}; attack the training "
                "requests first"
            )
        latest: dict[tuple[object, ...], tuple[str, dict[str, Any]]] = {}
        for path in paths:
            for number, line in enumerate(path.read_text(encoding="utf-8").splitlines(), start=1):
                record = parse_json(line, f"{path}:{number}", dict)
                latest[
                    tuple(record[key] for key in ("model", "attack", "settings", "example", "restart"))
                ] = f"{path}:{number}", record
        unknown = set(self.attacks or ()) - {record["attack"] for _, record in latest.values()}
        if unknown:
            raise ValueError(f"RedTeamReplay.attacks: {sorted(unknown)} did not run in {self.run!r}")
        seen: set[str] = set()
        for where, record in latest.values():
            verdicts = [
                v["verdict"]
                for name, v in record["verdicts"].items()
                if self.judge in (name, name.split("@")[0])
            ]
            if not verdicts:
                raise ValueError(
                    f"RedTeamReplay.judge: {where} has no verdict of {self.judge!r}, got "
                    f"{sorted(record['verdicts'])}"
                )
            wanted = self.attacks is None or record["attack"] in self.attacks
            replayable = record["attacked"] is not None and not record["prefill"] and not record["history"]
            if wanted and replayable and any(verdicts) and record["attacked"] not in seen:
                seen.add(record["attacked"])
                parts = ("attack", "example", "restart", "settings", "model")
                key = "/".join(["replay", *(str(record[part]) for part in parts)])
                yield HarmfulRow(
                    key,
                    record["attacked"],
                    record["target"],
                    self.safe_reply,
                    where,
                    record["category"],
                    record["functional"],
                    origin=record["prompt"],
                )
