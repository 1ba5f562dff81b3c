"""Rows as text, before any tokenizer: what every data source yields and what a bad row is called."""

from __future__ import annotations

import hashlib
from dataclasses import dataclass
from typing import Literal

Turn = tuple[str, str]
"""An earlier exchange of a conversation: the user's text and the assistant's reply."""
TrainOn = Literal["all", "last"]
"""Which replies of a conversation are learned."""


@dataclass(frozen=True)
class HarmfulRow:
    """A harmful request with the reply an attacker wants and the reply we want."""

    key: str
    """Stable name, unique within a run: example ids, caches and per-example results hang on it."""
    prompt: str
    target: str
    """Affirmative prefix the attacker optimises for (harmful target)."""
    safe_reply: str
    where: str
    """Origin of the row as `file:line` (or `file:line key[item]`), for error messages."""
    category: str = ""
    functional: str = ""
    """HarmBench's functional category: standard, contextual or copyright."""
    system: str | None = None
    data: str | None = None
    """An untrusted document beside the prompt; the target is then what text hidden in it asks for, and the
    safe reply the answer to the prompt."""
    forbidden: str = ""
    """What must not appear in a reply: the hidden request's result, a secret; '' for the target."""
    origin: str = ""
    """The request behind a rewritten prompt, or prompt and document before text was hidden in it; training on
    it is training on that request. '' where the prompt is the request."""


@dataclass(frozen=True)
class ChatRow:
    """A harmless request and the reply to keep (utility data) or to judge against (evaluation)."""

    key: str
    prompt: str
    """The last user turn; what came before it is `history`."""
    reply: str
    """'' where an evaluation row needs none."""
    where: str
    category: str = ""
    system: str | None = None
    history: tuple[Turn, ...] = ()
    train_on: TrainOn = "all"
    """Whether earlier replies are learned too, or only the last."""
    cut: bool = False
    """The reply goes on beyond what is written: its end is no end of turn."""
    data: str | None = None
    """A document beside the prompt, trusted by nobody."""


Row = HarmfulRow | ChatRow


@dataclass(frozen=True)
class RowProblem:
    """Why a row cannot be used."""

    where: str
    reason: str

    def __str__(self) -> str:
        return f"{self.where}: {self.reason}"


class BadRowError(ValueError):
    """Raised for a bad row under the policy `on_bad_row: error`."""


def texts(row: Row) -> dict[str, str]:
    """Every text of a row by what it is, for checks that hold for all of them."""
    named = {"key": row.key, "prompt": row.prompt, "category": row.category}
    if row.system is not None:
        named["system message"] = row.system
    if row.data is not None:
        named["document"] = row.data
    if isinstance(row, HarmfulRow):
        return named | {"target": row.target, "safe reply": row.safe_reply, "origin": row.origin}
    for number, (user, reply) in enumerate(row.history, start=1):
        named |= {f"user turn {number}": user, f"reply {number}": reply}
    return named | {"reply": row.reply}


def example_id(key: str) -> int:
    """Stable non-negative 63-bit id of a row key, the same in every process and on every machine."""
    return int.from_bytes(hashlib.blake2b(key.encode(), digest_size=8).digest(), "big") >> 1
