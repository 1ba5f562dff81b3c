"""A learned filter: requests that a classifier finds more harmful than it finds benign ones are flagged.

    score(x) = log p(harmful | x) / p(benign | x),   flagged above a threshold that benign requests calibrate

`LinearProbe` is the project's own, fitted when it is first asked, on training requests: the same rows and
weights give the same classifier. hub_classifier.py is
any sequence classifier of transformers.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol
from weakref import WeakKeyDictionary

import torch
from jaxtyping import Float
from torch import Tensor, nn
from torch.nn.functional import softplus

from datamodules.batch import pad
from datamodules.fields import Count, NonNegativeInt, Positive, Share, checked
from datamodules.sources.base import ChatSource, HarmfulSource
from lightning_modules.defences.base import ROWS_AT_ONCE
from lightning_modules.defences.calibrated import Threshold, Versions, texts_of, versions
from lightning_modules.defences.filtered import Check
from lightning_modules.models.hidden_states import conversation_states, num_layers
from lightning_modules.models.language_model import LanguageModel
from lightning_modules.models.requests import Request


class Classifier(Protocol):
    """How much more harmful than benign a request is."""

    def log_odds(self, model: LanguageModel, texts: Sequence[str]) -> list[float]:
        """log p(harmful) - log p(benign) of every text."""
        ...

    def read(self, model: LanguageModel, texts: Sequence[str]) -> list[int]:
        """Tokens that a model reads to tell it of every text; 0 where none is asked."""
        ...


@checked
class LearnedFilter:
    """Flags requests that a classifier finds more harmful than all but a few benign ones.

    Args:
        classifier: what tells harmful from benign requests.
        benign: requests that calibrate the threshold; others than those that the classifier was fitted to,
            and never test's.
        false_positive_rate: the share of such requests that may be flagged.
        num_calibration: so many of them.

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
        limit = self._threshold.of(model, self.classifier.log_odds)
        texts = [request.text for request in requests]
        scores, tokens = self.classifier.log_odds(model, texts), self.classifier.read(model, texts)
        return [
            Check(score - limit, int(count > 0), count) for score, count in zip(scores, tokens, strict=True)
        ]


@checked
class LinearProbe:
    """Logistic regression on the state of the model behind the filter, after one of its layers, at the
    prompt's last token; fitted to training requests when it is first asked, anew for other weights.

        min_w  mean_harmful softplus(-s) + mean_benign softplus(s) + l2/2 |w|^2,   s = w . (x - m) / d + b

    with m and d the mean and the deviation of each coordinate. Convex, so that no seed matters; both kinds
    weigh alike, so that s is the log-odds at equal shares.

    Args:
        harmful: requests to refuse, of the training data.
        benign: requests to answer, of the training data; some should look harmful.
        layer: counted from 0; null takes the middle one.
        num_fit: so many requests of each kind, at most.
        l2: weight of the penalty.
    """

    def __init__(
        self,
        harmful: HarmfulSource,
        benign: ChatSource,
        layer: NonNegativeInt | None = None,
        num_fit: Count = 1000,
        l2: Positive = 0.01,
    ) -> None:
        self.harmful, self.benign = harmful, benign
        self.layer = layer
        self.num_fit = num_fit
        self.l2 = l2
        self._fitted: WeakKeyDictionary[nn.Module, tuple[Versions, Line]] = WeakKeyDictionary()

    def log_odds(self, model: LanguageModel, texts: Sequence[str]) -> list[float]:
        """One forward pass each. Raises: ValueError where a source has no request, or for a layer that the
        model does not have."""
        return self._line(model)(self.states(model, texts)).tolist() if texts else []

    def read(self, model: LanguageModel, texts: Sequence[str]) -> list[int]:
        """The whole prompt."""
        return [len(model.chat.prompt(text).ids) for text in texts]

    @torch.no_grad()
    def states(self, model: LanguageModel, texts: Sequence[str]) -> Float[Tensor, "text dim"]:
        """What it sees of each text, in float64 on the CPU."""
        count, found = num_layers(model), []
        layer = count // 2 if self.layer is None else self.layer
        if layer >= count:
            raise ValueError(f"LinearProbe.layer: expected at most {count - 1}, got {layer}; lower it")
        with model.frozen():
            for start in range(0, len(texts), ROWS_AT_ONCE):
                rows = [model.chat.prompt(text).ids for text in texts[start : start + ROWS_AT_ONCE]]
                ids, mask = (own.to(model.device) for own in pad(rows, "left"))
                (states,) = conversation_states(model, ids, mask, [layer])
                found.append(states[:, -1].double().cpu())
        return torch.cat(found)

    def _line(self, model: LanguageModel) -> Line:
        weights = versions(model)
        known = self._fitted.get(model.module)
        if known is None or known[0] != weights:
            kinds = [texts_of(source, self.num_fit) for source in (self.harmful, self.benign)]
            if not all(kinds):
                raise ValueError("LinearProbe: expected requests of both kinds, got none of one")
            harmful, benign = (self.states(model, texts) for texts in kinds)
            known = weights, fitted(harmful, benign, self.l2)
            self._fitted[model.module] = known
        return known[1]


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
