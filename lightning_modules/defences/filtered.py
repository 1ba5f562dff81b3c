"""A filter in front of a model: what it flags is refused without asking the model."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol

from datamodules.fields import checked
from datamodules.sources.base import DEFAULT_SAFE_REPLY
from lightning_modules.defences.base import Answer, spent
from lightning_modules.models.language_model import LanguageModel
from lightning_modules.models.requests import Decoding, Request


@dataclass(frozen=True)
class Check:
    """What a filter says of one request."""

    excess: float
    """How far it is beyond what is let through; above 0 it is flagged."""
    queries: int
    tokens: int
    guaranteed: bool | None = None
    """Whether it stays flagged whatever is added within the filter's mode; None where a filter promises
    nothing of the kind."""

    @property
    def flagged(self) -> bool:
        return self.excess > 0


class Filter(Protocol):
    """Says which requests are let through."""

    @property
    def name(self) -> str: ...

    def checks(self, model: LanguageModel, requests: Sequence[Request]) -> list[Check]:
        """One each, in any batches the same.

        Args:
            model: the model behind the filter, which some filters ask.
        """
        ...


@checked
class Filtered:
    """Refuses what a filter flags; the model answers the rest.

    Args:
        filter: what looks at the request.
        refusal: the reply to what is flagged.
    """

    def __init__(self, filter: Filter, refusal: str = DEFAULT_SAFE_REPLY) -> None:
        self.filter = filter
        self.refusal = refusal

    @property
    def name(self) -> str:
        return self.filter.name

    def answers(
        self, model: LanguageModel, requests: Sequence[Request], decoding: Decoding, seed: int
    ) -> list[Answer]:
        """The refusal to what is flagged, the model's reply to the rest."""
        checks = self.filter.checks(model, requests)
        passed = [i for i, check in enumerate(checks) if not check.flagged]
        asked = [requests[i] for i in passed]
        replies = model.reply(asked, decoding, seed)
        found = [
            Answer(self.refusal, check.queries, check.tokens, stopped=True, guaranteed=check.guaranteed)
            for check in checks
        ]
        for i, reply, tokens in zip(passed, replies, spent(model, asked, replies), strict=True):
            own = checks[i]
            found[i] = Answer(reply, own.queries + 1, own.tokens + tokens, guaranteed=own.guaranteed)
        return found

    def seen_through(
        self, model: LanguageModel, requests: Sequence[Request], draws: int, seed: int
    ) -> list[list[Request]]:
        """The request as it is, once it is through; nothing is random."""
        return [[request] for request in requests]

    def excesses(
        self, model: LanguageModel, requests: Sequence[Request], replies: Sequence[str]
    ) -> list[float] | None:
        """How far each request is beyond what the filter lets through, whatever the reply."""
        return [check.excess for check in self.filter.checks(model, requests)]
