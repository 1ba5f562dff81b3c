"""A threshold that benign requests calibrate: of n of them, the ceil((n + 1)(1 - f))-th smallest score.

Another benign request of the same kind is then above it with probability at most f (split conformal; requests
of another kind have no such promise).
"""

from __future__ import annotations

import math
from collections.abc import Callable, Hashable, Sequence
from typing import TypeVar
from weakref import WeakKeyDictionary

from torch import nn

from datamodules.rows import ChatRow, Row, RowProblem
from datamodules.sources.base import ChatSource
from datamodules.sources.gather import Source, evenly
from lightning_modules.models.adapters import switches
from lightning_modules.models.language_model import LanguageModel

R = TypeVar("R", bound=Row)
Scores = Callable[[LanguageModel, Sequence[ChatRow]], list[float]]


class Threshold:
    """Found once for a model's weights and each kind of score, when it is first needed.

    Args:
        owner: the filter's name, for what errors say.
        benign: requests that calibrate it, of training or validation, never of test.
        false_positive_rate: the share of such requests that may be above it.
        num_calibration: so many of them, evenly spaced over the source.

    Raises: ValueError where so few requests cannot hold the rate, with the smallest number that can.
    """

    def __init__(
        self, owner: str, benign: ChatSource, false_positive_rate: float, num_calibration: int
    ) -> None:
        least = math.ceil(1 / false_positive_rate - 1 - 1e-9)
        if num_calibration < least:
            raise ValueError(
                f"{owner}.num_calibration: expected at least {least} for a false-positive rate of "
                f"{false_positive_rate}, got {num_calibration}; raise one of them"
            )
        self._owner = owner
        self._benign = benign
        self._rate = false_positive_rate
        self._count = num_calibration
        self._known: WeakKeyDictionary[nn.Module, tuple[Versions, dict[Hashable, float]]] = (
            WeakKeyDictionary()
        )

    def of(self, model: LanguageModel, scores: Scores, kind: Hashable = None) -> float:
        """The threshold of these scores; those of another kind have one of their own. Raises: ValueError
        where the source has fewer requests than were asked for."""
        weights = versions(model)
        known = self._known.get(model.module)
        if known is None or known[0] != weights:
            known = self._known[model.module] = weights, {}
        if kind not in known[1]:
            rows = rows_of(self._benign, self._count)
            if len(rows) < self._count:
                raise ValueError(
                    f"{self._owner}.num_calibration: expected at most the {len(rows)} requests of the "
                    f"source, got {self._count}; lower it"
                )
            known[1][kind] = conformal_threshold(scores(model, rows), self._rate)
        return known[1][kind]


Versions = tuple[object, ...]


def versions(model: LanguageModel) -> Versions:
    """What tells cheaply that the model computes something else: how often each weight was written in place
    and its dtype, and which adapters are on. A fused optimiser counts no writes: calibrate after training."""
    weights = [(p._version, p.dtype) for p in model.module.parameters()]
    return (*weights, *switches(model.module))


def conformal_threshold(scores: Sequence[float], false_positive_rate: float) -> float:
    """The ceil((n + 1)(1 - f))-th smallest of n scores."""
    rank = math.ceil((len(scores) + 1) * (1 - false_positive_rate) - 1e-9)
    return sorted(scores)[max(rank, 1) - 1]


def rows_of(source: Source[R], limit: int) -> list[R]:
    """So many rows of a source, evenly spaced, so that they span one that is sorted; all of a smaller one. It
    is read twice, since a large one should not be held.

    Raises: ValueError naming a chosen row that cannot be read.
    """
    chosen = set(evenly(range(sum(1 for _ in source.rows())), limit))
    found = []
    for number, row in enumerate(source.rows()):
        if number not in chosen:
            continue
        if isinstance(row, RowProblem):
            raise ValueError(f"{row}; mend the row, or take another source")
        found.append(row)
    return found
