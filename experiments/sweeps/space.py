"""Parameters of a sweep as Optuna's distributions, and back: what is drawn as values of the configuration.

Distributions as Weights & Biases names and defines them. Values of a list are told apart by their JSON text,
so that they may be lists and mappings; normal ones are drawn through their quantiles between 0.1 and 99.9 %.
"""

from __future__ import annotations

import itertools
import json
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from optuna import Trial
from optuna.distributions import CategoricalDistribution, FloatDistribution, IntDistribution
from scipy.stats import norm

from experiments.config.errors import ConfigError
from experiments.studies.reading import known, made
from experiments.sweeps.definition import Parameter, Sweep

Raw = float | int | str
Distribution = CategoricalDistribution | FloatDistribution | IntDistribution
TAIL = 1e-3


@dataclass(frozen=True)
class Dimension:
    """One parameter that varies.

    Args:
        key: dotted key of the configuration.
        distribution: what Optuna draws from.
        value: what is drawn -> value of the configuration.
        grid: everything that can be drawn, in order; None where that is a continuum.
    """

    key: str
    distribution: Distribution
    value: Callable[[Any], Any]
    grid: Sequence[Raw] | None = None

    def suggest(self, trial: Trial) -> Raw:
        """What this trial has drawn; drawn now where it has not."""
        own = self.distribution
        if isinstance(own, CategoricalDistribution):
            return trial.suggest_categorical(self.key, own.choices)  # type: ignore[return-value]
        if isinstance(own, IntDistribution):
            return trial.suggest_int(self.key, own.low, own.high, step=own.step, log=own.log)
        return trial.suggest_float(self.key, own.low, own.high, step=own.step, log=own.log)

    def extremes(self) -> list[Raw]:
        """The values that a configuration has to bear: each of a list, the ends of a range."""
        own = self.distribution
        if isinstance(own, CategoricalDistribution):
            return list(own.choices)  # type: ignore[arg-type]
        return [own.low, own.high]

    def text(self) -> str:
        """As a reader sees it."""
        values = [json.dumps(self.value(raw)) for raw in self.extremes()]
        joined = ", " if isinstance(self.distribution, CategoricalDistribution) else " to "
        return f"{self.key}: {joined.join(values)}"


@dataclass(frozen=True)
class Space:
    """All parameters of a sweep."""

    constants: Mapping[str, Any]
    dimensions: Sequence[Dimension]

    def values(self, raw: Mapping[str, Any]) -> dict[str, Any]:
        """Dotted key -> value of one trial, constants first."""
        return {**self.constants, **{own.key: own.value(raw[own.key]) for own in self.dimensions}}

    def grid(self) -> list[dict[str, Raw]]:
        """All combinations, the last parameter changing fastest."""
        keys = [own.key for own in self.dimensions]
        return [
            dict(zip(keys, point, strict=True))
            for point in itertools.product(*(own.grid or () for own in self.dimensions))
        ]

    def corners(self) -> list[dict[str, Raw]]:
        """Points that together hold every extreme of every parameter, the others at their first."""
        first = {own.key: own.extremes()[0] for own in self.dimensions}
        found = [first]
        for own in self.dimensions:
            found += [{**first, own.key: value} for value in own.extremes()[1:]]
        return found


def space_of(sweep: Sweep) -> Space:
    """Raises: ConfigError naming the parameter."""
    constants: dict[str, Any] = {}
    dimensions = []
    for key, node in sweep.parameters.items():
        place = f"parameters.{key}"
        if isinstance(node, Mapping) and "parameters" in node:
            raise ConfigError(f"{place}.parameters: nested parameters are not known; write dotted keys")
        parameter = made(Parameter, node, {}, place)
        if "value" in node:
            _only(node, {"value", "distribution"}, place)
            constants[key] = parameter.value
            continue
        own = _dimension(key, parameter, node)
        if sweep.method == "grid" and own.grid is None:
            raise ConfigError(f"{place}: expected values, or integers between min and max, for a grid")
        dimensions.append(own)
    if not dimensions:
        raise ConfigError("parameters: expected one that varies, got constants alone")
    return Space(constants, dimensions)


def _only(node: Mapping[str, Any], allowed: set[str], place: str) -> None:
    for name in node:
        if name not in allowed:
            raise ConfigError(f"{place}.{name}: does not go with {', '.join(sorted(allowed & node.keys()))}")


