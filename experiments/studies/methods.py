"""Training methods beside each other: each tuned by the same small search on validation, trained with several
seeds, judged once on test.

The search tries three learning rates, then, at the best of them, the method made stronger and the method tied
closer to the reference: five trainings for every method.

python -m experiments.studies.methods --out experiments/results/methods_cpu_202611

Every run is a run folder of its own; finished ones are kept, and a killed comparison goes on where it stood.
Methods that `--out` already holds are taken from there, rows and all: another machine goes on with the rest.
`--report_only` draws the tables from what is there.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Literal

from experiments.counting import counter
from experiments.studies.archive import slug
from experiments.studies.methods_recorded import SEARCH, recorded, searched
from experiments.studies.methods_search import (
    BASE,
    NO_DEFENCE,
    OPTIONAL,
    comparison,
    search_table,
    validation_score,
)
from experiments.studies.study_report import write_study

TEST = "configs/data/tinychat_test.yaml"
TRANSFER = "configs/evaluation/transfer.yaml"
RED_TEAM = "configs/experiment/red_team_tinychat.yaml"
NO_ATTACK, ONE_STEP = "--config=configs/attack/none.yaml", "--config=configs/attack/one_step.yaml"
RATES = ("2e-4", "6e-4", "1.5e-3")
"""Learning rates that the search of every method tries, each for all the steps and with one seed."""
SEARCH_SEED = 100

OBJECTIVE = "--model.init_args.objective.init_args"
TERM = "--model.init_args.terms.0.init_args"
WIDER = ("--vars.epsilon=0.2",)
HEAVIER = (f"{OBJECTIVE}.weight_toward=1.0", f"{OBJECTIVE}.weight_away=1.0")
RETAIN = ("--config=configs/term/kl_retain.yaml", "--vars.kl_weight=1.0")


@dataclass(frozen=True)
class Variant:
    """A method's YAML with what is put on top of it.

    Args:
        method: file of configs/method.
        extra: words that make the variant.
        stronger: words of the search's try against the attack: a radius or weight twice as large.
        tied: words of the search's try for the model's other replies: a tie to the reference.
    """

    method: str
    extra: tuple[str, ...] = ()
    stronger: tuple[str, ...] = WIDER
    tied: tuple[str, ...] = RETAIN


def _preference(method: str, beta: str, *extra: str, stronger: tuple[str, ...] = WIDER) -> Variant:
    """These have a tie to the reference of their own, beta: IPO wants a margin of 1 / (2 beta). The try's is
    many times the method's."""
    return Variant(method, extra, stronger, (f"{OBJECTIVE}.beta={beta}",))


VARIANTS: dict[str, Variant] = {
    "cat": Variant("cat"),
    "cat, no attack": Variant("cat", (NO_ATTACK,), HEAVIER),
    "cat, one step": Variant("cat", (ONE_STEP,)),
    "capo": _preference("capo", "4.0"),
    # Its beta alone says how far it goes: smaller is a wider margin.
    "capo, no attack": _preference("capo", "4.0", NO_ATTACK, stronger=(f"{OBJECTIVE}.beta=0.125",)),
    "capo, one step": _preference("capo", "4.0", ONE_STEP),
    "capo with utility": _preference(
        "capo", "4.0", f"{OBJECTIVE}.weight_utility=1.0", "--data.init_args.utility_per_step=32"
    ),
    "r2d2": Variant("r2d2", stronger=HEAVIER),
    "lat": Variant("lat", stronger=("--vars.latent_epsilon=0.2",)),
    "circuit breakers": Variant("circuit_breakers", stronger=(f"{TERM}.alpha=20.0",)),
    "mixat": Variant("mixat"),
    "er cat": Variant("er_cat"),
    "cat kl": Variant("cat_kl", tied=(f"{TERM}.weight=4.0",)),
    "capo dpo": _preference("capo_dpo", "1.6"),
    "capo hinge": _preference("capo_hinge", "8.0"),
    "npo": _preference("npo", "1.6"),
    "noise augmentation": Variant("noise_augmentation", stronger=HEAVIER[:1]),
    "adversarial fine tuning": Variant("adversarial_fine_tuning", stronger=HEAVIER[:1]),
    # All of it is a tie to the reference: the tighter one is the distribution as it is, not softened.
    "distillation": Variant("distillation", tied=(f"{TERM}.temperature=1.0",)),
    "red team replay": Variant("red_team_replay", stronger=HEAVIER),
    "prompt generator": Variant("prompt_generator", stronger=HEAVIER),
}


@dataclass(frozen=True)
class Setting:
    """One try of a search."""

    rate: str
    change: Literal["", "stronger", "tied"] = ""

    def __str__(self) -> str:
        return f"{self.rate} {self.change}".strip()

    @property
    def folder(self) -> str:
        """In names of folders."""
        return str(self).replace(" ", "_")

    def words(self, variant: Variant) -> tuple[str, ...]:
        """On the command line."""
        change = getattr(variant, self.change) if self.change else ()
        return (f"--model.init_args.optimizer.lr={self.rate}", *change)


