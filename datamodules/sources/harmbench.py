"""HarmBench's layout: behaviours, targets and safe replies in files of their own."""

from __future__ import annotations

import json
from collections.abc import Iterator

from datamodules.rows import HarmfulRow, RowProblem
from datamodules.sources.base import DEFAULT_SAFE_REPLY
from datamodules.sources.files import local_file, parse_json, read_records


class HarmBench:
    """HarmBench's file layout: behaviours csv, targets json (one or several per behaviour), optional safe
    replies csv.

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
                yield RowProblem(
                    where, f"expected columns Behavior and BehaviorID with text, got {sorted(record)}"
                )
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
