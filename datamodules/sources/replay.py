"""Red-team replay: what broke a model in an earlier evaluation becomes training data."""

from __future__ import annotations

from collections.abc import Iterator

from datamodules.fields import checked
from datamodules.result_lines import Row
from datamodules.results import ROWS, read_rows
from datamodules.rows import HarmfulRow, RowProblem
from datamodules.sources.base import DEFAULT_SAFE_REPLY


@checked
class RedTeamReplay:
    """Successful prompts of an earlier evaluation as training data: red-team replay.

    The rows are those of a run folder; prompts that nobody can type, forced replies and conversations of
    several turns are left out, and rows with a document are bad ones: whether it was attacked or the user's
    text, they do not say. Attack training requests, not evaluation ones: a row is refused if the request
    behind it is evaluated on.

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
        attacked = self._attacked()
        if not attacked:
            raise ValueError(
                f"RedTeamReplay.run: no attacked rows in {self.run}/{ROWS}; attack the training requests "
                "first"
            )
        unknown = set(self.attacks or ()) - {row.attack for row in attacked}
        if unknown:
            raise ValueError(f"RedTeamReplay.attacks: {sorted(unknown)} did not run in {self.run!r}")
        seen: set[str] = set()
        for row in attacked:
            broken = row.accepted(self.judge, "RedTeamReplay.judge")
            wanted = self.attacks is None or row.attack in self.attacks
            typed = None if row.prefill or row.history else row.attacked
            if wanted and broken and typed is not None and typed not in seen:
                seen.add(typed)
                beside = "it was asked beside a document, which cannot be replayed; name attacks on requests"
                yield RowProblem(row.where, beside) if row.document else self._replayed(row, typed)

    @property
    def collecting_passes(self) -> int:
        """Of the attacks that it takes from, on all requests, and of the replies that showed what they won:
        those that failed cost as much."""
        chosen = (row for row in self._attacked() if self.attacks is None or row.attack in self.attacks)
        return sum(row.forward_passes + row.backward_passes + row.queries + 1 for row in chosen)

    def _attacked(self) -> list[Row]:
        rows = read_rows(self.run)
        return [row for row in rows if row.attack and row.stage != "attack" and row.subject == "harmful"]

    def _replayed(self, row: Row, prompt: str) -> HarmfulRow:
        key = "/".join(["replay", *(str(part) for part in row.identity)])
        return HarmfulRow(
            key,
            prompt,
            row.expected,
            self.safe_reply,
            row.where,
            row.category,
            row.functional,
            system=row.system,
            origin=row.prompt,
        )
