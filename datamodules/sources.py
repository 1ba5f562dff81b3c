"""Data sources: HarmBench's layout, AdvBench, tables with a column map, common instruction formats, the tinychat corpus.

Every source yields rows or named problems (`file:line`); what to do about a problem is the data module's policy.
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any, Literal, Protocol

from datamodules import tinychat_corpus
from datamodules.records import check_columns, first_exchange, local_file, parse_json, pick, read_records
from datamodules.rows import ChatRow, HarmfulRow, RowProblem

DEFAULT_SAFE_REPLY = "I'm sorry, but I can't help with that."


class HarmfulSource(Protocol):
    """Yields harmful requests with targets and safe replies."""

    def rows(self) -> Iterator[HarmfulRow | RowProblem]: ...


class ChatSource(Protocol):
    """Yields harmless requests with replies."""

    def rows(self) -> Iterator[ChatRow | RowProblem]: ...


class HarmBench:
    """HarmBench's file layout: behaviours csv, targets json (one or several per behaviour), optional safe replies csv.

    Args:
        behaviors: csv with Behavior, BehaviorID and optionally ContextString, SemanticCategory or Category.
        targets: json mapping BehaviorID (or the behaviour's text) to a target or a list of targets.
        safe_replies: csv with Behavior and Safe_Response; null gives every behaviour `default_safe_reply`.
        default_safe_reply: safe reply where `safe_replies` is null.
        limit: use only the first so many behaviours; null for all.
    """

    def __init__(
        self,
        behaviors: str,
        targets: str,
        safe_replies: str | None = None,
        default_safe_reply: str = DEFAULT_SAFE_REPLY,
        limit: int | None = None,
    ) -> None:
        self.behaviors = behaviors
        self.targets = targets
        self.safe_replies = safe_replies
        self.default_safe_reply = default_safe_reply
        self.limit = limit

    def rows(self) -> Iterator[HarmfulRow | RowProblem]:
        targets_path = local_file(self.targets)
        text = targets_path.read_text(encoding="utf-8")
        targets = parse_json(text, self.targets, dict)
        replies = self._safe_replies()
        for i, (line, record) in enumerate(read_records(self.behaviors)):
            if self.limit is not None and i >= self.limit:
                return
            where = f"{self.behaviors}:{line}"
            behavior, identity = record.get("Behavior"), record.get("BehaviorID")
            if not behavior or not identity:
                yield RowProblem(where, f"expected columns Behavior and BehaviorID with text, got {sorted(record)}")
                continue
            listed = targets.get(identity, targets.get(behavior))
            if listed is None:
                yield RowProblem(where, f"no target for {identity!r} in {self.targets}")
                continue
            safe = replies.get(behavior) if replies is not None else self.default_safe_reply
            if not safe:
                yield RowProblem(where, f"no safe reply for {identity!r} in {self.safe_replies}")
                continue
            key_line = text[: max(text.find(json.dumps(identity)), 0)].count("\n") + 1
            context = record.get("ContextString") or ""
            for j, target in enumerate(listed if isinstance(listed, list) else [listed]):
                target_where = f"{self.targets}:{key_line} {identity}[{j}]"
                if not isinstance(target, str) or not target.strip():
                    yield RowProblem(target_where, f"expected a non-empty target, got {target!r}")
                    continue
                yield HarmfulRow(
                    key=f"{identity}/{j}",
                    prompt=f"{context}\n\n---\n\n{behavior}" if context else behavior,
                    target=target,
                    safe_reply=safe,
                    where=target_where,
                    category=record.get("SemanticCategory") or record.get("Category") or "",
                    functional=record.get("FunctionalCategory") or "",
                )

    def _safe_replies(self) -> dict[str, str] | None:
        if self.safe_replies is None:
            return None
        return {record["Behavior"]: record["Safe_Response"] for _, record in read_records(self.safe_replies)}


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
        check_columns("HarmfulTable.columns", self.columns, {"prompt", "target", "safe_reply", "category", "key"}, {"prompt", "target"})
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
        format: `columns` (use the map below), `alpaca` (instruction, input, output), `dolly` (instruction, context, response),
            `ultrachat` (messages: the first user turn and its answer) or `lines` (a prompt a line, no replies).
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


class TinyChatHarmful:
    """Harmful how-to requests of the project's own corpus.

    Args:
        split: `train` or `heldout`; no verb-object pair is in both.
        limit: use only the first so many requests; null for all.
    """

    def __init__(self, split: Literal["train", "heldout"], limit: int | None = None) -> None:
        self.split = split
        self.limit = limit

    def rows(self) -> Iterator[HarmfulRow | RowProblem]:
        yield from tinychat_corpus.harmful_rows(self.split)[: self.limit]


class TinyChatBenign:
    """Benign tasks of the project's own corpus, each with one right answer.

    Args:
        split: `train` or `heldout`; no task content is in both.
        num_rows: how many rows to generate.
        seed: seed of the generated tasks.
        categories: keep only these of guide, sum, copy, reverse, fact, talk; null for all.
    """

    def __init__(
        self, split: Literal["train", "heldout"], num_rows: int = 2000, seed: int = 0, categories: list[str] | None = None
    ) -> None:
        self.split = split
        self.num_rows = num_rows
        self.seed = seed
        self.categories = categories

    def rows(self) -> Iterator[ChatRow | RowProblem]:
        for row in tinychat_corpus.benign_rows(self.split, self.num_rows, self.seed):
            if self.categories is None or row.category in self.categories:
                yield row


class AnsweredRequests:
    """Harmful requests as conversations, for supervised stages.

    Args:
        source: the harmful requests.
        reply: `target` teaches compliance (a helpful-only stage), `safe` teaches refusal.
    """

    def __init__(self, source: HarmfulSource, reply: Literal["target", "safe"]) -> None:
        self.source = source
        self.reply = reply

    def rows(self) -> Iterator[ChatRow | RowProblem]:
        for row in self.source.rows():
            if isinstance(row, RowProblem):
                yield row
            else:
                answer = row.target if self.reply == "target" else row.safe_reply
                yield ChatRow(f"{row.key}/{self.reply}", row.prompt, answer, row.where, row.category, row.system)


class Repeated:
    """A source's rows several times over, to weigh it against others in the same stream.

    Args:
        source: the conversations.
        times: how often each row occurs.
    """

    def __init__(self, source: ChatSource, times: int) -> None:
        if times < 1:
            raise ValueError(f"Repeated.times: expected >= 1, got {times}; leave the source out instead")
        self.source = source
        self.times = times

    def rows(self) -> Iterator[ChatRow | RowProblem]:
        for row in list(self.source.rows()):
            # A problem is one problem however often its row would have occurred.
            yield from [row] * (1 if isinstance(row, RowProblem) else self.times)
