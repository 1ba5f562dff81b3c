"""What a sweep is, read from its YAML: Weights & Biases' sweep format, and beside it our own keys.

    method: bayes                            # grid, random or bayes
    run_cap: 24
    metric: {name: eval/harmful/embedding/success_rate, goal: minimize}
    parameters:
      model.attack.epsilon: {min: 0.05, max: 0.2}
      model.optimizer.lr: {distribution: log_uniform_values, min: 1.0e-4, max: 1.0e-3}
      seed_everything: {value: 0}
    # Ours:
    conditions:                                         # elsewhere it is neither drawn nor set
      model.attack.num_steps: {model.attack: [EmbeddingPGD]}
    config: [configs/experiment/cat_tinychat.yaml]      # as `thundercat fit --config` takes them
    test: [configs/data/tinychat_test.yaml]             # on top, where the best trial is evaluated on test
    columns:
      embedding: {quantity: success_rate, subject: harmful, attack: embedding}
      utility: {quantity: exact_match, subject: utility}
    constraints:
      - {column: utility, falls_at_most: 0.03}          # against the same before training
    figures: [{x: utility, y: embedding}]
    keep: 3                                             # trials that keep model and checkpoints
    trial_minutes: 30                                   # one that runs for longer has failed
    retries: 1                                          # how often one that fails is begun again

A parameter is any dotted key of the configuration. `metric.name` is what the loggers call one of the columns.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, fields
from pathlib import Path
from typing import Annotated, Any, Literal

from annotated_types import Gt

from datamodules.fields import Count, NonNegative, NonNegativeInt, Positive, checked
from experiments.config.errors import ConfigError
from experiments.config.files import find, read
from experiments.studies.definition import Column, TradeOff, check_columns
from experiments.studies.reading import known, made

STAGE = "eval"
"""What loggers put in front of what `fit` has measured."""
BOUNDS = ("at_least", "at_most", "falls_at_most", "rises_at_most")
"""What a constraint can ask for."""
RATES = ("_rate", "exact_match", "accuracy", "_at_1", "_at_k")
"""Ends of the quantities that are shares of examples."""
OWN = {
    "trainer.default_root_dir": "folders are the sweep's; use --runs",
    "ckpt_path": "a trial goes on with its own checkpoint by itself",
}
"""What a sweep says by itself on every command line."""
WANDB = {"program", "command", "name", "description", "project", "entity"}
WANDB |= {"method", "metric", "parameters", "early_terminate", "run_cap"}
"""Top-level keys of Weights & Biases' format that we know."""


@checked
@dataclass(frozen=True)
class Objective:
    """What the best trial is best in."""

    name: str
    """The column, as loggers call it: `eval/harmful/embedding/success_rate`."""
    goal: Literal["minimize", "maximize"] = "minimize"
    target: float | None = None
    """No further trial is begun once one that keeps the constraints has reached it."""


@checked
@dataclass(frozen=True)
class Parameter:
    """What one field of the configuration may be (space.py says which fields belong together)."""

    value: Any = None
    values: list[Any] | None = None
    min: float | None = None
    max: float | None = None
    distribution: str | None = None
    q: Positive | None = None
    mu: float | None = None
    sigma: Positive | None = None


@checked
@dataclass(frozen=True)
class EarlyTermination:
    """Trials that lag behind at their periodic evaluations are ended, by successive halving in brackets."""

    type: Literal["hyperband"]
    min_iter: Count | None = None
    """The first evaluation (of those after the start) at which trials are compared."""
    max_iter: Count | None = None
    """The last one; with `s`, the first is max_iter / eta^s."""
    s: Count | None = None
    eta: Annotated[int, Gt(1)] = 3
    """One of so many goes on."""

    @property
    def first(self) -> int:
        if self.min_iter is not None:
            return self.min_iter
        return max(1, int((self.max_iter or 1) / self.eta ** (self.s or 0)))


DIGITS = 9
"""Of what breaks a constraint."""


def is_broken(excess: float) -> bool:
    """Of a constraint's excess, also of one that was written down unrounded."""
    return round(excess, DIGITS) > 0


@checked
@dataclass(frozen=True)
class Constraint:
    """What a trial must keep on validation to be chosen; values as the column has them (a rate: 0 to 1)."""

    column: str
    at_least: float | None = None
    at_most: float | None = None
    falls_at_most: NonNegative | None = None
    """Below its value before training, which the evaluation has to measure (`schedule.at_start`)."""
    rises_at_most: NonNegative | None = None

    @property
    def against_start(self) -> bool:
        return self.falls_at_most is not None or self.rises_at_most is not None

    @property
    def text(self) -> str:
        """As a reader sees it."""
        own = {own.name: getattr(self, own.name) for own in fields(self) if own.name != "column"}
        said = [f"{name.replace('_', ' ')} {value:g}" for name, value in own.items() if value is not None]
        return f"{self.column} {', '.join(said)}"

    def excess(self, before: float | None, after: float) -> float:
        """How far it is broken, in the column's units; 0 or less where it is kept."""
        found = []
        if self.at_least is not None:
            found.append(self.at_least - after)
        if self.at_most is not None:
            found.append(after - self.at_most)
        if before is not None and self.falls_at_most is not None:
            found.append(before - after - self.falls_at_most)
        if before is not None and self.rises_at_most is not None:
            found.append(after - before - self.rises_at_most)
        # 0.97 - 0.94 - 0.03 is 3e-17: as far as is allowed is not too far.
        return round(max(found), DIGITS)


