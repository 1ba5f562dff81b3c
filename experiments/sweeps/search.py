"""A sweep's trials as an Optuna study in a journal: what was drawn, what came of it, what is drawn next.

The journal (`journal.jsonl` in the sweep's folder) has one writer, which holds the folder's lock; a line that
a kill cut short counts as not written. What trial n draws follows from the sweep's seed, n and the trials
that were finished by then, never from how often the sweep was started.
"""

from __future__ import annotations

import warnings
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np
import optuna
from optuna.pruners import BasePruner, HyperbandPruner, NopPruner
from optuna.samplers import BaseSampler, RandomSampler, TPESampler
from optuna.storages.journal import JournalFileBackend, JournalFileOpenLock, JournalStorage
from optuna.trial import FrozenTrial, Trial, TrialState

from experiments.sweeps.definition import Sweep, is_broken
from experiments.sweeps.space import Raw, Space

JOURNAL = "journal.jsonl"
FOLDER, CELLS, ERROR, COMMAND = "folder", "cells", "error", "command"
INTERRUPTED, RETRIED = "interrupted", "retried"
"""Attributes of a trial: its folder's name, what it measured, why it failed, what the backend calls its
command, how often it was ended from outside, how often it was begun again after a failure."""
OVER = (TrialState.COMPLETE, TrialState.PRUNED, TrialState.FAIL)


class Search:
    """One sweep's study.

    Args:
        sweep: the sweep.
        space: its parameters.
        place: the sweep's folder, which must exist.
        name: the study's name in the journal; another name counts none of the others' trials.
        parallel: how many trials run at a time.
        reads: write nothing, so that another process may.

    Raises: KeyError where nothing is to be written, and the journal has no such study.
    """

    def __init__(
        self, sweep: Sweep, space: Space, place: Path, name: str, parallel: int = 1, reads: bool = False
    ) -> None:
        self.sweep, self.space, self.parallel = sweep, space, parallel
        optuna.logging.set_verbosity(optuna.logging.ERROR)
        self.total = total(sweep, space)
        path = place / JOURNAL if reads else mended(place / JOURNAL)
        with quiet():
            storage = JournalStorage(JournalFileBackend(str(path), _Unshared(str(path))))
            if not reads:
                optuna.create_study(
                    storage=storage, study_name=name, direction=sweep.metric.goal, load_if_exists=True
                )
            self.study = optuna.load_study(study_name=name, storage=storage, pruner=_pruner(sweep))
            self.others = sum(own.n_trials for own in optuna.get_all_study_summaries(storage)) - len(
                self.trials()
            )

    def trials(self) -> list[FrozenTrial]:
        """All that were begun, in their order."""
        return [own for own in self.study.get_trials(deepcopy=False) if own.state != TrialState.WAITING]

    def unfinished(self) -> list[Trial]:
        """Trials of an earlier process that ended before they did."""
        return [Trial(self.study, own._trial_id) for own in self.trials() if own.state not in OVER]

    def begin(self) -> Trial:
        """The next trial."""
        number = len(self.trials())
        with quiet():
            self.study.sampler = self._sampler(number)
            waiting = self.study.get_trials(deepcopy=False, states=(TrialState.WAITING,))
            if self.sweep.method == "grid" and not waiting:
                self.study.enqueue_trial(next(islice(self.space.grid(), number, None)))
            return self.study.ask()

    def drawn(self, trial: Trial) -> dict[str, Any]:
        """Dotted key -> value of a trial; a kill may have come before all of them were drawn."""
        raw: dict[str, Raw] = {}
        with quiet():
            self.study.sampler = self._sampler(trial.number)
            _ = trial.relative_params  # drawn together; not with the sampler of whichever comes first
            for place, own in enumerate(self.space.dimensions):
                if self.space.exists(own.key, raw):
                    # Each from a seed of its own: those before it may have been drawn by another process.
                    self.study.sampler = self._sampler(trial.number, place)
                    raw[own.key] = own.suggest(trial)
        return self.space.values(raw)

    def values_of(self, trial: FrozenTrial) -> dict[str, Any] | None:
        """The same of one that is over; None where it was never drawn."""
        return self.space.values(trial.params) if self.space.whole(trial.params) else None

    def complete(
        self, trial: Trial, value: float, excesses: Mapping[str, float], cells: Mapping[str, Any]
    ) -> None:
        """Note what a trial has come to: the metric, how far each constraint is broken, all columns."""
        with quiet():
            trial.set_user_attr(CELLS, dict(cells))
            for text, excess in excesses.items():
                trial.set_constraint(text, excess)
            self.study.tell(trial, value)

    def fail(self, trial: Trial, error: str) -> None:
        with quiet():
            trial.set_user_attr(ERROR, error)
            self.study.tell(trial, state=TrialState.FAIL)

    def lags(self, trial: Trial, values: list[float]) -> bool:
        """Whether a running trial is to be ended, by its evaluations so far."""
        known = self.study.get_trials(deepcopy=False)[trial.number].intermediate_values
        with quiet():
            for step, value in enumerate(values, start=1):
                if step not in known:
                    trial.report(value, step)
                    if trial.should_prune():
                        return True
        return False

    def prune(self, trial: Trial) -> None:
        with quiet():
            self.study.tell(trial, state=TrialState.PRUNED)

    def ranked(self) -> list[FrozenTrial]:
        """Complete trials, the best first: those that keep the constraints, then by the metric."""
        sign = -1.0 if self.sweep.metric.goal == "maximize" else 1.0
        complete = [own for own in self.trials() if own.state == TrialState.COMPLETE]
        return sorted(complete, key=lambda own: (not feasible(own), sign * (own.value or 0.0), own.number))

    def best(self) -> FrozenTrial | None:
        """None where no trial keeps the constraints."""
        return next(iter(own for own in self.ranked() if feasible(own)), None)

    def reached(self) -> bool:
        """Whether the metric's target is reached."""
        best, target = self.best(), self.sweep.metric.target
        if best is None or best.value is None or target is None:
            return False
        return best.value >= target if self.sweep.metric.goal == "maximize" else best.value <= target

    def _sampler(self, *numbers: int) -> BaseSampler:
        seed = int(np.random.SeedSequence([self.sweep.seed, *numbers]).generate_state(1)[0])
        if self.sweep.method == "bayes":
            with quiet():  # in groups of those that exist together
                return TPESampler(
                    seed=seed, constant_liar=self.parallel > 1, group=bool(self.space.conditions)
                )
        return RandomSampler(seed=seed)


