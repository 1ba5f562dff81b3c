"""`thundercat study FILE`: every run of a study, trained and judged, and what they say side by side.

Each run is a process of its own, as a user would type it. What is finished is kept: the same command goes on
where a kill, a full disk or an error ended it; a run that fails is told at the end and stops no other.
"""

from __future__ import annotations

import sys
import threading
from collections.abc import Mapping, Sequence
from concurrent.futures import FIRST_COMPLETED, Future, ThreadPoolExecutor, wait
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from tqdm.auto import tqdm

from callbacks.report.escape import printable
from callbacks.run_folder.lock import in_use
from callbacks.run_folder.stopping import Stopped, stoppable
from experiments.commands.study_cost import Costs
from experiments.compare.comparison import write_comparison
from experiments.config.compose import ConfigError
from experiments.counting import Lines, counter
from experiments.studies.archive import archived
from experiments.studies.comparison import read
from experiments.studies.definition import Study, load_study
from experiments.studies.processes import PROGRAM, Running
from experiments.studies.reading import known
from experiments.studies.scheduling import Job, jobs_of, refuse_lost, standings, threads
from experiments.studies.study_report import write_study


@dataclass(frozen=True)
class StudyCall:
    """How a study is run."""

    study: str
    """YAML file of configs/study, or an own one."""
    out: str | None = None
    """Folder of tables and figures; null takes runs/studies/NAME of the file."""
    runs: str = "runs/studies"
    """Folder of the run folders, shared by all studies."""
    only: Sequence[str] = ()
    """Names of runs to train and judge, or of those that are recorded; none takes all."""
    workers: int = 1
    """Runs at a time; each has its share of the machine's cores."""
    dry_run: bool = False
    report_only: bool = False
    recorded: str | None = None
    """Folder of a study's report: its raw rows are reported as this study asks, and nothing is run."""


def study(call: StudyCall) -> int:
    """Run what is not done, then write the report. Returns the exit status: 1 where a run failed, or where
    there is nothing to report. Raises: ConfigError."""
    if call.workers < 1:
        raise ConfigError(f"--workers: expected at least 1, got {call.workers}")
    own = load_study(call.study)
    for name in call.only:
        known(name, own.runs, "--only")
    if call.recorded is not None:
        for option, given in (("--dry_run", call.dry_run), ("--report_only", call.report_only)):
            if given:
                raise ConfigError(
                    f"--recorded: it runs nothing and writes a report of recorded rows, got {option} beside "
                    "it; leave one of them out"
                )
        return _recorded(own, Path(call.recorded), _out(call), call.only)
    try:
        jobs = jobs_of(own, Path(call.runs))
    except ConfigError as error:
        raise ConfigError(f"{call.study}: {error}") from error
    wanted = _with_needed(jobs, call.only)
    if not call.report_only:
        refuse_lost(wanted)
    if call.dry_run:
        return _listed(wanted)
    if not call.report_only:
        try:
            failed = Runner(wanted, call.workers).run()
        except Stopped as stop:
            _say(f"{stop}; go on with the same command")
            return stop.exit_status
    else:
        failed = {}
    for title, reason in failed.items():
        _say(f"{title}: {reason}")
    reported = _report(own, jobs, _out(call), failed)
    return 1 if failed or not reported else 0


def _listed(jobs: Sequence[Job]) -> int:
    """A line a run, as soon as its plan is made: what is done, where, what it costs; and what is left."""
    costs, states = Costs(jobs), standings(jobs)
    for job in jobs:
        print(f"{states[job.name, job.seed]:<12}  {job.title}  {job.folder}  {costs.text(job)}", flush=True)
    print(costs.total())
    return 0


def _out(call: StudyCall) -> Path:
    return Path(call.out) if call.out else Path(call.runs) / Path(call.study).stem


def _recorded(own: Study, place: Path, out: Path, only: Sequence[str]) -> int:
    """Other tables of rows that are recorded. Raises: ConfigError where a run that is asked for is not
    there."""
    found = archived(place, only or own.reported)
    missing = {name: "not recorded" for name in own.reported if name not in found}
    for name, folders in found.items():
        if not folders:
            raise ConfigError(
                f"--recorded: no run {name!r} in {place}; name the folder of a study's report, and by --only "
                "the runs that it has"
            )
        for seed in own.seeds_of(name):
            if seed not in folders:
                missing[f"{name}, seed {seed}"] = "not recorded"
    try:
        print(write_study(own, found, out, missing=missing, copies=False))
    except ValueError as error:
        raise ConfigError(f"--recorded: {error}") from error
    print(f"report: {out / 'report.html'}")
    return 0


def _say(text: str) -> None:
    print(f"thundercat: {printable(text, one_line=True)}", file=sys.stderr)