def _dimension(key: str, own: Parameter, node: Mapping[str, Any]) -> Dimension:
    place = f"parameters.{key}"
    if own.values is not None:
        _only(node, {"values", "distribution"}, place)
        texts = [json.dumps(value) for value in own.values]
        if not texts or len({*texts}) < len(texts):
            raise ConfigError(f"{place}.values: expected different values, got {own.values!r:.60}")
        return Dimension(key, CategoricalDistribution(texts), json.loads, texts)
    whole = isinstance(own.min, int) and isinstance(own.max, int)
    kind = own.distribution or ("int_uniform" if whole else "uniform")
    known(kind, [*RANGES, *NORMAL], f"{place}.distribution")
    if kind in NORMAL:
        _only(node, {"distribution", "mu", "sigma", *(["q"] if kind.startswith("q_") else [])}, place)
        return Dimension(key, FloatDistribution(TAIL, 1 - TAIL), _Normal(own, kind))
    _only(node, {"distribution", "min", "max", *(["q"] if kind.startswith("q_") else [])}, place)
    if own.min is None or own.max is None:
        raise ConfigError(f"{place}: expected min and max, or value, or values")
    if own.min >= own.max:
        raise ConfigError(f"{place}: expected min below max, got {own.min} and {own.max}")
    try:
        return RANGES[kind](key, own.min, own.max, own.q or 1)
    except ConfigError as error:
        raise ConfigError(f"{place}: {error}") from error


def _uniform(key: str, low: float, high: float, q: float) -> Dimension:
    return Dimension(key, FloatDistribution(low, high), float)


def _int_uniform(key: str, low: float, high: float, q: float) -> Dimension:
    if not (isinstance(low, int) and isinstance(high, int)):
        raise ConfigError(f"expected integers as min and max, got {low} and {high}")
    return Dimension(key, IntDistribution(low, high), int, range(low, high + 1))


def _q_uniform(key: str, low: float, high: float, q: float) -> Dimension:
    """Multiples of q, counted: steps of a float add up to its neighbours."""
    first, last = low / q, high / q
    if any(abs(end - round(end)) > 1e-9 for end in (first, last)):
        raise ConfigError(f"expected multiples of q ({q}) as min and max, got {low} and {high}")
    counts = range(round(first), round(last) + 1)
    return Dimension(key, IntDistribution(counts[0], counts[-1]), _Multiple(q), counts)


def _log_values(key: str, low: float, high: float, q: float) -> Dimension:
    if low <= 0:
        raise ConfigError(f"expected min above 0 for a logarithmic distribution, got {low}")
    return Dimension(key, FloatDistribution(low, high, log=True), float)


def _q_log_values(key: str, low: float, high: float, q: float) -> Dimension:
    return Dimension(key, _log_values(key, low, high, q).distribution, _Rounded(q))


def _log_exponents(key: str, low: float, high: float, q: float) -> Dimension:
    return _log_values(key, math.exp(low), math.exp(high), q)


RANGES: dict[str, Callable[[str, float, float, float], Dimension]] = {
    "uniform": _uniform,
    "int_uniform": _int_uniform,
    "q_uniform": _q_uniform,
    "log_uniform_values": _log_values,
    "q_log_uniform_values": _q_log_values,
    "inv_log_uniform_values": _log_values,
    "log_uniform": _log_exponents,
}
"""Those between min and max. The logarithm of an inverse is as even as that of the value itself."""
NORMAL = ("normal", "log_normal", "q_normal", "q_log_normal")


@dataclass(frozen=True)
class _Multiple:
    q: float

    def __call__(self, count: int) -> float:
        return count * self.q if isinstance(self.q, int) else round(count * self.q, 12)


@dataclass(frozen=True)
class _Rounded:
    """To the next multiple of q."""

    q: float

    def __call__(self, value: float) -> float:
        return _Multiple(self.q)(round(value / self.q))


@dataclass(frozen=True)
class _Normal:
    """A quantile -> the value there."""

    own: Parameter
    kind: str

    def __call__(self, quantile: float) -> float:
        sigma = 1.0 if self.own.sigma is None else self.own.sigma
        value = float(norm.ppf(quantile, self.own.mu or 0.0, sigma))
        value = math.exp(value) if "log" in self.kind else value
        return _Rounded(self.own.q or 1)(value) if self.kind.startswith("q_") else value
