"""What a study is, read from its YAML: runs, what each is judged by, columns, figures and questions.

    title: CAT and CAPO on one model
    seeds: [0, 1]
    test: [configs/data/tinychat_test.yaml]   # on top of every run's configuration in `thundercat test`
    runs:
      no defence: {config: [configs/experiment/cat_tinychat.yaml], trained: false}
      cat: {config: [configs/experiment/cat_tinychat.yaml]}
      cat, wide: {config: [configs/experiment/cat_tinychat.yaml], set: {model.attack.epsilon: 0.2}}
    columns:
      embedding: {quantity: success_rate, subject: harmful, attack: embedding}
    claims:
      - {question: CAT makes the model robust, first: no defence, second: cat, columns: [embedding]}

`config` takes any files that `thundercat fit` does: a sweep's best trial is the sweep's own files with its
`runs/sweeps/NAME/best.yaml` behind them, or `best_config.yaml` alone.

`${run.NAME}` in a value of `set` is the folder of another run of the study (of the same seed, where it has
it), which is trained before. `{checkpoint_of: cat, step: 10}` trains nothing: it judges what another run was
after so many steps, by that run's `config` and `set`. `{config: [...], trained: false, reported: false}` is
what other runs read and no table shows: the attacks of a red team, say. `runs: FILE` takes the runs of
another study, and its seeds where this one names none; `test` is this one's, behind which stand a run's own
files. With the same folder of runs a run and seed of both is trained once.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, get_args, get_type_hints

from callbacks.metrics.names import Metric
from callbacks.report.certificates import QUANTITY as CERTIFIED
from datamodules.fields import Count, NonNegative, NonNegativeInt, Positive, Share, checked
from experiments.config.errors import ConfigError
from experiments.config.files import find, read
from experiments.studies.archive import slug
from experiments.studies.reading import known, made

OWN = {
    "seed_everything": "use `seeds`",
    "trainer.default_root_dir": "folders are the study's; use --runs",
    "ckpt_path": "a run goes on with its own checkpoint by itself",
}
"""What a study says by itself on every command line, and a run's `set` would say in vain."""
PUBLISHED = ("forward", "backward", "passes", "seconds")
"""Figures of a paper's cost table: passes of the attack on one example, passes in all, seconds an update."""
REFERENCE = re.compile(r"\$\{run\.([^}]+)\}")
"""Another run's folder, in a value of `set`."""


@checked
@dataclass(frozen=True)
class StudyRun:
    """One training, or a model as it is, with its repetitions over seeds."""

    config: list[str] = field(default_factory=list)
    """YAML files, as `thundercat fit --config` takes them; none for a checkpoint."""
    set: dict[str, Any] = field(default_factory=dict)
    """Dotted key -> value, as overrides on the command line."""
    seeds: list[NonNegativeInt] | None = None
    """Values of seed_everything; null takes the study's."""
    trained: bool = True
    """false: the model before any training is judged, once."""
    test: list[str] = field(default_factory=list)
    """Files on top of the study's `test`."""
    reported: bool = True
    """false: other runs read its folder. It is judged by its own files alone, and no table has it."""
    setting: str = ""
    """In a word, what a search chose for it: told in a table. `set` says it in fields."""
    paper: dict[str, Positive] = field(default_factory=dict)
    """What a paper says that this training cost, by the names of PUBLISHED; it stands beside what was counted
    here."""
    checkpoint_of: str = ""
    """Run of the study that is judged as it was at `step`, with its `config` and `set`; '' for a training of
    its own."""
    step: Count | None = None
    """Optimiser step of a checkpoint that the other run leaves (its `vars.checkpoint_steps`, `_keep`)."""

    @property
    def needs(self) -> list[str]:
        """Names of the runs whose folders it reads."""
        return [self.checkpoint_of] if self.checkpoint_of else list(dict.fromkeys(self.references))

    @property
    def references(self) -> list[str]:
        """Names of the runs whose folders its values name."""
        return REFERENCE.findall(str(self.set))


