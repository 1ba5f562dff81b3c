"""HarmBench's layout: behaviours, targets and safe replies in files of their own."""

from __future__ import annotations

import json
from collections.abc import Iterator
from itertools import islice
from typing import Any, Literal

from datamodules.fields import Count, checked
from datamodules.rows import HarmfulRow, RowProblem
from datamodules.sources.base import DEFAULT_SAFE_REPLY
from datamodules.sources.columns import pick
from datamodules.sources.files import Record, parse_json, read_records, read_text


@checked
class HarmBench:
    """HarmBench's file layout: behaviours csv, targets json (one or several per behaviour), optional safe
    replies csv.

    Args:
        behaviors: csv with Behavior, BehaviorID and optionally ContextString, SemanticCategory or Category.
        targets: json mapping BehaviorID (or the behaviour's text) to a target or a list of targets.
        safe_replies: csv with Behavior and Safe_Response; null gives every behaviour `default_safe_reply`.
        default_safe_reply: safe reply where `safe_replies` is null.
        limit: use only the first so many behaviours; null for all.
        functional: use only behaviours of this functional category; null for all.
        max_targets: of each behaviour use only the first so many targets; null for all.
        among: csv of behaviours; use only those whose BehaviorID it names too, in its order. Two wordings of
            the same behaviours are so told in one order. Null for all.
    """

    def __init__(
        self,
        behaviors: str,
        targets: str,
        safe_replies: str | None = None,
        default_safe_reply: str = DEFAULT_SAFE_REPLY,
        limit: Count | None = None,
        functional: Literal["standard", "contextual", "copyright"] | None = None,
        max_targets: Count | None = None,
        among: str | None = None,
    ) -> None:
        self.behaviors = behaviors
        self.targets = targets
        self.safe_replies = safe_replies
        self.default_safe_reply = default_safe_reply
        self.limit = limit
        self.functional = functional
        self.max_targets = max_targets
        self.among = among

    def rows(self) -> Iterator[HarmfulRow | RowProblem]:
        """Raises: ValueError naming the file and line of what is no HarmBench file, or where it has no
        behaviour of the category."""
        text = read_text(self.targets)
        targets = parse_json(text, self.targets, dict)
        replies = self._safe_replies()
        for line, record in islice(self._records(), self.limit):
            where = f"{self.behaviors}:{line}"
            named = pick(record, {"behavior": "Behavior", "identity": "BehaviorID"}, where)
            if isinstance(named, RowProblem):
                yield named
                continue
            identity, behavior = named["identity"], named["behavior"]
            listed = targets.get(identity, targets.get(behavior))
            if listed is None or listed == []:
                yield RowProblem(where, f"no target for {identity!r} in {self.targets}")
                continue
            safe = replies.get(behavior) if replies is not None else self.default_safe_reply
            if not safe:
                yield RowProblem(where, f"no safe reply for {identity!r} in {self.safe_replies}")
                continue
            key_line = text[: max(text.find(json.dumps(identity)), 0)].count("\n") + 1
            place = f"{self.targets}:{key_line} {identity}"
            for j, target in enumerate(
                (listed if isinstance(listed, list) else [listed])[: self.max_targets]
            ):
                yield _row(record, named, target, safe, j, f"{place}[{j}]")

    def _records(self) -> Iterator[tuple[int, Record]]:
        found = set()
        for line, record in self._chosen():
            category = record.get("FunctionalCategory")
            found.add(category)
            if self.functional in (None, category):
                yield line, record
        if self.functional is not None and self.functional not in found:
            raise ValueError(
                f"HarmBench.functional: no behaviour of {self.behaviors} is {self.functional!r}; there are "
                f"{sorted(map(str, found))}"
            )

    def _chosen(self) -> Iterator[tuple[int, Record]]:
        """The behaviours that `among` names too, in its order. Raises: ValueError where there is none, or
        where this file names one twice."""
        if self.among is None:
            yield from read_records(self.behaviors)
            return
        own: dict[Any, tuple[int, Record]] = {}
        for line, record in read_records(self.behaviors):
            identity = record.get("BehaviorID")
            if identity in own:
                raise ValueError(
                    f"{self.behaviors}:{line}: BehaviorID {identity!r} stands in line {own[identity][0]} "
                    "too; rename one"
                )
            own[identity] = line, record
        named = [record.get("BehaviorID") for _, record in read_records(self.among)]
        shared = [identity for identity in dict.fromkeys(named) if identity in own]
        if not shared:
            raise ValueError(f"HarmBench.among: no BehaviorID of {self.behaviors} stands in {self.among}")
        yield from (own[identity] for identity in shared)

    def _safe_replies(self) -> dict[str, str] | None:
        if self.safe_replies is None:
            return None
        replies = {}
        for line, record in read_records(self.safe_replies):
            where = f"{self.safe_replies}:{line}"
            if not isinstance(record.get("Behavior"), str) or not isinstance(
                record.get("Safe_Response"), str
            ):
                raise ValueError(
                    f"{where}: expected columns Behavior and Safe_Response, got {sorted(record)}"
                )
            replies[record["Behavior"]] = record["Safe_Response"]
        return replies


def _row(
    record: Record, named: dict[str, str], target: Any, safe: str, number: int, where: str
) -> HarmfulRow | RowProblem:
    if not isinstance(target, str) or not target.strip():
        got = repr(target) if isinstance(target, str) else type(target).__name__
        return RowProblem(where, f"expected a non-empty target, got {got}")
    context = record.get("ContextString") or ""
    return HarmfulRow(
        key=f"{named['identity']}/{number}",
        prompt=f"{context}\n\n---\n\n{named['behavior']}" if context else named["behavior"],
        target=target,
        safe_reply=safe,
        where=where,
        category=str(record.get("SemanticCategory") or record.get("Category") or ""),
        functional=str(record.get("FunctionalCategory") or ""),
    )
