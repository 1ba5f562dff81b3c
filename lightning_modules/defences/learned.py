"""A learned filter of requests: what a classifier finds more harmful than benign is flagged.

    score(x) = log p(harmful | x) / p(benign | x),   flagged above a threshold that benign requests calibrate

Of a request its whole conversation is judged: earlier turns, text, document. Replies are judged by
reply_filter.py. `LinearProbe` is the project's own classifier, fitted when it is first asked, on training
rows: the same rows and weights give the same classifier; it reads the system message too, as the model does.
hub_classifier.py is any sequence classifier of transformers, which knows no chat and never sees the system
message.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal, Protocol
from weakref import WeakKeyDictionary

import torch
from jaxtyping import Float
from torch import Tensor, nn
from torch.nn.functional import softplus

from datamodules.batch import pad
from datamodules.fields import Count, NonNegativeInt, Positive, Share, checked
from datamodules.rows import ChatRow
from datamodules.sources.base import ChatSource, HarmfulSource
from lightning_modules.defences.base import ROWS_AT_ONCE
from lightning_modules.defences.calibrated import Threshold, Versions, rows_of, versions
from lightning_modules.defences.exchange import Exchange, replied, request_of
from lightning_modules.defences.filtered import Check
from lightning_modules.models.hidden_states import conversation_states, num_layers
from lightning_modules.models.language_model import LanguageModel
from lightning_modules.models.requests import Request

Reads = Literal["requests", "replies"]


class Classifier(Protocol):
    """How much more harmful than benign a conversation is, or its reply where it has one."""

    def log_odds(self, model: LanguageModel, exchanges: Sequence[Exchange]) -> list[float]:
        """log p(harmful) - log p(benign) of each."""
        ...

    def read(self, model: LanguageModel, exchanges: Sequence[Exchange]) -> list[int]:
        """Tokens that a model reads to tell it of each; 0 where none is asked."""
        ...


def checked_by(
    classifier: Classifier, model: LanguageModel, exchanges: Sequence[Exchange], limit: float
) -> list[Check]:
    """The log-odds' distance from a threshold, in nats, and what that cost."""
    scores, tokens = classifier.log_odds(model, exchanges), classifier.read(model, exchanges)
    return [Check(score - limit, int(count > 0), count) for score, count in zip(scores, tokens, strict=True)]


@checked
class LearnedFilter:
    """Flags requests that a classifier finds more harmful than all but a few benign ones.

    Args:
        classifier: what tells harmful from benign requests.
        benign: requests that calibrate the threshold; others than those that the classifier was fitted to,
            and never test's.
        false_positive_rate: the share of such requests that may be flagged.
        num_calibration: so many of them, evenly spaced over the source. They are judged as they are: their
            system messages, earlier turns and documents should be like those to come.

    Raises: ValueError where so few requests cannot hold the rate, with the smallest number that can.
    """

    name = "learned_filter"

    def __init__(
        self,
        classifier: Classifier,
        benign: ChatSource,
        false_positive_rate: Share = 0.05,
        num_calibration: Count = 500,
    ) -> None:
        self.classifier = classifier
        self.benign = benign
        self.false_positive_rate = false_positive_rate
        self.num_calibration = num_calibration
        self._threshold = Threshold(type(self).__name__, benign, false_positive_rate, num_calibration)

    def checks(self, model: LanguageModel, requests: Sequence[Request]) -> list[Check]:
        """The log-odds' distance from the threshold, in nats."""
        limit = self._threshold.of(model, self._benign_scores)
        return checked_by(self.classifier, model, [Exchange(request) for request in requests], limit)

    def _benign_scores(self, model: LanguageModel, rows: Sequence[ChatRow]) -> list[float]:
        return self.classifier.log_odds(model, [Exchange(request_of(row)) for row in rows])