@checked
@dataclass(frozen=True)
class Column:
    """A metric as a column of the table."""

    quantity: str
    subject: str
    attack: str = ""
    block: str = ""
    judge: str = ""
    """`name@revision` of a judge beside the deciding one, for the quantity `judged_rate`; '' otherwise."""
    optional: bool = False
    """Whether runs may lack it."""
    beyond: NonNegative = 0.0
    """Of `certified_rate`: certified within a radius above this one, in multiples of rho."""

    @property
    def metric(self) -> Metric:
        own = self.quantity, self.subject, self.attack, self.judge, self.block, self.beyond
        return Metric(*own)  # type: ignore[arg-type]


@checked
@dataclass(frozen=True)
class Claim:
    """A question that two runs answer: the second is compared with the first."""

    question: str
    first: str
    second: str
    columns: list[str]


@checked
@dataclass(frozen=True)
class TradeOff:
    """A figure: one column against another, a point per run."""

    x: str
    y: str


@checked
@dataclass(frozen=True)
class Study:
    """A study; see the module's text."""

    title: str
    runs: dict[str, StudyRun]
    columns: dict[str, Column]
    about: str = ""
    """What a reader has to know beside the table: budgets, hardware, what the numbers cannot show."""
    seeds: list[NonNegativeInt] = field(default_factory=lambda: [0])
    test: list[str] = field(default_factory=list)
    claims: list[Claim] = field(default_factory=list)
    figures: list[TradeOff] = field(default_factory=list)
    categories: list[str] = field(default_factory=list)
    """Columns whose rates are told by category of prompts, too."""
    smallest_category: Count = 5
    """Examples of one seed below which a category is left out of its table, and named above it."""
    correlations: list[TradeOff] = field(default_factory=list)
    """Two columns across the runs: how far one tells the other."""
    curves: list[str] = field(default_factory=list)
    """Attacks of the suite whose loss at every iterate is drawn, a line a run."""
    margin: Share = 0.05
    """As a share (0.05: five points). Differences within it are of no interest: `equivalent` means that all
    of the interval is."""

    @property
    def reported(self) -> list[str]:
        """Names of the runs that tables show."""
        return [name for name, run in self.runs.items() if run.reported]

    @property
    def untrained(self) -> list[str]:
        """Names of the runs that are a model as it is."""
        return [name for name, run in self.runs.items() if not run.trained]

    def judged_by(self, name: str) -> list[str]:
        """Files on top of a run's configuration in `thundercat test`."""
        run = self.runs[name]
        return [*self.test, *run.test] if run.reported else run.test

    def seeds_of(self, name: str) -> list[int]:
        """The seeds of a run; a model that is not trained has one."""
        own = self.runs[name]
        of = self.runs.get(own.checkpoint_of)
        if own.seeds is None and of is not None and of.trained and of is not own:
            return self.seeds if of.seeds is None else of.seeds
        seeds = self.seeds if own.seeds is None else own.seeds
        return seeds if own.trained else seeds[:1]


def load_study(path: str | Path) -> Study:
    """Raises: ConfigError naming the file and the field that is wrong."""
    place = find(str(path), None, "study")
    node = read(place)
    try:
        if isinstance(node.get("runs"), str):
            node = _with_runs_of(find(node["runs"], place.parent, "runs"), node)
        study = made(Study, node, NESTED)
        _check(study)
    except ConfigError as error:
        raise ConfigError(f"{path}: {error}") from error
    return study


def _with_runs_of(other: Path, node: Mapping[str, Any]) -> dict[str, Any]:
    """Raises: ConfigError where the other study is wrong, or has no runs of its own."""
    theirs = read(other)
    if isinstance(theirs.get("runs"), str):
        raise ConfigError(f"runs: {other.name} has none of its own; name {theirs['runs']}, whose they are")
    try:
        load_study(other)
    except ConfigError as error:
        raise ConfigError(f"runs: {error}") from error
    seeds = {"seeds": theirs["seeds"]} if "seeds" in theirs else {}
    return {**seeds, **node, "runs": theirs["runs"]}


NESTED: dict[str, type] = {
    "runs": StudyRun,
    "columns": Column,
    "claims": Claim,
    "figures": TradeOff,
    "correlations": TradeOff,
}


