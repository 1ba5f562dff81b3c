"""Records to the texts of a row: mapped columns, and conversations told by their roles."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from datamodules.rows import RowProblem, Turn
from datamodules.sources.files import Record


def check_columns(field: str, columns: dict[str, str], known: set[str], required: set[str]) -> None:
    """Raises: ValueError naming unknown or missing entries of a column map."""
    if set(columns) - known or required - set(columns):
        raise ValueError(
            f"{field}: expected keys {sorted(required)} and optionally {sorted(known - required)}, "
            f"got {sorted(columns)}"
        )


def pick(record: Record, columns: dict[str, str], where: str) -> dict[str, str] | RowProblem:
    """The mapped columns of a record as text, or the problem that prevents it (missing column, wrong type,
    empty)."""
    picked = {}
    for name, column in columns.items():
        if column not in record:
            return RowProblem(where, f"missing column {column!r} (for {name}); the row has {sorted(record)}")
        value = record[column]
        if name in ("key", "category") and isinstance(value, int | float):
            value = str(value)
        if not isinstance(value, str):
            return RowProblem(where, f"expected text in column {column!r}, got {type(value).__name__}")
        if name != "category" and not value.strip():
            return RowProblem(where, f"empty {name} (column {column!r})")
        picked[name] = value
    return picked


@dataclass(frozen=True)
class Conversation:
    """What `messages` say: the last exchange, and all that came before it."""

    system: str | None
    history: tuple[Turn, ...]
    prompt: str
    reply: str
    """'' where the user has the last word."""


def read_conversation(messages: Any, where: str, turns: int | None = None) -> Conversation | RowProblem:
    """A conversation of [system,] user, assistant, user, ... turns, or the problem that prevents it.

    Args:
        messages: a list of {role, content}.
        where: `file:line`.
        turns: keep only the first so many exchanges; None keeps all.
    """
    if not isinstance(messages, list) or not messages:
        return RowProblem(where, "expected messages: a list of {role, content} with a user turn")
    said: list[tuple[str, str]] = []
    for number, message in enumerate(messages, start=1):
        role, content = (
            (message.get("role"), message.get("content")) if isinstance(message, dict) else (None, None)
        )
        if not isinstance(role, str) or not isinstance(content, str):
            return RowProblem(where, f"message {number}: expected a role and a text as content")
        if role != "system" and not content.strip():
            return RowProblem(where, f"message {number}: empty {role} turn")
        said.append((role, content))
    system = said.pop(0)[1] if said[0][0] == "system" else None
    roles = [role for role, _ in said]
    if not said or roles != [("user", "assistant")[i % 2] for i in range(len(said))]:
        got = ", ".join(["system"] * (system is not None) + roles)
        return RowProblem(where, f"expected the roles [system,] user, assistant, user, ..., got {got}")
    exchanges = [text for _, text in said][: None if turns is None else 2 * turns]
    reply = exchanges.pop() if len(exchanges) % 2 == 0 else ""
    prompt = exchanges.pop()
    return Conversation(system, tuple(zip(exchanges[::2], exchanges[1::2], strict=True)), prompt, reply)
