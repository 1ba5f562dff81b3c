"""One row of a file, one row of data: tables with a column map, and the common instruction formats."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any, Literal

from datamodules.rows import ChatRow, HarmfulRow, RowProblem
from datamodules.sources.base import DEFAULT_SAFE_REPLY
from datamodules.sources.files import check_columns, first_exchange, pick, read_records


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
        limit: int | None = None,
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
                key=picked.get("key") or f"{Path(self.path).name}/{i}",
                prompt=picked["prompt"],
                target=picked["target"],
                safe_reply=picked.get("safe_reply") or self.default_safe_reply,
                where=where,
                category=picked.get("category", ""),
            )


class ChatTable:
    """Conversations from a csv, json, jsonl, parquet or txt file.

    Args:
        path: the file.
        format: `columns` (use the map below), `alpaca` (instruction, input, output), `dolly` (instruction,
            context, response), `ultrachat` (messages: the first user turn and its answer) or `lines` (a
            prompt a line, no replies).
        columns: for `columns`: which column holds `prompt` and optionally `reply`, `category`, `key`.
        where: keep only rows whose columns have these values, e.g. {label: safe} for XSTest's safe half.
        limit: use only the first so many kept rows; null for all.
    """

    def __init__(
        self,
        path: str,
        format: Literal["columns", "alpaca", "dolly", "ultrachat", "lines"] = "columns",
        columns: dict[str, str] | None = None,
        where: dict[str, str] | None = None,
        limit: int | None = None,
    ) -> None:
        self.path = path
        self.format = format
        self.columns = columns or {"prompt": "prompt", "reply": "reply"}
        check_columns("ChatTable.columns", self.columns, {"prompt", "reply", "category", "key"}, {"prompt"})
        self.where = where or {}
        self.limit = limit

    def rows(self) -> Iterator[ChatRow | RowProblem]:
        kept = 0
        for line, record in read_records(self.path):
            if any(str(record.get(name)) != value for name, value in self.where.items()):
                continue
            if self.limit is not None and kept >= self.limit:
                return
            kept += 1
            where = f"{self.path}:{line}"
            picked = self._pick(record, where)
            if isinstance(picked, RowProblem):
                yield picked
                continue
            yield ChatRow(
                key=picked.get("key") or f"{Path(self.path).name}/{line}",
                prompt=picked["prompt"],
                reply=picked.get("reply", ""),
                where=where,
                category=picked.get("category", ""),
            )

    def _pick(self, record: dict[str, Any], where: str) -> dict[str, str] | RowProblem:
        if self.format == "lines":
            return {"prompt": record["text"]}
        if self.format == "ultrachat":
            return first_exchange(record.get("messages"), where)
        if self.format == "columns":
            return pick(record, self.columns, where)
        extra, reply = ("input", "output") if self.format == "alpaca" else ("context", "response")
        picked = pick(record, {"prompt": "instruction", "reply": reply}, where)
        if isinstance(picked, dict) and record.get(extra):
            picked["prompt"] = f"{picked['prompt']}\n\n{record[extra]}"
        return picked
