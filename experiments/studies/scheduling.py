"""Which command lines a study's runs are, in which folders, and what of them is done.

A run's folder is `NAME_seedN-DIGEST` below the runs' folder; the digest is of what decides its weights and
when training ends, so that two studies with the same run share it, and a run whose training has changed is
another one. `done.json` in it says that training has ended, and by which evaluation it was judged: another
evaluation, or the same on files that hold something else, is asked for again.
"""

from __future__ import annotations

import hashlib
import json
import os
import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

from callbacks.run_folder.checkpoints import RunCheckpoints
from callbacks.run_folder.decisive import decisive, filled, flat
from callbacks.run_folder.folder import RunFolder
from datamodules.contents import CONTENT, fingerprints
from experiments.config.check import check
from experiments.config.compose import ConfigError, compose
from experiments.config.defaults import with_defaults
from experiments.studies.archive import slug
from experiments.studies.definition import REFERENCE, Study, StudyRun
from experiments.studies.measurable import attacks_of, check_columns_measured, check_curves

DONE = "done.json"
DIGITS = 10
NAME = re.compile(rf".*_seed\d+-[0-9a-f]{{{DIGITS}}}")
"""Of a run's folder."""
ENDS = ("max_time", "min_steps", "min_epochs")
"""Fields of the trainer by which a training ends, beside its steps."""
LATER = ("model.optimizer.fused",)
"""Fields that came to their classes later: where they are null, a run is the one that it was without them,
and its folder keeps its name, so that nothing is trained again."""
STOPPING = ("EarlyStopping", "Timer")
"""Lightning's callbacks that end one."""
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
    judged_by: str
    """Digest of the evaluation that is wanted, and of the files that it names."""
    config: Mapping[str, Any] = field(default_factory=dict, repr=False)
    """The resolved configuration of its training."""
    keeps: tuple[int, ...] | None = None
    """Steps whose checkpoints its training leaves; null where that is not known beforehand."""
    attacks: frozenset[str] | None = None
    """Names of the attacks that it is judged by; null where they are not known beforehand."""
    checkpoint: Path | None = None
    """Of the first run that it needs, where that one is judged as it was on its way."""

    @property
    def title(self) -> str:
        return f"{self.name}, seed {self.seed}"

    @property
    def digest(self) -> str:
        """What its folder's name says of the weights."""
        return self.folder.name.rpartition("-")[2]

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
    check_curves(study.curves, [own.attacks for own in found.values() if own.name in study.reported])
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
    of = earlier[needs[0]] if run.checkpoint_of else None
    own = study.runs[run.checkpoint_of or name]  # whose training it is of
    folders = {other: earlier[other, number].folder for other, number in (of.needs if of else needs)}
    overrides = [(key, text_of(_filled(value, folders))) for key, value in own.set.items()]
    overrides.append(("seed_everything", str(seed)))
    config = compose(own.config, overrides)
    trains = run.trained and of is None
    check(config, "fit" if trains else "test")
    judged_as = {other.folder.name: other.judged_by for other in earlier.values()}
    weights, checkpoint = _of_weights(config, runs, run, judged_as), None
    if of is not None and run.step is not None:
        weights, checkpoint = digest([of.digest, run.step]), _checkpoint(of, run.step)
    judged = [f"--ckpt_path={checkpoint or 'last'}"] if trains or checkpoint else []
    folder = _folder(runs, name, seed, weights)
    files = [f"--config={file}" for file in own.config]
    judged_by = study.judged_by(name)
    more = [f"--config={file}" for file in judged_by]
    options = [f"--{key}={value}" for key, value in overrides]
    options.append(f"--trainer.default_root_dir={folder}")
    judging = compose([*own.config, *judged_by], overrides)
    check(judging, "test")
    if run.reported:
        check_columns_measured(study.columns, judging)
    return Job(
        name=name,
        seed=seed,
        folder=folder,
        fit=("fit", *files, *options, "--ckpt_path=last") if trains else (),
        test=("test", *files, *more, *options, *judged),
        needs=needs,
        judged_by=of_all(judging, runs, judged_as),
        config=config,
        keeps=kept_steps(config) if trains else (),
        checkpoint=checkpoint,
        attacks=attacks_of(judging),
    )


def _checkpoint(of: Job, step: int) -> Path:
    """Where the checkpoint will lie. Raises: ConfigError where the training will not leave it."""
    if of.keeps is not None and step not in of.keeps:
        kept = ", ".join(map(str, of.keeps)) or "none"
        raise ConfigError(
            f"step: {of.name!r} leaves checkpoints of the steps {kept}, got {step}; set "
            "vars.checkpoint_steps and vars.checkpoint_keep of that run"
        )
    if step == (of.config.get("trainer") or {}).get("max_steps"):
        raise ConfigError(f"step: {step} is the end of {of.name!r}, which would be told twice; leave it out")
    return RunFolder.of(of.folder).checkpoint(step)


def kept_steps(config: Mapping[str, Any]) -> tuple[int, ...] | None:
    """The steps whose checkpoints a training of this configuration leaves; None where its number of steps, or
    when it writes them, is not known."""
    trainer = config.get("trainer") or {}
    last, own = trainer.get("max_steps"), None
    for node in trainer.get("callbacks") or []:
        if str(node.get("class_path")).endswith(RunCheckpoints.__name__):
            own = RunCheckpoints(**(node.get("init_args") or {}))
    if own is None:
        return ()
    return own.kept(last) if isinstance(last, int) and last > 0 else None


def _seed_of(study: Study, other: str, seed: int) -> int:
    """The same seed of another run, or its first."""
    seeds = study.seeds_of(other)
    return seed if seed in seeds else seeds[0]