def total(sweep: Sweep, space: Space) -> int:
    """How many trials there will be."""
    if sweep.method != "grid":
        return sweep.run_cap or 0
    size = space.size()
    return min(size, sweep.run_cap or size)


def feasible(trial: FrozenTrial) -> bool:
    """Whether a complete trial keeps all constraints."""
    return not any(map(is_broken, trial.constraints.values()))


def mended(path: Path) -> Path:
    """The journal without a last line that a kill cut short: what is appended to it could not be read."""
    if path.is_file():
        content = path.read_bytes()
        whole = content.rfind(b"\n") + 1
        if whole < len(content):
            with path.open("r+b") as stream:
                stream.truncate(whole)
    return path


def _pruner(sweep: Sweep) -> BasePruner:
    stop = sweep.early_terminate
    if stop is None:
        return NopPruner()
    return HyperbandPruner(
        min_resource=stop.first, max_resource=stop.max_iter or "auto", reduction_factor=stop.eta
    )


class _Unshared(JournalFileOpenLock):
    """The sweep's folder is locked already, by a lock that a kill leaves to the next process."""

    def acquire(self) -> bool:
        return True

    def release(self) -> None:
        pass


@contextmanager
def quiet() -> Iterator[None]:
    """Optuna's warnings of what is experimental are for whoever writes this; what a kill let it note half is
    noted again."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", optuna.exceptions.ExperimentalWarning)
        warnings.filterwarnings("ignore", message=".* is ignored because this")
        warnings.filterwarnings("ignore", message="Some regimes for parameter .* have less than 2 trials")
        yield