@checked
class LinearProbe:
    """Logistic regression on what the model behind the filter makes of a conversation, after one of its
    layers: its state at the prompt's last token, or the mean of its states at a reply's tokens. Fitted to
    training rows when it is first asked, anew for other weights.

        min_w  mean_harmful softplus(-s) + mean_benign softplus(s) + l2/2 |w|^2,   s = w . (x - m) / d + b

    with m and d the mean and the deviation of each coordinate. Convex, so that no seed matters; both kinds
    weigh alike, so that s is the log-odds at equal shares. Of replies, harmful are the targets of the harmful
    rows; benign are the replies of the benign rows and the safe replies to the harmful ones: a refusal is no
    harm, whatever it was asked for.

    Args:
        harmful: requests to refuse, of the training data.
        benign: requests to answer, of the training data; some should look harmful.
        layer: counted from 0; null takes the middle one.
        num_fit: so many rows of each source, at most, evenly spaced.
        l2: weight of the penalty.
        reads: `requests` for a learned filter, `replies` for a reply filter.
    """

    def __init__(
        self,
        harmful: HarmfulSource,
        benign: ChatSource,
        layer: NonNegativeInt | None = None,
        num_fit: Count = 1000,
        l2: Positive = 0.01,
        reads: Reads = "requests",
    ) -> None:
        self.harmful, self.benign = harmful, benign
        self.layer = layer
        self.num_fit = num_fit
        self.l2 = l2
        self.reads: Reads = reads
        self._fitted: WeakKeyDictionary[nn.Module, tuple[Versions, Line]] = WeakKeyDictionary()

    def log_odds(self, model: LanguageModel, exchanges: Sequence[Exchange]) -> list[float]:
        """One forward pass each. Raises: ValueError where a source has no row, or one without a reply where
        replies are read; for a layer that the model does not have; where requests are asked about and replies
        are read, or the other way round."""
        asked = {"requests" if own.reply is None else "replies" for own in exchanges}
        if asked - {self.reads}:
            raise ValueError(
                f"LinearProbe.reads: expected {asked.pop()} for this filter, got {self.reads}; set the other"
            )
        return self._line(model)(self.states(model, exchanges)).tolist() if exchanges else []

    def read(self, model: LanguageModel, exchanges: Sequence[Exchange]) -> list[int]:
        """The whole conversation."""
        return [sum(map(len, own.ids(model.chat))) for own in exchanges]

    @torch.no_grad()
    def states(self, model: LanguageModel, exchanges: Sequence[Exchange]) -> Float[Tensor, "exchange dim"]:
        """What it sees of each conversation, in float64 on the CPU."""
        count, found = num_layers(model), list[Tensor]()
        layer = count // 2 if self.layer is None else self.layer
        if layer >= count:
            raise ValueError(f"LinearProbe.layer: expected at most {count - 1}, got {layer}; lower it")
        with model.frozen():
            for start in range(0, len(exchanges), ROWS_AT_ONCE):
                parts = [own.ids(model.chat) for own in exchanges[start : start + ROWS_AT_ONCE]]
                ids, mask = (own.to(model.device) for own in pad([one + two for one, two in parts], "left"))
                (states,) = conversation_states(model, ids, mask, [layer])
                # A prompt's last token, or all of the reply.
                found += [
                    own[-max(1, len(reply)) :].double().mean(0).cpu()
                    for own, (_, reply) in zip(states, parts, strict=True)
                ]
        return torch.stack(found)

    def _line(self, model: LanguageModel) -> Line:
        weights = versions(model)
        known = self._fitted.get(model.module)
        if known is None or known[0] != weights:
            harmful, benign = (self.states(model, own) for own in self._examples())
            known = weights, fitted(harmful, benign, self.l2)
            self._fitted[model.module] = known
        return known[1]

    def _examples(self) -> tuple[list[Exchange], list[Exchange]]:
        """Harmful and benign conversations of the training rows."""
        harmful, benign = rows_of(self.harmful, self.num_fit), rows_of(self.benign, self.num_fit)
        if not harmful or not benign:
            raise ValueError("LinearProbe: expected rows of both kinds, got none of one")
        if self.reads == "requests":
            return [Exchange(request_of(row)) for row in harmful], [
                Exchange(request_of(row)) for row in benign
            ]
        return (
            [replied(row, row.target) for row in harmful],
            [replied(row, row.reply) for row in benign] + [replied(row, row.safe_reply) for row in harmful],
        )


@dataclass(frozen=True)
class Line:
    """s = w . (x - m) / d + b."""

    mean: Float[Tensor, " dim"]
    scale: Float[Tensor, " dim"]
    weight: Float[Tensor, " dim"]
    bias: Float[Tensor, ""]

    def __call__(self, states: Float[Tensor, "text dim"]) -> Float[Tensor, " text"]:
        return (states - self.mean) / self.scale @ self.weight + self.bias


def fitted(harmful: Float[Tensor, "text dim"], benign: Float[Tensor, "text dim"], l2: float) -> Line:
    """The regression's minimum, by L-BFGS in float64."""
    both = torch.cat([harmful, benign]).double()
    mean, scale = both.mean(0), both.std(0, correction=0)
    # A coordinate that is the same in all requests tells nothing, whatever it is elsewhere.
    scale = torch.where(scale > 1e-9, scale, torch.inf)
    weight = torch.zeros(both.shape[1], dtype=torch.float64, requires_grad=True)
    bias = torch.zeros((), dtype=torch.float64, requires_grad=True)
    line = Line(mean, scale, weight, bias)
    search = torch.optim.LBFGS(
        [weight, bias], max_iter=500, tolerance_grad=1e-7, line_search_fn="strong_wolfe"
    )

    def loss() -> Tensor:
        search.zero_grad()
        fit = softplus(-line(harmful.double())).mean() + softplus(line(benign.double())).mean()
        total = fit + 0.5 * l2 * weight.square().sum()
        total.backward()  # type: ignore[no-untyped-call]
        return total

    with torch.enable_grad():
        search.step(loss)  # type: ignore[no-untyped-call]
    return Line(mean, scale, weight.detach(), bias.detach())