def _with_needed(jobs: Sequence[Job], only: Sequence[str]) -> list[Job]:
    """The jobs of these names and those whose folders they read."""
    by_key = {(job.name, job.seed): job for job in jobs}
    wanted: set[tuple[str, int]] = set()
    waiting = [key for key in by_key if not only or key[0] in only]
    while waiting:
        key = waiting.pop()
        wanted.add(key)
        waiting += [other for other in by_key[key].needs if other not in wanted]
    return [job for key, job in by_key.items() if key in wanted]


def _report(own: Study, jobs: Sequence[Job], out: Path, failed: Mapping[str, str]) -> bool:
    """Of the runs all of whose seeds are done and can be read; the others are named in it. Returns whether
    there is one."""
    folders: dict[str, dict[int, Path]] = {}
    missing: dict[str, str] = {}
    standing = standings(jobs)
    for name in own.reported:
        seeds = [job for job in jobs if job.name == name]
        states = [(job, failed.get(job.title, standing[name, job.seed])) for job in seeds]
        lacking = [f"seed {job.seed}: {state}" for job, state in states if state != "done"]
        found = {job.seed: job.folder for job in seeds}
        if not lacking:
            try:
                read({name: found}, own.columns)
            except ValueError as error:
                lacking = [str(error)]
        if lacking:
            missing[name] = "; ".join(lacking)
        else:
            folders[name] = found
    for name, reason in missing.items():
        _say(f"not reported: {name} ({reason})")
    if not folders:
        return False
    links = _side_by_side(own.title, folders, out)
    print(write_study(own, folders, out, missing=missing, links=links))
    print(f"report: {out / 'report.html'}")
    return True


def _side_by_side(title: str, runs: Mapping[str, Mapping[int, Path]], out: Path) -> dict[str, str]:
    """The comparison of all runs, down to their rows, beside the report; its link, none where it failed."""
    named = [
        (f"{name}, seed {seed}" if len(folders) > 1 else name, folder)
        for name, folders in runs.items()
        for seed, folder in folders.items()
    ]
    try:
        page = write_comparison(named, "test", out / "compare", title=f"{title}: runs side by side")
    except ConfigError as error:
        _say(f"no comparison: {error}")
        return {}
    return {"Runs side by side, down to their rows": page.relative_to(out).as_posix()}


@dataclass
class Runner:
    """Runs jobs, several at a time, each behind those that it needs."""

    jobs: Sequence[Job]
    workers: int
    program: Sequence[str] = PROGRAM
    failed: dict[str, str] = field(default_factory=dict)
    _processes: set[Running] = field(default_factory=set)
    _stopping: threading.Event = field(default_factory=threading.Event)

    def run(self) -> dict[str, str]:
        """Returns what failed: title of the run -> its last words. Raises: Stopped, when all have ended."""
        over = {(job.name, job.seed) for job in self.jobs if job.state() == "done"}
        waiting = [job for job in self.jobs if (job.name, job.seed) not in over]
        bar = counter(len(self.jobs), "study", "run", len(over))
        with stoppable(), ThreadPoolExecutor(self.workers) as pool, bar:
            try:
                self._schedule(pool, bar, waiting, over)
            except (Stopped, KeyboardInterrupt):
                self._stopping.set()
                for process in list(self._processes):
                    process.stop()
                raise
        return self.failed

    def _schedule(
        self, pool: ThreadPoolExecutor, bar: tqdm[Any] | Lines, waiting: list[Job], over: set[tuple[str, int]]
    ) -> None:
        running: dict[Future[None], Job] = {}
        while waiting or running:
            for job in list(waiting):
                broken = [f"{name}, seed {seed}" for name, seed in job.needs]
                broken = [title for title in broken if title in self.failed]
                if broken:
                    self.failed[job.title] = f"it needs {broken[0]}, which failed"
                    waiting.remove(job)
                    bar.update()
                elif len(running) < self.workers and all(key in over for key in job.needs):
                    running[pool.submit(self._do, job)] = job
                    bar.set_postfix_str(job.title)
                    waiting.remove(job)
            done, _ = wait(running, timeout=0.5, return_when=FIRST_COMPLETED)
            for future in done:
                job = running.pop(future)
                future.result()
                over.add((job.name, job.seed))
                bar.update()

    def _do(self, job: Job) -> None:
        if job.fit and job.state() in ("not begun", "begun"):
            if not self._command(job, job.fit):
                return
            job.finish("fit")
        if job.state() != "done" and self._command(job, job.test):
            job.finish("test")

    def _command(self, job: Job, words: Sequence[str]) -> bool:
        """One process; whether it ended well. Its output goes to the run's log."""
        while in_use(job.folder) and not self._stopping.wait(0.2):
            pass
        process = Running(words, job.folder, threads(self.workers), self.program)
        self._processes.add(process)
        if self._stopping.is_set():
            process.stop()
        status = process.wait()
        self._processes.discard(process)
        if status and not self._stopping.is_set():
            self.failed[job.title] = process.failure()
            # At once: a mistake that all runs share should not take the night to be told.
            tqdm.write(f"{job.title}: failed: {printable(self.failed[job.title])}", file=sys.stderr)
        return status == 0
