"""How a judge of several classes agrees with people's labels: accuracy, Cohen's kappa, and by class precision
and recall."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray
from scipy.stats import bootstrap

from callbacks.metrics.estimates import Estimate, rate

RESAMPLES, SEED = 4999, 0
RELIABLE = 0.7
"""Precision and recall below which a class's figures are called unreliable."""


@dataclass(frozen=True)
class ClassAgreement:
    """Classes that a judge gave against those that people gave."""

    n: int
    accuracy: Estimate
    kappa: Estimate
    """Cohen's over all classes, with a 95 % percentile bootstrap interval; NaN where it is not defined."""
    precision: Mapping[str, Estimate]
    """By label; NaN where the judge never gives it."""
    recall: Mapping[str, Estimate]
    """By label; NaN where people never give it."""

    @property
    def unreliable(self) -> list[str]:
        """Labels of which the judge finds too few, or is right too seldom."""
        return [
            name
            for name in self.precision
            if not min(self.precision[name].value, self.recall[name].value) >= RELIABLE
        ]


def class_agreement(given: Sequence[str], labels: Sequence[str], classes: Sequence[str]) -> ClassAgreement:
    """Agreement over replies of which each has one class of either.

    Args:
        given: what the judge says.
        labels: what people say.
        classes: every class there is.
    """
    pairs = list(zip(given, labels, strict=True))
    return ClassAgreement(
        n=len(pairs),
        accuracy=rate([own == label for own, label in pairs]),
        kappa=class_kappa(given, labels),
        precision={c: rate([label == c for own, label in pairs if own == c]) for c in classes},
        recall={c: rate([own == c for own, label in pairs if label == c]) for c in classes},
    )


def class_kappa(given: Sequence[str], labels: Sequence[str]) -> Estimate:
    """Cohen's kappa (1960) over any number of classes: (observed - expected) / (1 - expected), where expected
    is the sum over classes of the product of both shares. NaN where both are constant and alike, or n < 2."""
    codes = {name: i for i, name in enumerate(sorted({*given, *labels}))}
    pair = np.array([codes[name] for name in given]), np.array([codes[name] for name in labels])
    n = len(given)

    def value(one: NDArray[Any], other: NDArray[Any], axis: int = -1) -> NDArray[Any]:
        observed = (one == other).mean(axis)
        expected = sum((one == i).mean(axis) * (other == i).mean(axis) for i in codes.values())
        with np.errstate(invalid="ignore", divide="ignore"):
            return np.asarray((observed - expected) / (1 - expected))

    centre = float(value(*pair)) if n > 1 else float("nan")
    if np.isnan(centre):
        return Estimate(centre, centre, centre, n, "mean")
    found = bootstrap(
        # A resample in which all are of one class, and agree, says nothing against full agreement.
        pair, lambda a, b, axis=-1: np.nan_to_num(value(a, b, axis), nan=1.0), paired=True, vectorized=True,
        n_resamples=RESAMPLES, batch=500, method="percentile", rng=np.random.default_rng(SEED),
    ).confidence_interval  # fmt: skip
    return Estimate(centre, float(found.low), float(found.high), n, "mean")
