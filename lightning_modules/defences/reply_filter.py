"""A filter behind a model: a reply that a classifier finds harmful, with the conversation that led to it, is
replaced by a refusal.

The reply must be generated whole before it is judged: nothing can be shown while it is written, and what is
refused has cost as much as what is answered. An attack on embeddings does not get past it: what it reads is
text, the request as it was asked and the reply.

An attack on text is scored by the reply that it looks for: whether that reply, after the attacked request,
would be let through. Of a given reply a classifier that reads replies alone says the same whatever the
suffix is, and any classifier whatever an attack on embeddings adds: to know the filter then changes nothing
but which reply to look for, and the static attack is the adaptive one.

Longer replies score otherwise, and so do sampled ones: each decoding that is asked for calibrates a threshold
of its own.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import replace
from functools import partial
from typing import Protocol

from datamodules.fields import Count, Share, checked
from datamodules.rows import ChatRow
from datamodules.sources.base import DEFAULT_SAFE_REPLY, ChatSource
from lightning_modules.attacks.suffix.through_defence import Seen, Unguarded
from lightning_modules.defences.base import ROWS_AT_ONCE, Answer, Defence, Defended, Marked, spent
from lightning_modules.defences.calibrated import Threshold
from lightning_modules.defences.exchange import Exchange, request_of
from lightning_modules.defences.filtered import Check
from lightning_modules.defences.learned import Classifier, checked_by
from lightning_modules.models.language_model import LanguageModel
from lightning_modules.models.requests import Decoding, Request


class Inner(Defence, Seen, Protocol):
    """A defence that can be attacked adaptively."""


class _Alone(Unguarded):
    """No further defence: the model's own replies."""

    name = "none"

    def answers(
        self, model: LanguageModel, requests: Sequence[Request], decoding: Decoding, seed: int
    ) -> list[Answer]:
        replies = model.reply(requests, decoding, seed)
        tokens = spent(model, requests, replies)
        return [Answer(reply, 1, count) for reply, count in zip(replies, tokens, strict=True)]


@checked
class ReplyFilter:
    """Answers with a refusal where the reply is found more harmful than all but a few replies to benign
    requests.

    Args:
        classifier: what tells harmful from benign replies.
        benign: requests whose replies, by the model itself, calibrate the threshold; others than those that
            the classifier was fitted to, and never test's.
        false_positive_rate: the share of replies to such requests that may be refused.
        num_calibration: so many of them, evenly spaced over the source; a reply each, when first asked, anew
            for each decoding.
        max_new_tokens: longest reply, greedy, that calibrates where a reply is given and none written, as an
            attack has it; the evaluation's own, so that both meet one threshold.
        within: the defence whose answers are judged, e.g. a filter of requests; null judges the model's
            own replies. What it stops is not judged again.
        refusal: the reply in place of what is flagged.

    Raises: ValueError where so few requests cannot hold the rate, with the smallest number that can.
    """

    name = "reply_filter"

    def __init__(
        self,
        classifier: Classifier,
        benign: ChatSource,
        false_positive_rate: Share = 0.05,
        num_calibration: Count = 200,
        max_new_tokens: Count = 64,
        within: Inner | None = None,
        refusal: str = DEFAULT_SAFE_REPLY,
    ) -> None:
        self.classifier = classifier
        self.benign = benign
        self.false_positive_rate = false_positive_rate
        self.num_calibration = num_calibration
        self.max_new_tokens = max_new_tokens
        self.within = within
        self.refusal = refusal
        self._threshold = Threshold(type(self).__name__, benign, false_positive_rate, num_calibration)

    def answers(
        self, model: LanguageModel, requests: Sequence[Request], decoding: Decoding, seed: int
    ) -> list[Answer]:
        """The reply, or the refusal in its place; either costs the whole reply and the classifier's pass."""
        given = self._inner.answers(model, requests, decoding, seed)
        return self._let_through(model, requests, given, decoding)

    def embedded(self, model: LanguageModel, prompts: Marked, decoding: Decoding, seed: int) -> list[Answer]:
        """The same where an attack enters as embeddings, which the classifier does not see: the reply is
        judged as one to the request before the attack. That a defence within was bypassed stays said."""
        given = Defended(model, self._inner).answers(prompts, decoding, seed)
        if self.within is None:
            given = [replace(own, bypassed=False) for own in given]
        return self._let_through(model, prompts.requests, given, decoding)

    def checks(
        self, model: LanguageModel, exchanges: Sequence[Exchange], decoding: Decoding | None = None
    ) -> list[Check]:
        """Log-odds beyond the threshold, in nats; a blank reply holds no harm and is not asked about.

        Args:
            decoding: how the replies were drawn; null takes greedy ones of `max_new_tokens`.
        """
        drawn = replace(decoding or Decoding(self.max_new_tokens), max_rows=ROWS_AT_ONCE)
        limit = self._threshold.of(model, partial(self._benign_scores, drawn), drawn)
        return self._checks(model, exchanges, limit)

    def seen_through(
        self, model: LanguageModel, requests: Sequence[Request], draws: int, seed: int
    ) -> list[list[Request]]:
        """What the defence within makes of a request; this one changes none."""
        return self._inner.seen_through(model, requests, draws, seed)

    def excesses(
        self, model: LanguageModel, requests: Sequence[Request], replies: Sequence[str]
    ) -> list[float] | None:
        """How far this reply to each request is beyond what is let through, here or within."""
        pairs = [Exchange(*own) for own in zip(requests, replies, strict=True)]
        own = [check.excess for check in self.checks(model, pairs)]
        inner = self._inner.excesses(model, requests, replies)
        return own if inner is None else [max(both) for both in zip(own, inner, strict=True)]

    @property
    def _inner(self) -> Inner:
        return self.within or _Alone()

    def _let_through(
        self,
        model: LanguageModel,
        requests: Sequence[Request],
        given: Sequence[Answer],
        decoding: Decoding,
    ) -> list[Answer]:
        found = list(given)
        open_ = [i for i, answer in enumerate(given) if not answer.stopped]
        checks = self.checks(model, [Exchange(requests[i], given[i].reply) for i in open_], decoding)
        for i, check in zip(open_, checks, strict=True):
            found[i] = replace(
                given[i],
                reply=self.refusal if check.flagged else given[i].reply,
                queries=given[i].queries + check.queries,
                tokens=given[i].tokens + check.tokens,
                stopped=check.flagged,
            )
        return found

    def _benign_scores(
        self, decoding: Decoding, model: LanguageModel, rows: Sequence[ChatRow]
    ) -> list[float]:
        requests = [request_of(row) for row in rows]
        given = self._inner.answers(model, requests, decoding, 0)
        pairs = [Exchange(request, own.reply) for request, own in zip(requests, given, strict=True)]
        return [check.excess for check in self._checks(model, pairs, 0.0)]

    def _checks(self, model: LanguageModel, exchanges: Sequence[Exchange], limit: float) -> list[Check]:
        found = [Check(-math.inf, 0, 0)] * len(exchanges)
        asked = [i for i, own in enumerate(exchanges) if own.reply is not None and own.reply.strip()]
        told = checked_by(self.classifier, model, [exchanges[i] for i in asked], limit)
        for i, check in zip(asked, told, strict=True):
            found[i] = check
        return found
