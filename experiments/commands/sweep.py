"""`thundercat sweep FILE`: search a configuration's fields, each trial a run as any other.

What is finished is kept: the same command goes on where a kill, a full disk or an error ended it. The best
trial is chosen on validation, under the file's constraints, and evaluated once on test.
"""

from __future__ import annotations

import errno
import sys
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path
from types import ModuleType
from typing import TYPE_CHECKING, Literal

import yaml

from callbacks.report.escape import printable
from callbacks.run_folder.lock import RunLock
from callbacks.run_folder.stopping import Stopped
from experiments.config.compose import ConfigError
from experiments.studies.processes import NO_SPACE
from experiments.sweeps.definition import Sweep, load_sweep

if TYPE_CHECKING:
    from experiments.sweeps.search import Search
    from experiments.sweeps.space import Space

BackendName = Literal["local", "slurm", "ray", "wandb"]
PACKAGES = {"slurm": "submitit", "ray": "ray"}
"""What a backend needs beside Optuna; the project's extras have the backends' names."""


@dataclass(frozen=True)
class SweepCall:
    """How a sweep is run."""

    sweep: str
    """YAML file of configs/sweep, or an own one."""
    backend: BackendName = "local"
    workers: int = 1
    """Trials at a time."""
    runs: str = "runs/sweeps"
    """Folder of the sweeps' folders; this one's is named as its file."""
    report_only: bool = False
    dry_run: bool = False


def sweep(call: SweepCall) -> int:
    """Run the trials that are missing, evaluate the best one, write the report. Returns the exit status: 1
    where no trial keeps the constraints, or where the evaluation failed. Raises: ConfigError."""
    if call.workers < 1:
        raise ConfigError(f"--workers: expected at least 1, got {call.workers}")
    _need("optuna", "sweep")
    if call.backend in PACKAGES:
        _need(PACKAGES[call.backend], call.backend)
    from experiments.sweeps.search import JOURNAL, Search
    from experiments.sweeps.space import space_of
    from experiments.sweeps.trials import check_all, identity

    own = load_sweep(call.sweep)
    try:
        _check_backend(call.backend, own)
        space = space_of(own)
        corners = check_all(own, space)
    except ConfigError as error:
        raise ConfigError(f"{call.sweep}: {error}") from error
    place = Path(call.runs) / Path(call.sweep).stem
    if call.backend == "wandb":
        return _wandb(call, own, place)
    name = identity(own, corners, place)
    if call.dry_run or call.report_only:
        try:
            there = Search(own, space, place, name, reads=True) if (place / JOURNAL).is_file() else None
        except KeyError:
            there = None
        return _listed(space, own, there) if call.dry_run else _reported(call, there, place)
    with RunLock(place):
        search = Search(own, space, place, name, call.workers)
        if search.others:
            _say(f"{call.sweep} has changed: {search.others} trials of what it was are not counted")
        return _run(call, search, place)


def _check_backend(name: BackendName, own: Sweep) -> None:
    """Raises: ConfigError for what the backend is told and does not know: said before a trial or a folder."""
    if name == "slurm":
        from experiments.sweeps.backends import check_slurm

        check_slurm(own.slurm)
    elif name == "ray":
        _ray_tune().bundle(own.ray)


def _ray_tune() -> ModuleType:
    """Raises: ConfigError for a Ray without what Tune needs."""
    try:
        from experiments.sweeps import ray_tune
    except ImportError as error:
        raise ConfigError(f"--backend ray: {error}; pip install 'ray[tune]'") from error
    return ray_tune


def _wandb(call: SweepCall, own: Sweep, place: Path) -> int:
    from experiments.sweeps.wandb_backend import run_agent, wandb_sweep

    if call.report_only:
        raise ConfigError("--report_only: the trials of --backend wandb are on W&B's own page")
    if call.dry_run:
        print(yaml.safe_dump(wandb_sweep(call.sweep, own, place), sort_keys=False, width=110), end="")
        return 0
    return run_agent(call.sweep, own, place)


def _listed(space: Space, own: Sweep, search: Search | None) -> int:
    """What varies, and what became of the trials so far."""
    from experiments.sweeps.search import total
    from experiments.sweeps.sweep_report import state_of

    for dimension in space.dimensions:
        where = space.conditions.get(dimension.key)
        print(dimension.text() + (f" (where {where.text()})" if where is not None else ""))
    trials = search.trials() if search is not None else []
    for trial in trials:
        print(f"{state_of(trial):<12}  trial {trial.number}  {dict(trial.params)}")
    print(f"{len(trials)} of {total(own, space)} trials begun")
    return 0


def _reported(call: SweepCall, search: Search | None, place: Path) -> int:
    if search is None:
        raise ConfigError(f"--report_only: no trials of this sweep in {place}; run it first")
    _write(call, search, place)
    return 1 if search.best() is None else 0


def _write(call: SweepCall, search: Search, place: Path) -> None:
    from experiments.sweeps.sweep_report import write_sweep

    print(write_sweep(search, Path(call.sweep).stem, place))
    print(f"report: {place / 'report.html'}")


def _run(call: SweepCall, search: Search, place: Path) -> int:
    from experiments.sweeps.backends import Backend, Local, Slurm
    from experiments.sweeps.engine import Engine

    backend: Backend = Local(call.workers)
    if call.backend == "slurm":
        backend = Slurm(place.resolve(), search.sweep.slurm)
    elif call.backend == "ray":
        backend = _ray_tune().RayTune(place, search.sweep.ray)
    engine = Engine(search, backend, call.workers, place)
    try:
        engine.run()
        failure = engine.judge()
        if failure:
            _say(f"the best trial on test: {failure}; go on with the same command")
        _write(call, search, place)
    except Stopped as stop:
        _say(f"{stop}; go on with the same command")
        return stop.exit_status
    except OSError as error:
        if error.errno != errno.ENOSPC:
            raise
        _say(f"{place}: {NO_SPACE}; make room, then go on with the same command")
        return 1
    except ConfigError as error:
        raise ConfigError(f"{call.sweep}: {error}") from error
    return 1 if failure or search.best() is None else 0


def _need(package: str, extra: str) -> None:
    if find_spec(package) is None:
        raise ConfigError(
            f"sweep: needs {package}, which is not installed; pip install {package} (the project's extra "
            f"`{extra}`)"
        )


def _say(text: str) -> None:
    print(f"thundercat: {printable(text, one_line=True)}", file=sys.stderr)
