"""One row of a file, one row of data: tables with a column map, and the common instruction formats."""

from __future__ import annotations

from collections.abc import Iterator
from functools import cached_property
from typing import Any, Literal

from datamodules.fields import Count, checked
from datamodules.rows import ChatRow, HarmfulRow, RowProblem, TrainOn
from datamodules.sources.base import DEFAULT_SAFE_REPLY
from datamodules.sources.columns import check_columns, pick, read_conversation
from datamodules.sources.files import Record, default_key, read_records

ChatFileFormat = Literal["columns", "alpaca", "dolly", "messages", "ultrachat", "lines", "predictions"]


@checked
class HarmfulTable:
    """One harmful request per row of a csv, json or jsonl file; the defaults read AdvBench.

    Args:
        path: the file.
        columns: which column holds `prompt`, `target`, and optionally `safe_reply`, `category`, `key`.
        default_safe_reply: safe reply where no column gives one.
        limit: use only the first so many rows; null for all.
    """

    def __init__(
        self,
        path: str,
        columns: dict[str, str] | None = None,
        default_safe_reply: str = DEFAULT_SAFE_REPLY,
        limit: Count | None = None,
    ) -> None:
        self.path = path
        self.columns = columns or {"prompt": "goal", "target": "target"}
        check_columns(
            "HarmfulTable.columns",
            self.columns,
            {"prompt", "target", "safe_reply", "category", "key"},
            {"prompt", "target"},
        )
        self.default_safe_reply = default_safe_reply
        self.limit = limit

    def rows(self) -> Iterator[HarmfulRow | RowProblem]:
        for i, (line, record) in enumerate(read_records(self.path)):
            if self.limit is not None and i >= self.limit:
                return
            where = f"{self.path}:{line}"
            picked = pick(record, self.columns, where)
            if isinstance(picked, RowProblem):
                yield picked
                continue
            yield HarmfulRow(
                key=picked.get("key") or default_key(self.path, line),
                prompt=picked["prompt"],
                target=picked["target"],
                safe_reply=picked.get("safe_reply") or self.default_safe_reply,
                where=where,
                category=picked.get("category", ""),
            )


@checked
class ChatTable:
    """Conversations from a csv, json, jsonl, parquet or txt file.

    Args:
        path: the file.
        format: `columns` (use the map below), `alpaca` (instruction, input, output), `dolly` (instruction,
            context, response), `messages` or `ultrachat` (a list of {role, content}: an optional system
            message, then user and assistant in turn; all turns are kept), `lines` (a prompt a line, no
            replies) or `predictions` (a model's own replies as `thundercat predict` writes them; one that was
            cut off is learned without an end).
        columns: for `columns`: which column holds `prompt` and optionally `reply`, `category`, `key`, and
            `data`, an untrusted document beside the prompt.
        where: keep only rows whose columns have these values, e.g. {label: safe} for XSTest's safe half.
        limit: use only the first so many kept rows; null for all.
        train_on: for `messages`: learn `all` replies of a conversation, or only the `last`.
        turns: for `messages`: use only the first so many exchanges of a conversation, as the CAT authors'
            code does with 1; null keeps all.
    """

    def __init__(
        self,
        path: str,
        format: ChatFileFormat = "columns",
        columns: dict[str, str] | None = None,
        where: dict[str, str] | None = None,
        limit: Count | None = None,
        train_on: TrainOn = "all",
        turns: Count | None = None,
    ) -> None:
        self.path = path
        self.format = format
        self.columns = columns or {"prompt": "prompt", "reply": "reply"}
        known = {"prompt", "reply", "category", "key", "data"}
        check_columns("ChatTable.columns", self.columns, known, {"prompt"})
        if turns is not None and format not in ("messages", "ultrachat"):
            raise ValueError(f"ChatTable.turns: expected null for format {format!r}, got {turns}")
        self.where = where or {}
        self.limit = limit
        self.train_on: TrainOn = train_on
        self.turns = turns

    @cached_property
    def collecting_passes(self) -> int:
        """A forward pass for every reply that a model wrote, used or not."""
        return sum(1 for _ in read_records(self.path)) if self.format == "predictions" else 0

    def rows(self) -> Iterator[ChatRow | RowProblem]:
        """Raises: ValueError where `where` names a column or a value that no row has."""
        _ = self.collecting_passes  # Counted now: the file may be another one when training ends.
        kept = 0
        seen: dict[str, set[str]] = {name: set() for name in self.where}
        columns: set[str] = set()
        for line, record in read_records(self.path):
            columns |= record.keys()
            for name in self.where.keys() & record.keys():
                seen[name].add(str(record[name]))
            if any(str(record.get(name)) != value for name, value in self.where.items()):
                continue
            if self.limit is not None and kept >= self.limit:
                return
            kept += 1
            yield self._row(line, record)
        for name, value in self.where.items():
            if columns and name not in columns:
                raise ValueError(
                    f"ChatTable.where: no row of {self.path} has a column {name!r}; it has {sorted(columns)}"
                )
            if columns and value not in seen[name]:
                raise ValueError(
                    f"ChatTable.where: no row of {self.path} has {name} = {value!r}; there are "
                    f"{sorted(seen[name])[:10]}"
                )

    def _row(self, line: int, record: Record) -> ChatRow | RowProblem:
        where, key = f"{self.path}:{line}", default_key(self.path, line)
        if self.format in ("messages", "ultrachat"):
            said = read_conversation(record.get("messages"), where, self.turns)
            if isinstance(said, RowProblem):
                return said
            return ChatRow(
                key,
                said.prompt,
                said.reply,
                where,
                system=said.system,
                history=said.history,
                train_on=self.train_on,
            )
        picked = self._pick(record, where)
        if isinstance(picked, RowProblem):
            return picked
        return ChatRow(
            picked.get("key") or key,
            picked["prompt"],
            picked.get("reply", ""),
            where,
            picked.get("category", ""),
            cut=self.format == "predictions" and record.get("cut") is True,
            data=picked.get("data"),
        )

    def _pick(self, record: dict[str, Any], where: str) -> dict[str, str] | RowProblem:
        if self.format == "lines":
            return pick(record, {"prompt": "text"}, where)
        if self.format == "columns":
            return pick(record, self.columns, where)
        if self.format == "predictions":
            return pick(record, {name: name for name in ("key", "prompt", "reply")}, where)
        extra, reply = ("input", "output") if self.format == "alpaca" else ("context", "response")
        columns = {"prompt": "instruction", "reply": reply}
        if record.get(extra):
            columns["extra"] = extra
        picked = pick(record, columns, where)
        if isinstance(picked, dict) and "extra" in picked:
            picked["prompt"] = f"{picked['prompt']}\n\n{picked['extra']}"
        return picked
