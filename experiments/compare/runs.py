"""The runs that are compared: which folders, what they are called, what is kept of each."""

from __future__ import annotations

import glob
import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from sys import intern

from callbacks.metrics.names import Metric
from callbacks.report import perplexities
from callbacks.report.events import Events, events
from callbacks.report.load import load_measured
from callbacks.report.measured import Measured
from callbacks.report.results import Measure, RunResults, Snapshot, Stage
from datamodules.results import MEASUREMENTS, ROWS, measurement_files, read_measurements
from experiments.config.errors import ConfigError

STAGES: tuple[Stage, ...] = ("test", "validate", "fit")
"""In the order in which one is taken where several have been measured: test rows say most."""


@dataclass(frozen=True)
class Run:
    """What is kept of one run while others are read: its numbers and outcomes, not its texts."""

    name: str
    results: RunResults
    """Without samples."""
    events: Sequence[Events]
    """What occurred on which example, after training."""
    texts: Sequence[Measured]
    """Measurements of perplexity, whose windows are resampled in pairs."""
    report: str
    """The run's own page, seen from the comparison; '' where it has none."""

    @property
    def after(self) -> Snapshot:
        assert self.results.after is not None  # load raises where nothing was measured
        return self.results.after

    @property
    def before(self) -> Snapshot | None:
        """Before training, where that is another model than the one after it."""
        own = self.results.before
        return None if own is self.results.after else own

    def measure(self, metric: Metric) -> Measure | None:
        return self.after.measures.get(metric)


def chosen(words: Sequence[str], out: Path) -> list[Path]:
    """The run folders that these folders and patterns name, each once.

    A folder that is named must hold results; of what a pattern matches, only such folders count. The
    comparison's own folder, which `runs/*` matches, is passed over.

    Raises: ConfigError naming the folder or the pattern.
    """
    found: dict[Path, Path] = {}
    for word in words:
        for folder in _named(word):
            if folder.resolve() != out.resolve():
                found.setdefault(folder.resolve(), folder)
    if not found:
        raise ConfigError(f"compare: expected run folders, got {' '.join(words)}; name at least one")
    return list(found.values())


def _named(word: str) -> list[Path]:
    folder = Path(word)
    if folder.exists():
        return [folder]
    if not glob.has_magic(word):
        raise ConfigError(f"{word}: expected a run folder, got none; train or test one, or name another")
    matches = [Path(match) for match in sorted(glob.glob(word, recursive=True))]
    runs = [match for match in matches if measurement_files(match)]
    if not runs:
        raise ConfigError(
            f"{word}: expected run folders, got none with {ROWS}/{MEASUREMENTS} among the matches"
        )
    return runs


def common_stage(folders: Sequence[Path], wanted: Stage | None) -> Stage:
    """The stage that is shown: `wanted`, or else the best one that all folders have measured. Raises:
    ConfigError naming a folder that holds no results, or not of it."""
    measured = {folder: _stages(folder) for folder in folders}
    choices = [wanted] if wanted is not None else STAGES
    for stage in choices:
        if all(stage in own for own in measured.values()):
            return stage
    best = choices[0]
    lacking = next(folder for folder, own in measured.items() if best not in own)
    raise ConfigError(
        f"{lacking}: no results of `{best}`, only of {', '.join(sorted(measured[lacking]))}; run "
        f"`thundercat {best}` there, leave the folder out, or choose another stage with --stage"
    )


def _stages(folder: Path) -> set[str]:
    try:
        found = {str(item.stage) for item in read_measurements(folder)} & {*STAGES}
    except OSError as error:
        raise ConfigError(f"{folder}: cannot be read ({error.strerror}); name a run folder") from error
    if not found:
        raise ConfigError(
            f"{folder}: expected a run folder with results ({ROWS}/{MEASUREMENTS}), got none; leave it out, "
            "or evaluate the run first"
        )
    return found


def names(folders: Sequence[Path]) -> list[str]:
    """What runs are called: their paths below the folder that all of them share."""
    places = [os.path.abspath(folder) for folder in folders]
    shared = os.path.commonpath([os.path.dirname(place) for place in places])
    return [Path(os.path.relpath(place, shared)).as_posix() for place in places]


def read(folder: Path, stage: Stage) -> tuple[RunResults, Mapping[int, Sequence[Measured]]]:
    """All that a stage of a run has measured, and the rows behind it. Raises: ConfigError naming the folder
    where it is damaged."""
    try:
        return load_measured(folder, stage)
    except (ValueError, OSError, LookupError, TypeError, AttributeError) as error:
        reason = " ".join(str(error).split())
        if isinstance(error, ValueError | OSError) and str(folder) in reason:
            raise ConfigError(reason) from error
        raise ConfigError(
            f"{folder}: damaged results ({type(error).__name__}: {reason}); leave it out, or run it again"
        ) from error


def kept(name: str, results: RunResults, measured: Mapping[int, Sequence[Measured]], out: Path) -> Run:
    """The run without its texts: what stays of ten thousand rows is about 1.5 MB (measured over 45 runs)."""
    last = measured[results.snapshots[-1].step]
    happened = events(last)
    for event in happened:
        # The same examples in every run: one string each.
        event.outcome = {intern(key): own for key, own in event.outcome.items()}
        event.groups, event.categories = {}, {}
    page = results.folder / ("report.html" if results.stage == "fit" else f"{results.stage}_report.html")
    return Run(
        name=name,
        results=replace(
            results, snapshots=[replace(own, samples=()) for own in results.snapshots], training=()
        ),
        events=happened,
        texts=[item for item in last if item.measurement.quantity in perplexities.UNITS],
        report=Path(os.path.relpath(page, out)).as_posix() if page.is_file() else "",
    )