def _check(study: Study) -> None:
    """Names that refer to nothing. Raises: ConfigError."""
    slugs: dict[str, str] = {}
    for name, run in study.runs.items():
        twin = slugs.setdefault(slug(name), name)
        if twin != name:
            raise ConfigError(f"runs: {twin!r} and {name!r} would share a folder; rename one of them")
        for key in sorted(OWN.keys() & run.set.keys()):
            raise ConfigError(f"runs.{name}.set.{key}: the study sets it itself; {OWN[key]}")
        if not run.config and not run.checkpoint_of:
            raise ConfigError(f"runs.{name}.config: expected at least one file, got none")
        if not study.seeds_of(name):
            raise ConfigError(f"runs.{name}.seeds: expected at least one seed, got none")
        if len({*study.seeds_of(name)}) < len(study.seeds_of(name)):
            raise ConfigError(f"runs.{name}.seeds: expected different seeds, got {study.seeds_of(name)}")
        for other in run.needs:
            known(
                other, study.runs, f"runs.{name}.{'checkpoint_of' if other == run.checkpoint_of else 'set'}"
            )
        for figure in run.paper:
            known(figure, PUBLISHED, f"runs.{name}.paper")
        _check_checkpoint(study, name)
    if not study.reported:
        raise ConfigError(
            "runs: expected at least one that is reported, got none; leave out `reported: false`"
        )
    _refuse_circles(study)
    check_columns(study.columns)
    for number, claim in enumerate(study.claims):
        known(claim.first, study.reported, f"claims.{number}.first")
        known(claim.second, study.reported, f"claims.{number}.second")
        if claim.first == claim.second:
            raise ConfigError(f"claims.{number}.second: expected another run than `first`, got the same")
        if not claim.columns:
            raise ConfigError(f"claims.{number}.columns: expected at least one column, got none")
        for label in claim.columns:
            known(label, study.columns, f"claims.{number}.columns")
    for name, pairs in (("figures", study.figures), ("correlations", study.correlations)):
        for number, pair in enumerate(pairs):
            known(pair.x, study.columns, f"{name}.{number}.x")
            known(pair.y, study.columns, f"{name}.{number}.y")
    for number, label in enumerate(study.categories):
        known(label, study.columns, f"categories.{number}")


def _check_checkpoint(study: Study, name: str) -> None:
    """Raises: ConfigError for a checkpoint that is not told whole, or of what has none of its own, or none of
    these seeds: another one's would be told twice."""
    run, place = study.runs[name], f"runs.{name}"
    if bool(run.checkpoint_of) != (run.step is not None):
        raise ConfigError(
            f"{place}: expected checkpoint_of and step together, got one of them; add the other"
        )
    if not run.checkpoint_of:
        return
    for field_name, given in (("config", run.config), ("set", run.set), ("trained", not run.trained)):
        if given:
            raise ConfigError(
                f"{place}.{field_name}: a checkpoint is judged by what trained it, {run.checkpoint_of!r}; "
                "leave the field out, and say what else to measure in `test`"
            )
    of = study.runs[run.checkpoint_of]
    if of.checkpoint_of or not of.trained:
        raise ConfigError(
            f"{place}.checkpoint_of: expected a run that is trained, got {run.checkpoint_of!r}, which is not"
        )
    there = study.seeds_of(run.checkpoint_of)
    lacking = [str(seed) for seed in study.seeds_of(name) if seed not in there]
    if lacking:
        raise ConfigError(
            f"{place}.seeds: {run.checkpoint_of!r} has no checkpoints of the seeds {', '.join(lacking)}, "
            f"only of {', '.join(map(str, there))}; leave them out, or add them to its own"
        )


def check_columns(columns: Mapping[str, Column]) -> None:
    """Raises: ConfigError for a quantity or a subject that there is not."""
    hints = get_type_hints(Metric)
    for name, column in columns.items():
        known(column.quantity, get_args(hints["quantity"]), f"columns.{name}.quantity")
        known(column.subject, get_args(hints["subject"]), f"columns.{name}.subject")
        if column.beyond and column.quantity != CERTIFIED:
            raise ConfigError(
                f"columns.{name}.beyond: only {CERTIFIED} has radii, got it for {column.quantity}; leave it "
                "out"
            )


def _refuse_circles(study: Study) -> None:
    for name in study.runs:
        waiting = list(study.runs[name].needs)
        seen: set[str] = set()
        while waiting:
            own = waiting.pop()
            if own == name:
                raise ConfigError(f"runs.{name}.set: the run needs itself, through {', '.join(seen) or name}")
            if own not in seen:
                seen.add(own)
                waiting += study.runs[own].needs
