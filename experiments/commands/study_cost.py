"""What `thundercat study FILE --dry_run` says of costs: measured where a run is trained, else planned.

A plan is that of `thundercat plan`: one training step is executed without weights and counted, on rows as
long as rows may be and with an attack that no example ends early: what a run takes is less. The seeds of a
run share it. What judging the models costs is in neither.
"""

from __future__ import annotations

import copy
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from statistics import fmean
from typing import Any

from callbacks.run_folder.folder import RunFolder
from experiments.config.compose import ConfigError
from experiments.studies.scheduling import Job


@dataclass(frozen=True)
class Planned:
    """One training, on paper."""

    steps: int
    flops: float
    """Floating-point operations of all steps."""
    passes: int
    """Passes over the layers of all steps, forward and backward ones, each of a whole batch."""
    tokens: int
    """Length of the rows: the longest that they may have."""

    @property
    def text(self) -> str:
        most = f"{self.flops / 1e12:,.2f} TFLOP and {self.passes:,} passes over the layers"
        return f"planned: {self.steps:,} steps, at most {most}"


class Costs:
    """Costs of a study's runs; plans are made when they are first asked for.

    Args:
        jobs: all of the study's.
    """

    def __init__(self, jobs: Sequence[Job]) -> None:
        self.jobs = jobs
        self._plans: dict[str, Planned | str] = {}

    def text(self, job: Job) -> str:
        """One run's, in one line."""
        if not job.fit:
            return "not trained"
        if _left(job):
            plan = self._plan(job)
            return plan.text if isinstance(plan, Planned) else f"no plan: {plan}"
        cost = _measured(job)
        if cost is None:
            return "trained, its seconds are in no cost.json"
        return f"trained in {cost['seconds']:,.0f} s, {cost.get('passes', 0):,.0f} passes of a row"

    def total(self) -> str:
        """What is left of the whole study."""
        trainings = [job for job in self.jobs if job.fit]
        left = [job for job in trainings if _left(job)]
        judged = sum(job.state() != "done" for job in self.jobs)
        begun = sum(job.state() == "begun" for job in left)
        whole = f" (begun ones counted whole: {begun})" if begun else ""
        said = [f"left: {len(left)} of {len(trainings)} trainings{whole}"]
        plans = [plan for job in left if isinstance(plan := self._plan(job), Planned)]
        if plans:
            lengths = sorted({plan.tokens for plan in plans})
            tokens = " to ".join(f"{length:,}" for length in dict.fromkeys((lengths[0], lengths[-1])))
            flops = sum(plan.flops for plan in plans)
            said.append(
                f"{len(plans)} of them planned, at most {flops / 1e12:,.2f} TFLOP: "
                f"all rows of {tokens} tokens, their longest, and no attack ends by its stop_loss"
            )
        seconds = [found for job in left if (found := self._seconds(job)) is not None]
        if seconds:
            said.append(f"{len(seconds)} of them about {sum(seconds):,.0f} s, as those trained here")
        said.append(f"{judged} of {len(self.jobs)} evaluations, whose cost is in no plan")
        return "; ".join(said)

    def _plan(self, job: Job) -> Planned | str:
        """Of a run, whichever its seed; why there is none, where there is none."""
        if job.name not in self._plans:
            try:
                self._plans[job.name] = _planned(self._with_known_base(job))
            except (ValueError, OSError) as error:
                self._plans[job.name] = " ".join(str(error).split())
        return self._plans[job.name]

    def _with_known_base(self, job: Job) -> dict[str, Any]:
        """The configuration; a model that another run is yet to write has that run's architecture."""
        config = copy.deepcopy(dict(job.config))
        by_key = {(own.name, own.seed): own for own in self.jobs}
        waiting = list(job.needs)
        while waiting:
            needed = by_key[waiting.pop()]
            base, own = _base(config), _base(needed.config)
            if _left(needed) and Path(str(base.get("name_or_path"))).is_relative_to(needed.folder):
                base |= {name: own.get(name) for name in ("name_or_path", "revision", "gguf_file")}
                waiting += needed.needs
        return config

    def _seconds(self, job: Job) -> float | None:
        """By the run's other seeds, else by its plan at the pace of one that is planned and trained."""
        same = self._trained(job.name)
        if same:
            return fmean(same)
        plan = self._plan(job)
        pace = self._pace() if isinstance(plan, Planned) else None
        return plan.flops / pace if isinstance(plan, Planned) and pace is not None else None

    def _trained(self, name: str) -> list[float]:
        found = [_measured(job) for job in self.jobs if job.name == name and job.fit and not _left(job)]
        return [cost["seconds"] for cost in found if cost is not None]

    def _pace(self) -> float | None:
        """Planned operations a measured second, of the first run that has both; None where none has."""
        for job in self.jobs:
            seconds = self._trained(job.name)
            plan = self._plan(job) if seconds else None
            if isinstance(plan, Planned):
                return plan.flops / fmean(seconds)
        return None


def _left(job: Job) -> bool:
    return job.state() in ("not begun", "begun")


def _base(config: Mapping[str, Any]) -> dict[str, Any]:
    """Fields of the model that a configuration begins with."""
    base: dict[str, Any] = config.get("model", {}).get("init_args", {}).get("base") or {}
    return base


def _measured(job: Job) -> dict[str, float] | None:
    """What a training has counted; None where it cannot be read, or took no time."""
    path = RunFolder.of(job.folder).cost
    try:
        found: dict[str, float] = json.loads(path.read_text(encoding="utf-8"))
        return found if found["seconds"] > 0 else None
    except (OSError, ValueError, KeyError, TypeError):
        return None


def _planned(config: Mapping[str, Any]) -> Planned:
    """Raises: ConfigError, or what the plan raises: OSError, ValueError."""
    steps = (config.get("trainer") or {}).get("max_steps")
    if not isinstance(steps, int) or steps < 1:
        raise ConfigError(f"trainer.max_steps: a plan expects a number of steps, got {steps}")
    # Torch is imported only where something is to be planned.
    from experiments.commands.plan import PlanSettings, executed
    from experiments.planning.step import calm

    with calm():
        done = executed(config, PlanSettings(), steps=1)  # a second one would tell memory alone
    tokens = done.rows["prompt_tokens"] + done.rows["reply_tokens"]
    return Planned(steps, float(steps * done.cost.flops.total()), steps * done.cost.sweeps.total(), tokens)