def _filled(value: Any, folders: Mapping[str, Path]) -> Any:
    """A value of `set` with the folders of other runs in its texts."""
    if isinstance(value, Mapping):
        return {key: _filled(own, folders) for key, own in value.items()}
    if isinstance(value, list):
        return [_filled(own, folders) for own in value]
    if isinstance(value, str):
        return REFERENCE.sub(lambda match: str(folders[match[1]]), value)
    return value


def text_of(value: Any) -> str:
    """As on the command line."""
    return value if isinstance(value, str) else json.dumps(value)


def _of_weights(config: dict[str, Any], runs: Path, run: StudyRun, judged_as: Mapping[str, str]) -> str:
    """What decides the weights, and when training ends."""
    trainer = config.get("trainer") or {}
    ends = {name: trainer.get(name) for name in ENDS}
    ends["callbacks"] = [
        filled(own) for own in trainer.get("callbacks") or [] if own["class_path"].endswith(STOPPING)
    ]
    fields = decisive(with_defaults(config))
    return digest({"trained": run.trained, "ends": ends, **_settled(fields, runs, judged_as)})


def of_all(config: dict[str, Any], runs: Path, judged_as: Mapping[str, str] | None = None) -> str:
    """Digest of all of a configuration but the folder, and of what the files that it names hold."""
    fields = flat("", filled(with_defaults(config)))
    fields.pop(".trainer.default_root_dir", None)
    return digest(_settled({**fields, **fingerprints(fields)}, runs, judged_as or {}))


def _settled(fields: Mapping[str, Any], runs: Path, judged_as: Mapping[str, str]) -> dict[str, Any]:
    """What a digest is of. Of what another run of the study will write, neither the content nor where the
    folder of runs lies is known when this run is named: its folder's name says which weights it will have,
    and its evaluation, by that name in `judged_as`, which rows: a field that names the folder itself reads
    them. Other files count by content *and* path: of large weights a sample is read, and rows are keyed by a
    file's name."""
    found: dict[str, Any] = {}
    for key, value in fields.items():
        if value is None and key.lstrip(".") in LATER:
            continue
        own = _within_a_run(fields.get(key.removesuffix(f".{CONTENT}")), runs)
        if own is None:
            found[key] = value
        elif not key.endswith(f".{CONTENT}"):
            found[key] = (own, judged_as[own]) if own in judged_as else own
    return found


def _within_a_run(value: Any, runs: Path) -> str | None:
    """The path of a run's folder, or of what is in it, from the folder of runs; None for anything else."""
    path = Path(value).resolve() if isinstance(value, str) and "\n" not in value else None
    if path is None or not path.is_relative_to(runs.resolve()):
        return None
    inner = path.relative_to(runs.resolve())
    return inner.as_posix() if inner.parts and NAME.fullmatch(inner.parts[0]) else None


def digest(value: Any) -> str:
    """Of what JSON can hold, by its content."""
    return hashlib.sha256(json.dumps(value, sort_keys=True, default=str).encode()).hexdigest()[:DIGITS]


def _folder(runs: Path, name: str, seed: int, digest: str) -> Path:
    """The folder that holds this run already, of whatever study, or a new one."""
    there = sorted(runs.glob(f"*-{digest}"))
    return there[0] if there else runs / f"{slug(name)}_seed{seed}-{digest}"


def _refuse_doubles(jobs: Iterable[Job]) -> None:
    """Two names for one training would be one row told twice. By their digests: while no folder is there,
    theirs would have a name each. Raises: ConfigError."""
    seen: dict[str, Job] = {}
    for job in jobs:
        twin = seen.setdefault(job.digest, job)
        if twin is not job:
            raise ConfigError(
                f"runs: {twin.title!r} and {job.title!r} are the same training; leave one of them out"
            )


def standings(jobs: Iterable[Job]) -> dict[tuple[str, int], str]:
    """Name and seed of every run -> its state; of one that trains nothing, too, which training it waits for.

    Args:
        jobs: each behind those that it needs.
    """
    found: dict[tuple[str, int], str] = {}
    for job in jobs:
        state: str = job.state()
        waits = [key for key in job.needs if found[key] not in ("to be judged", "done")]
        if waits and state == "to be judged" and not job.fit:
            state = f"waits for {waits[0][0]}"
        found[job.name, job.seed] = state
    return found


def refuse_lost(jobs: Sequence[Job]) -> None:
    """Raises: ConfigError for a checkpoint that is yet to be judged and is not there, though its training is
    past that step: which ones stay is no part of what names a run, and that one kept others."""
    by_key = {(job.name, job.seed): job for job in jobs}
    for job in jobs:
        path = job.checkpoint
        if path is None or path.exists() or job.state() == "done":
            continue
        of = by_key[job.needs[0]]
        later = [own for own in path.parent.glob("step_*.ckpt") if _in_order(own) > _in_order(path)]
        if later or of.state() in ("to be judged", "done"):
            raise ConfigError(
                f"runs.{job.name}.step: {of.title!r} is past that step, and {path} is not there: it was "
                f"trained to keep other checkpoints; move {of.folder} aside, to train it again, or name "
                "another --runs"
            )


def _in_order(checkpoint: Path) -> tuple[int, str]:
    """Of more than six digits, too."""
    return len(checkpoint.name), checkpoint.name


def threads(workers: int) -> int:
    """How many threads each of several runs at a time may use: of the cores that this process may run on,
    and no more than OMP_NUM_THREADS says, where it is set."""
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    asked = os.environ.get("OMP_NUM_THREADS", "")
    return max(1, (min(cores, int(asked)) if asked.isdigit() else cores) // workers)