@dataclass(frozen=True)
class Study:
    """Where the runs lie and how long they are.

    Args:
        runs: folder of the run folders.
        steps: optimiser steps of every run.
        seeds: seeds of the runs that are judged on test.
        overrides: fields of every run, as on the command line, for a short trial of the study itself.
        recorded: what an earlier call has judged, by name and seed: it is neither trained nor judged again.
    """

    runs: Path
    steps: int
    seeds: tuple[int, ...]
    overrides: tuple[str, ...] = ()
    recorded: Mapping[str, dict[int, Path]] = field(default_factory=dict)

    def folder(self, name: str, what: str) -> Path:
        return self.runs / slug(name) / what

    def searched(self, name: str, setting: Setting) -> Path:
        """The run folder of one try."""
        return self.folder(name, f"search_{setting.folder}")

    def tries(self, name: str) -> list[Setting]:
        """The settings of a search whose learning rates have been tried."""
        rates = [Setting(rate) for rate in RATES]
        best = self._best(name, rates).rate
        return [*rates, Setting(best, "stronger"), Setting(best, "tied")]

    def judged(self, name: str) -> dict[int, Path]:
        """The run folders that are judged on test, by seed; what is not trained has one."""
        if name in self.recorded:
            return self.recorded[name]
        if name == NO_DEFENCE:
            return {seed: self.folder(name, f"seed{seed}") for seed in self.seeds[:1]}
        # A search that goes on may choose otherwise: what an earlier choice trained is not taken for this.
        setting = self.chosen(name).folder
        return {seed: self.folder(name, f"seed{seed}_{setting}") for seed in self.seeds}

    def search(self, name: str, settings: Sequence[Setting]) -> list[Callable[[], None]]:
        return [partial(self._search, name, setting) for setting in settings]

    def _search(self, name: str, setting: Setting) -> None:
        if not self._tried(name, setting):
            self._fit(name, self.searched(name, setting), SEARCH_SEED, setting)

    def chosen(self, name: str) -> Setting:
        """The setting that does best on validation; see `validation_score`."""
        return self._best(name, self.tries(name))

    def _best(self, name: str, settings: Sequence[Setting]) -> Setting:
        return max(settings, key=lambda own: validation_score(self.searched(name, own)))

    def final(self, name: str) -> list[Callable[[], None]]:
        return [partial(self._final, name, seed) for seed in self.judged(name)]

    def finished(self, name: str) -> dict[int, Path] | None:
        """The judged folders where all of a method's runs are there, else None."""
        if name in self.recorded:
            return self.recorded[name]
        if name != NO_DEFENCE:
            rates = [Setting(rate) for rate in RATES]
            if not all(self._tried(name, own) for own in rates):
                return None
            if not all(self._tried(name, own) for own in self.tries(name)):
                return None
        folders = self.judged(name)
        return folders if all((own / "test_results.json").is_file() for own in folders.values()) else None

    def _tried(self, name: str, setting: Setting) -> bool:
        return (self.searched(name, setting) / "results.json").is_file()

    def _final(self, name: str, seed: int) -> None:
        folder = self.judged(name)[seed]
        if (folder / "test_results.json").is_file():
            return
        if name == NO_DEFENCE:
            self._command("test", name, folder, seed, f"--config={TEST}")
            return
        if not (folder / "results.json").is_file():
            self._fit(name, folder, seed, self.chosen(name))
        more = (
            f"--config={TEST}",
            f"--config={TRANSFER}",
            f"--vars.transfer_from={self.judged(NO_DEFENCE)[self.seeds[0]]}",
            "--ckpt_path=last",
            *self.chosen(name).words(VARIANTS[name]),
        )
        self._command("test", name, folder, seed, *more)

    def _fit(self, name: str, folder: Path, seed: int, setting: Setting) -> None:
        self._command("fit", name, folder, seed, "--ckpt_path=last", *setting.words(VARIANTS[name]))

    def _command(self, command: str, name: str, folder: Path, seed: int, *more: str) -> None:
        """One process on one thread, as a user would type it. Raises: RuntimeError with the end of its
        output."""
        variant = VARIANTS.get(name, VARIANTS["cat"])
        words = [sys.executable, "-m", "experiments.cli", command, f"--config={BASE}"]
        words += [f"--config=configs/method/{variant.method}.yaml", *variant.extra, *more]
        words += [*self.overrides, f"--trainer.default_root_dir={folder}"]
        words += [f"--seed_everything={seed}", f"--trainer.max_steps={self.steps}"]
        if variant.method == "red_team_replay":
            words.append(f"--vars.red_team={self.runs / 'red_team'}")
        folder.mkdir(parents=True, exist_ok=True)
        _run(words, folder / "log.txt")

    def red_team(self) -> None:
        """Attack training requests, for red-team replay."""
        folder = self.runs / "red_team"
        if not (folder / "test_results.json").is_file():
            folder.mkdir(parents=True, exist_ok=True)
            words = [sys.executable, "-m", "experiments.cli", "test", "--config", RED_TEAM]
            _run([*words, f"--trainer.default_root_dir={folder}"], folder / "log.txt")


