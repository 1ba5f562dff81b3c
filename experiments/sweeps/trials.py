"""Which command lines a sweep's trials are, and in which folders.

A trial's folder is `trial_NNNN-DIGEST` in the sweep's own; the digest is of all of its configuration, so that
two trials with the same values share one training, and a sweep that has changed finds what it can still use.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping, Sequence
from itertools import islice, pairwise
from pathlib import Path
from typing import Any

from experiments.config.check import check
from experiments.config.compose import ConfigError, compose
from experiments.studies.measurable import check_columns_measured
from experiments.studies.scheduling import Job, digest, of_all, text_of
from experiments.sweeps.definition import Sweep
from experiments.sweeps.space import Dimension, Raw, Space

MOST_CHECKED = 256
"""Points of a grid that are checked before its first trial."""
TRIALS = "trials"
"""Folder of the run folders within the sweep's."""


def overrides_of(values: Mapping[str, Any]) -> list[tuple[str, str]]:
    """As on the command line."""
    return [(key, text_of(value)) for key, value in values.items()]


def configuration(sweep: Sweep, values: Mapping[str, Any]) -> dict[str, Any]:
    """The resolved configuration of a trial. Raises: ConfigError."""
    return compose(sweep.config, overrides_of(values))


def job_of(sweep: Sweep, values: Mapping[str, Any], number: int, place: Path, judged: bool = False) -> Job:
    """One trial as a run.

    Args:
        sweep: the sweep.
        values: dotted key -> value.
        number: of the trial; the folder of an earlier one with the same configuration is taken instead.
        place: the sweep's folder.
        judged: whether it is to be evaluated on test, as the best one is.

    Raises: ConfigError.
    """
    config = configuration(sweep, values)
    name = of_all(config, place)
    there = sorted((place / TRIALS).glob(f"trial_[0-9]*-{name}"))
    folder = there[0] if there else place / TRIALS / f"trial_{number:04d}-{name}"
    options = [f"--{key}={text}" for key, text in overrides_of(values)]
    options.append(f"--trainer.default_root_dir={folder}")
    files = [f"--config={file}" for file in sweep.config]
    more = [f"--config={file}" for file in sweep.test]
    judging = compose([*sweep.config, *sweep.test], overrides_of(values)) if judged else None
    return Job(
        name=f"trial {number}",
        seed=int(config.get("seed_everything") or 0),
        folder=folder,
        fit=("fit", *files, *options, "--ckpt_path=last"),
        test=("test", *files, *more, *options, "--ckpt_path=last"),
        needs=(),
        judged_by=of_all(judging, place) if judging is not None else "",
    )


def check_all(sweep: Sweep, space: Space) -> list[dict[str, Any]]:
    """Compose and check every extreme of every parameter, and a grid's first MOST_CHECKED points, so that an
    impossible one fails before the first trial; what else does not go together fails as a trial.

    Returns the configurations. Raises: ConfigError naming the parameter.
    """
    found: dict[str, dict[str, Any]] = {}

    def at(point: Mapping[str, Raw]) -> dict[str, Any]:
        label = json.dumps(point, sort_keys=True)
        if label not in found:
            found[label] = configuration(sweep, space.values(point))
            check(found[label], "fit")
        return found[label]

    for own in space.dimensions:
        for point in space.corners(own):
            try:
                at(point)
            except ValueError as error:
                value = own.value(point[own.key])
                raise ConfigError(f"parameters (at {own.key} = {value!r}): {error}") from error
    for point in islice(space.grid(), MOST_CHECKED) if sweep.method == "grid" else ():
        try:
            at(point)
        except ValueError as error:
            raise ConfigError(f"parameters (at {space.values(point)}): {error}") from error
    first = space.point({})
    _check_evaluations(sweep, at(first), space.values(first))
    for own in space.dimensions:
        _check_effect(space, own, at)
    return [*found.values()]


def _check_effect(space: Space, own: Dimension, at: Callable[[Mapping[str, Raw]], dict[str, Any]]) -> None:
    """Raises: ConfigError where two values of a parameter are the same training, whatever the others are."""
    corners = space.corners(own)
    others = [point for other in space.dimensions if other != own for point in space.corners(other)]
    for first, second in pairwise(corners):
        if _placed(at(first)) != _placed(at(second)):
            continue
        for other in others:
            pair = [space.point({**other, own.key: corner[own.key]}) for corner in (first, second)]
            try:
                if own.key in pair[0] and _placed(at(pair[0])) != _placed(at(pair[1])):
                    break
            except ConfigError:  # these do not go together: such a trial will have failed
                continue
        else:
            texts = [json.dumps(own.value(corner[own.key])) for corner in (first, second)]
            raise ConfigError(
                f"parameters.{own.key}: {' and '.join(texts)} are the same training: nothing reads it, or "
                "another parameter sets it; leave it out"
            )


def _placed(config: Mapping[str, Any]) -> dict[str, Any]:
    """A configuration without the folder, which every trial is given."""
    trainer = {key: value for key, value in config.get("trainer", {}).items() if key != "default_root_dir"}
    return {**config, "trainer": trainer}


def _check_evaluations(sweep: Sweep, config: Mapping[str, Any], values: Mapping[str, Any]) -> None:
    check_columns_measured(sweep.columns, config)
    schedules = [
        (own.get("init_args") or {}).get("schedule") or {}
        for own in (config.get("trainer") or {}).get("callbacks") or []
    ]
    for number, constraint in enumerate(sweep.constraints):
        if constraint.against_start and not any(own.get("at_start") for own in schedules):
            raise ConfigError(
                f"constraints.{number}: compares with the start, and no evaluation has schedule.at_start; "
                "set it, or say at_least or at_most"
            )
    if sweep.early_terminate is not None and not any(own.get("every_n_steps") for own in schedules):
        raise ConfigError(
            "early_terminate: compares periodic evaluations, and none has schedule.every_n_steps; set it"
        )
    if sweep.test:
        check(compose([*sweep.config, *sweep.test], overrides_of(values)), "test")


def fingerprint(sweep: Sweep, space: Space, place: Path) -> str:
    """Changes with what the sweep's files say of a trial. Raises: ConfigError."""
    return of_all(configuration(sweep, space.values(space.point({}))), place)


def identity(sweep: Sweep, corners: Sequence[Mapping[str, Any]], place: Path) -> str:
    """Digest of what decides a search: another one counts none of its trials.

    Args:
        sweep: the sweep.
        corners: what `check_all` has composed: all that a change of its files can do to a trial.
        place: the sweep's folder.
    """
    return digest(
        {
            "config": [of_all(dict(own), place) for own in corners],
            "parameters": sweep.parameters,
            "conditions": sweep.conditions,
            "method": sweep.method,
            "seed": sweep.seed,
            "metric": [sweep.metric.name, sweep.metric.goal],
            "columns": {label: own.metric.key for label, own in sweep.columns.items()},
            "constraints": [repr(own) for own in sweep.constraints],
            "early_terminate": str(sweep.early_terminate),
        }
    )
