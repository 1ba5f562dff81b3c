"""Which command lines a study's runs are, in which folders, and what of them is done.

A run's folder is `NAME_seedN-DIGEST` below the runs' folder; the digest is of what decides its weights and of
its number of steps, so that two studies with the same run share it, and a run whose YAML has changed is
another one. `done.json` in it says that training has ended, and by which evaluations it was judged.
"""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from callbacks.run_folder.decisive import decisive
from datamodules.contents import CONTENT
from experiments.config.check import check
from experiments.config.compose import ConfigError, compose
from experiments.config.defaults import with_defaults
from experiments.studies.archive import slug
from experiments.studies.definition import REFERENCE, Study, StudyRun

DONE = "done.json"
DIGITS = 10
State = Literal["not begun", "begun", "to be judged", "done"]


@dataclass(frozen=True)
class Job:
    """One run of one seed: to be trained, where it is, and judged."""

    name: str
    seed: int
    folder: Path
    fit: tuple[str, ...]
    """Words of `thundercat fit`; () where nothing is trained."""
    test: tuple[str, ...]
    needs: tuple[tuple[str, int], ...]
    """Name and seed of the runs whose folders it reads."""

    @property
    def title(self) -> str:
        return f"{self.name}, seed {self.seed}"

    @property
    def judged_by(self) -> str:
        """Digest of the evaluation that is wanted."""
        return _digest([word for word in self.test if "default_root_dir" not in word])

    def state(self) -> State:
        done = self._done()
        if done.get("test") == self.judged_by:
            return "done"
        if done.get("fit") or not self.fit:
            return "to be judged"
        return "begun" if self.folder.is_dir() else "not begun"

    def finish(self, what: Literal["fit", "test"]) -> None:
        """Note that a command has ended well. Written beside and renamed: a kill leaves the old note."""
        value: Any = True if what == "fit" else self.judged_by
        partial = self.folder / f"{DONE}.partial"
        partial.write_text(json.dumps({**self._done(), what: value}) + "\n", encoding="utf-8")
        partial.replace(self.folder / DONE)

    def _done(self) -> Mapping[str, Any]:
        path = self.folder / DONE
        try:
            found = json.loads(path.read_text(encoding="utf-8")) if path.is_file() else {}
        except ValueError:
            return {}
        return found if isinstance(found, dict) else {}


def jobs_of(study: Study, runs: Path) -> list[Job]:
    """All runs of a study, each behind those that it needs; every configuration is composed and checked, so
    that an impossible one fails before the first run.

    Raises: ConfigError naming the run.
    """
    found: dict[tuple[str, int], Job] = {}
    for name in _ordered(study):
        for seed in study.seeds_of(name):
            try:
                found[name, seed] = _job(study, name, seed, runs, found)
            except ValueError as error:
                raise ConfigError(f"runs.{name}: {error}") from error
    _refuse_doubles(found.values())
    return list(found.values())


def _ordered(study: Study) -> Iterator[str]:
    """Names in their order, each behind those that it needs; there are no circles."""
    given: dict[str, None] = {}

    def give(name: str) -> None:
        for other in study.runs[name].needs:
            give(other)
        given[name] = None

    for name in study.runs:
        give(name)
    yield from given


def _job(study: Study, name: str, seed: int, runs: Path, earlier: Mapping[tuple[str, int], Job]) -> Job:
    run = study.runs[name]
    needs = tuple((other, _seed_of(study, other, seed)) for other in run.needs)
    folders = {own: earlier[own, number].folder for own, number in needs}
    overrides = [(key, _filled(value, folders)) for key, value in run.set.items()]
    overrides.append(("seed_everything", str(seed)))
    config = compose(run.config, overrides)
    check(config, "fit" if run.trained else "test")
    folder = _folder(runs, name, seed, _of_weights(config, runs, run))
    words = [f"--config={file}" for file in run.config] + [f"--{key}={value}" for key, value in overrides]
    place = f"--trainer.default_root_dir={folder}"
    more = [f"--config={file}" for file in (*study.test, *run.test)]
    test_words = [f"--config={file}" for file in run.config] + more
    test_words += [f"--{key}={value}" for key, value in overrides]
    check(compose([*run.config, *study.test, *run.test], overrides), "test")
    last = ["--ckpt_path=last"] if run.trained else []
    return Job(
        name=name,
        seed=seed,
        folder=folder,
        fit=("fit", *words, place, "--ckpt_path=last") if run.trained else (),
        test=("test", *test_words, place, *last),
        needs=needs,
    )


def _seed_of(study: Study, other: str, seed: int) -> int:
    """The same seed of another run, or its first."""
    seeds = study.seeds_of(other)
    return seed if seed in seeds else seeds[0]


def _filled(value: Any, folders: Mapping[str, Path]) -> str:
    """An override's text, with the folders of other runs in it."""
    if isinstance(value, str):
        return REFERENCE.sub(lambda match: str(folders[match[1]]), value)
    return json.dumps(value)


def _of_weights(config: dict[str, Any], runs: Path, run: StudyRun) -> str:
    fields = decisive(with_defaults(config))
    # What another run will write is not there yet when this run is named; its folder's name says it.
    own = {
        key: value
        for key, value in fields.items()
        if not (
            key.endswith(f".{CONTENT}") and _below(str(fields.get(key.removesuffix(f".{CONTENT}"))), runs)
        )
    }
    return _digest({"trained": run.trained, **own})


def _below(path: str, folder: Path) -> bool:
    return Path(path).resolve().is_relative_to(folder.resolve())


def _digest(value: Any) -> str:
    return hashlib.sha256(json.dumps(value, sort_keys=True, default=str).encode()).hexdigest()[:DIGITS]


def _folder(runs: Path, name: str, seed: int, digest: str) -> Path:
    """The folder that holds this run already, of whatever study, or a new one."""
    there = sorted(runs.glob(f"*-{digest}"))
    return there[0] if there else runs / f"{slug(name)}_seed{seed}-{digest}"


def _refuse_doubles(jobs: Iterable[Job]) -> None:
    """Two names for one training would be one row told twice. Raises: ConfigError."""
    seen: dict[Path, Job] = {}
    for job in jobs:
        twin = seen.setdefault(job.folder, job)
        if twin is not job:
            raise ConfigError(
                f"runs: {twin.title!r} and {job.title!r} are the same training; leave one of them out"
            )


def threads(workers: int) -> int:
    """How many threads each of several runs at a time may use on this machine."""
    return max(1, (os.cpu_count() or 1) // workers)