def _run(words: Sequence[str], log: Path) -> None:
    threads = {"OMP_NUM_THREADS": "1", "OMP_WAIT_POLICY": "PASSIVE"}
    with log.open("a", encoding="utf-8") as stream:
        status = subprocess.run(
            words, stdout=stream, stderr=subprocess.STDOUT, env=os.environ | threads, check=False
        ).returncode
    if status:
        end = log.read_text(encoding="utf-8")[-2000:]
        raise RuntimeError(f"{' '.join(words)}\nended with status {status}: {end}")


def work(jobs: Sequence[Callable[[], None]], workers: int, title: str) -> None:
    """Do the jobs, several at a time. Raises: RuntimeError of the first that failed, when all have ended."""
    with ThreadPoolExecutor(workers) as pool, counter(len(jobs), title, "run") as bar:
        waiting = [pool.submit(job) for job in jobs]
        for own in waiting:
            own.add_done_callback(lambda _: bar.update())
        for own in waiting:
            own.result()


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    add = parser.add_argument
    add("--out", type=Path, default=Path("experiments/results/methods_cpu_202611"), help="tables and figure")
    add("--runs", type=Path, default=Path("runs/methods"), help="folder of the runs")
    add("--seeds", type=int, nargs="+", default=[0, 1, 2], help="seeds of weights, data order and attacks")
    add("--steps", type=int, default=60, help="optimiser steps of every run")
    add("--workers", type=int, default=2, help="runs at a time, one thread each")
    known = "; ".join(VARIANTS)
    add("--methods", nargs="+", choices=[*VARIANTS], default=[*VARIANTS], metavar="NAME", help=f"of: {known}")
    add("--override", nargs="+", default=[], metavar="KEY=VALUE", help="fields of every run, for a trial")
    add("--report_only", action="store_true", help="run nothing")
    call = parser.parse_args()
    seeds, overrides = tuple(call.seeds), tuple(f"--{own}" for own in call.override)
    try:
        before = recorded(call.out, seeds, call.steps, VARIANTS)
    except ValueError as error:
        sys.exit(str(error))
    if before and overrides:
        parser.error(f"--override: {call.out} holds a whole comparison; name another --out for a trial")
    study = Study(call.runs, call.steps, seeds, overrides, before)
    missing = [name for name in (NO_DEFENCE, *call.methods) if name not in before]
    if not call.report_only:
        run(study, missing, call.workers)
    names = [NO_DEFENCE, *(name for name in VARIANTS if name in (*before, *call.methods))]
    try:
        report(study, names, call.out)
    except ValueError as error:  # rows that are missing or damaged, of recorded runs too
        sys.exit(str(error))


def run(study: Study, names: Sequence[str], workers: int) -> None:
    """Method by method, so that a comparison that is cut short has whole methods in it."""
    if "red team replay" in names:
        study.red_team()
    for name in names:
        if name != NO_DEFENCE:
            rates = [Setting(rate) for rate in RATES]
            work(study.search(name, rates), workers, f"{name}: learning rate")
            work(study.search(name, study.tries(name)), workers, f"{name}: strength, tie")
        work(study.final(name), workers, f"{name}: seeds")


def report(study: Study, names: Sequence[str], out: Path) -> None:
    """Write and print what the finished methods reached, and what their searches did. Raises: ValueError
    where there is none, or rows are missing."""
    found = {name: study.finished(name) for name in names}
    done = {name: folders for name, folders in found.items() if folders is not None}
    if not done:
        raise ValueError(f"{study.runs}: no method is finished; run without --report_only")
    trained = [name for name in done if name != NO_DEFENCE]
    new = [name for name in trained if name not in study.recorded]
    chosen = {name: str(study.chosen(name)) for name in new}
    tried = {name: {str(own): study.searched(name, own) for own in study.tries(name)} for name in new}
    out.mkdir(parents=True, exist_ok=True)
    path = out / SEARCH
    table = searched(out) if any(name != NO_DEFENCE for name in study.recorded) else {}
    table |= search_table(tried, chosen)
    table = {name: table[name] for name in trained}
    path.write_text(json.dumps(table, indent=1) + "\n", encoding="utf-8")
    settings = {name: own["chosen"] for name, own in table.items()}
    print(write_study(comparison([*done], study.seeds, settings), done, out, OPTIONAL, settings))


if __name__ == "__main__":
    main()