@checked
@dataclass(frozen=True)
class Sweep:
    """A sweep; see the module's text."""

    method: Literal["grid", "random", "bayes"]
    metric: Objective
    parameters: dict[str, Any]
    """Dotted key -> Parameter, as the YAML gives it."""
    config: list[str]
    columns: dict[str, Column]
    test: list[str] = field(default_factory=list)
    constraints: list[Constraint] = field(default_factory=list)
    conditions: dict[str, Any] = field(default_factory=dict)
    """Parameter -> the values of others where it exists (conditions.py)."""
    figures: list[TradeOff] = field(default_factory=list)
    """One column against another, a point a trial, with the Pareto front of the two."""
    early_terminate: EarlyTermination | None = None
    run_cap: Count | None = None
    """Trials in all; a grid is complete without."""
    keep: Count | None = None
    """How many of the best trials keep model and checkpoints; null keeps all."""
    trial_minutes: Positive | None = None
    """A trial that runs for longer is ended and has failed. Counted from its start, a job's from when it was
    submitted, and anew where it is taken up again."""
    retries: NonNegativeInt = 0
    """How often a trial that fails is begun again, from its last checkpoint."""
    seed: NonNegativeInt = 0
    """Of the search; a trial's own seed is the parameter `seed_everything`."""
    name: str = ""
    description: str = ""
    slurm: dict[str, Any] = field(default_factory=dict)
    """Parameters of submitit's executor: timeout_min, slurm_partition, gpus_per_node, ...; `cluster: local`
    runs its jobs on this machine, without Slurm."""
    ray: dict[str, Any] = field(default_factory=dict)
    """A trial's share of a Ray cluster: num_cpus, num_gpus (a part of one, too), memory, resources."""
    # For `wandb sweep` alone.
    program: str | None = None
    command: list[str] | None = None
    project: str | None = None
    entity: str | None = None

    @property
    def objective(self) -> str:
        """The column that is the metric."""
        return next(label for label, own in self.columns.items() if logged(own) == self.metric.name)


def logged(column: Column) -> str:
    """What loggers call a column inside `fit`."""
    return f"{STAGE}/{column.metric.key}"


MAPPINGS = ("parameters", "conditions", "slurm", "ray")
"""Fields whose content is told elsewhere."""
NESTED: dict[str, type] = {
    "metric": Objective,
    "columns": Column,
    "constraints": Constraint,
    "figures": TradeOff,
    "early_terminate": EarlyTermination,
}


def load_sweep(path: str | Path) -> Sweep:
    """Raises: ConfigError naming the file and the field that is wrong."""
    node = read(find(str(path), None, "sweep"))
    try:
        for name in MAPPINGS:
            _check_mapping(node.get(name) or {}, name)
        sweep = made(Sweep, node, NESTED)
        _check(sweep, node)
    except ConfigError as error:
        raise ConfigError(f"{path}: {error}") from error
    return sweep


def _check_mapping(node: Any, place: str) -> None:
    if not isinstance(node, Mapping):
        raise ConfigError(f"{place}: expected names with fields, got {node!r:.60}")
    for key in node:
        if not isinstance(key, str) or not key:
            raise ConfigError(f"{place}: expected a name, got {key!r}")


def _check(sweep: Sweep, node: Mapping[str, Any]) -> None:
    """What fits no more than by its type. Raises: ConfigError."""
    if not sweep.config:
        raise ConfigError("config: expected at least one file, got none")
    if not sweep.parameters:
        raise ConfigError("parameters: expected at least one, got none")
    for key in sorted(OWN.keys() & sweep.parameters.keys()):
        raise ConfigError(f"parameters.{key}: the sweep sets it itself; {OWN[key]}")
    check_columns(sweep.columns)
    names = {logged(own): own for own in sweep.columns.values()}
    known(sweep.metric.name, names, "metric.name")
    if names[sweep.metric.name].optional:
        raise ConfigError(f"columns.{sweep.objective}.optional: it is the metric, which every trial measures")
    better = names[sweep.metric.name].metric.better
    if better == "higher" and "goal" not in node["metric"]:
        raise ConfigError("metric.goal: left out it means minimize, and here more is better; write one")
    for number, constraint in enumerate(sweep.constraints):
        _check_constraint(constraint, sweep.columns, f"constraints.{number}")
    for number, figure in enumerate(sweep.figures):
        known(figure.x, sweep.columns, f"figures.{number}.x")
        known(figure.y, sweep.columns, f"figures.{number}.y")
    if sweep.method != "grid" and sweep.run_cap is None:
        raise ConfigError(f"run_cap: expected a number of trials with method {sweep.method}, it is missing")
    stop = sweep.early_terminate
    if stop is not None and stop.min_iter is None and (stop.max_iter is None or stop.s is None):
        raise ConfigError("early_terminate: expected min_iter, or max_iter and s, got neither")
    if sweep.command and sweep.conditions:
        raise ConfigError("command: it is for `wandb sweep`, whose format has no conditions; leave one out")
    for file in sweep.config if sweep.command else []:
        if not any(word.partition("=")[2] == file for word in sweep.command or []):
            raise ConfigError(f"command: expected --config={file}, which `config` names, it is missing")


def _check_constraint(own: Constraint, columns: Mapping[str, Column], place: str) -> None:
    known(own.column, columns, f"{place}.column")
    bounds = {name: getattr(own, name) for name in BOUNDS if getattr(own, name) is not None}
    if not bounds:
        raise ConfigError(f"{place}: expected one of {', '.join(BOUNDS)}, got none")
    for name, value in bounds.items():
        if columns[own.column].metric.quantity.endswith(RATES) and not 0 <= value <= 1:
            raise ConfigError(f"{place}.{name}: expected a share within [0, 1], got {value:g}; 0.9 is 90 %")
    if own.at_least is not None and own.at_most is not None and own.at_least > own.at_most:
        raise ConfigError(
            f"{place}: expected at_least below at_most, got {own.at_least:g} and {own.at_most:g}"
        )
