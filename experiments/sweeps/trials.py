"""Which command lines a sweep's trials are, and in which folders.

A trial's folder is `trial_NNNN-DIGEST` in the sweep's own; the digest is of all of its configuration, so that
two trials with the same values share one training, and a sweep that has changed finds what it can still use.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from experiments.config.check import check
from experiments.config.compose import ConfigError, compose
from experiments.studies.scheduling import Job, check_attacks, digest, of_all, text_of
from experiments.sweeps.definition import Sweep
from experiments.sweeps.space import Space

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
    there = sorted((place / TRIALS).glob(f"*-{name}"))
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


def check_all(sweep: Sweep, space: Space) -> None:
    """Compose and check every extreme of every parameter, so that an impossible one fails before the first
    trial. Raises: ConfigError naming the parameters."""
    for number, corner in enumerate(space.corners()):
        values = space.values(corner)
        try:
            config = configuration(sweep, values)
            check(config, "fit")
        except ValueError as error:
            varied = space.dimensions[0].key if not number else _changed(space, corner)
            raise ConfigError(f"parameters (at {varied} = {values[varied]!r}): {error}") from error
        if not number:
            _check_evaluations(sweep, config, values)


def _changed(space: Space, corner: Mapping[str, Any]) -> str:
    first = space.corners()[0]
    return next(key for key, value in corner.items() if value != first[key])


def _check_evaluations(sweep: Sweep, config: Mapping[str, Any], values: Mapping[str, Any]) -> None:
    check_attacks(sweep.columns, config)
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


def identity(sweep: Sweep, space: Space, place: Path) -> str:
    """Digest of what decides a search: another one counts none of its trials."""
    first = space.values(space.corners()[0])
    return digest(
        {
            "config": of_all(configuration(sweep, first), place),
            "parameters": sweep.parameters,
            "method": sweep.method,
            "seed": sweep.seed,
            "metric": [sweep.metric.name, sweep.metric.goal],
            "columns": {label: own.metric.key for label, own in sweep.columns.items()},
            "constraints": [own.text for own in sweep.constraints],
            "early_terminate": str(sweep.early_terminate),
        }
    )
