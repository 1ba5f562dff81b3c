"""Parameters of a sweep as Optuna's distributions, and back: what is drawn as values of the configuration.

Distributions as Weights & Biases names and defines them. Values of a list are told apart by their JSON text,
so that they may be lists and mappings; normal ones are drawn through their quantiles between 0.1 and 99.9 %.
"""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from optuna import Trial
from optuna.distributions import CategoricalDistribution, FloatDistribution, IntDistribution
from scipy.stats import norm

from experiments.config.errors import ConfigError
from experiments.studies.reading import known, made
from experiments.sweeps.conditions import Condition, conditions_of, in_order
from experiments.sweeps.definition import Parameter, Sweep

Raw = float | int | str
Distribution = CategoricalDistribution | FloatDistribution | IntDistribution
TAIL = 1e-3
MOST_STEPS = 10**12
"""Between the ends of a range that is counted."""


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
    """All parameters of a sweep.

    Args:
        constants: dotted key -> value of those that do not vary.
        dimensions: the others. Both stand behind those that decide whether they exist.
        conditions: dotted key -> when that parameter exists; the others always do.
    """

    constants: Mapping[str, Any]
    dimensions: Sequence[Dimension]
    conditions: Mapping[str, Condition] = field(default_factory=dict)

    def exists(self, key: str, raw: Mapping[str, Any]) -> bool:
        """Whether a point that holds the parameters before this one has it."""
        return key not in self.conditions or self.conditions[key].holds(self.values(raw))

    def values(self, raw: Mapping[str, Any]) -> dict[str, Any]:
        """Dotted key -> value of one trial, in an order in which they can be set: a field of a class would be
        lost to the class that came after it."""
        found = {own.key: own.value(raw[own.key]) for own in self.dimensions if own.key in raw}
        for key, value in self.constants.items():
            if key not in self.conditions or self.conditions[key].holds(found):
                found[key] = value
        return dict(sorted(found.items(), key=lambda item: item[0].count(".")))

    def whole(self, raw: Mapping[str, Any]) -> bool:
        """Whether a point holds every parameter that it has; a kill may have come before all were drawn."""
        return all(own.key in raw or not self.exists(own.key, raw) for own in self.dimensions)

    def grid(self, only: Collection[str] | None = None) -> Iterator[dict[str, Raw]]:
        """All combinations (of some of the parameters), the last parameter changing fastest."""
        yield from self._combined([own for own in self.dimensions if only is None or own.key in only], {})

    def _combined(self, left: Sequence[Dimension], raw: dict[str, Raw]) -> Iterator[dict[str, Raw]]:
        if not left:
            yield raw
            return
        own, *others = left
        if not self.exists(own.key, raw):
            yield from self._combined(others, raw)
            return
        for value in own.grid or ():
            yield from self._combined(others, {**raw, own.key: value})

    def size(self) -> int:
        """How many points the grid has."""
        deciding = {other for own in self.conditions.values() for other in own.needs}
        free = [own for own in self.dimensions if own.key not in deciding]
        return sum(
            math.prod(len(own.grid or ()) for own in free if self.exists(own.key, point))
            for point in self.grid(deciding)
        )

    def point(self, wanted: Mapping[str, Raw]) -> dict[str, Raw]:
        """A point with the wanted values, where they exist, and the first of every other parameter."""
        found: dict[str, Raw] = {}
        for own in self.dimensions:
            if self.exists(own.key, found):
                found[own.key] = wanted.get(own.key, own.extremes()[0])
        return found

    def corners(self, own: Dimension) -> list[dict[str, Raw]]:
        """A point for every extreme of a parameter. Raises: ConfigError where there is none that has it."""
        needed = self._needed(own.key)
        found = [self.point({**needed, own.key: value}) for value in own.extremes()]
        if own.key not in found[0]:
            raise ConfigError(f"conditions.{own.key}: no trial fulfils it, with those that it depends on")
        return found

    def _needed(self, key: str) -> dict[str, Raw]:
        """Values with which a parameter exists."""
        found: dict[str, Raw] = {}
        for other, allowed in self.conditions[key].needs.items() if key in self.conditions else ():
            found |= {**self._needed(other), other: allowed[0]}
        return found


def space_of(sweep: Sweep) -> Space:
    """Raises: ConfigError naming the parameter."""
    constants: dict[str, Any] = {}
    dimensions = []
    for key, node in sweep.parameters.items():
        place = f"parameters.{key}"
        if not isinstance(node, Mapping):
            raise ConfigError(
                f"{place}: expected values, value, min and max or a distribution, got {node!r:.60}"
            )
        if "parameters" in node:
            raise ConfigError(f"{place}.parameters: nested parameters are not known; write dotted keys")
        parameter = made(Parameter, node, {}, place)
        if "values" in node and not isinstance(parameter.values, list):
            raise ConfigError(f"{place}.values: expected a list, got {parameter.values!r:.60}")
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
    conditions = conditions_of(sweep.conditions, sweep.parameters)
    order = in_order([*sweep.parameters], conditions)
    constants = {key: constants[key] for key in order if key in constants}
    return Space(constants, sorted(dimensions, key=lambda own: order.index(own.key)), conditions)


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
    _countable(high - low)
    return Dimension(key, IntDistribution(low, high), int, range(low, high + 1))


def _countable(steps: float) -> None:
    if steps > MOST_STEPS:
        raise ConfigError(f"expected at most {MOST_STEPS} steps between min and max, got {steps:.3g}")


def _q_uniform(key: str, low: float, high: float, q: float) -> Dimension:
    """Multiples of q, counted: steps of a float add up to its neighbours."""
    first, last = low / q, high / q
    if any(abs(end - round(end)) > 1e-9 for end in (first, last)):
        raise ConfigError(f"expected multiples of q ({q}) as min and max, got {low} and {high}")
    _countable(last - first)
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
