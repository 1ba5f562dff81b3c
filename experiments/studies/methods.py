"""Which setting each training method has in the study of all methods: every method tuned by the same small
search on validation, none judged here.

The search tries three learning rates, then, at the best of them, the method made stronger and the method tied
closer to the reference: five trainings for every method, one seed.

    python -m experiments.studies.methods

prints what was tried and chosen. `configs/study/methods_tinychat.yaml` has the chosen settings, trains them
with seeds of its own and judges them on test. Methods that `--out` has are not searched again; every try is a
run folder, finished ones are kept, and a killed search goes on where it stood.
"""

from __future__ import annotations

import argparse
import os
import subprocess
import sys
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Literal

from callbacks.report.markdown import table_text
from experiments.counting import counter
from experiments.studies.archive import slug
from experiments.studies.methods_search import Tries, chosen, reached, searched, table, write

BASE = "configs/experiment/methods_tinychat.yaml"
RED_TEAM = "configs/experiment/red_team_tinychat.yaml"
NO_ATTACK, ONE_STEP = "--config=configs/attack/none.yaml", "--config=configs/attack/one_step.yaml"
RATES = ("2e-4", "6e-4", "1.5e-3")
"""Learning rates that the search of every method tries, each for all the steps and with one seed."""
SEED = 100
"""Of every try; none of the study's."""

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
    "cat deep": Variant("cat_deep"),
    "deep alignment": Variant("deep_alignment", stronger=HEAVIER[:1]),
    "deep refusal": Variant("deep_refusal", stronger=HEAVIER[:1]),
    "refat": Variant("refat", stronger=HEAVIER[:1]),
}


@dataclass(frozen=True)
class Setting:
    """One try of a search."""

    rate: str
    change: Literal["", "stronger", "tied"] = ""

    def __str__(self) -> str:
        return f"{self.rate} {self.change}".strip()

    @classmethod
    def of(cls, text: str) -> Setting:
        """From what `str` makes of it."""
        rate, _, change = text.partition(" ")
        return cls(rate, change)  # type: ignore[arg-type]

    @property
    def folder(self) -> str:
        """In names of folders."""
        return str(self).replace(" ", "_")

    def words(self, variant: Variant) -> tuple[str, ...]:
        """On the command line."""
        change = getattr(variant, self.change) if self.change else ()
        return (f"--model.init_args.optimizer.lr={self.rate}", *change)


@dataclass(frozen=True)
class Search:
    """Where the tries lie.

    Args:
        runs: folder of the run folders.
        overrides: fields of every run, as on the command line, for a short trial of the search itself.
    """

    runs: Path
    overrides: tuple[str, ...] = ()

    def folder(self, name: str, setting: Setting) -> Path:
        """The run folder of one try."""
        return self.runs / slug(name) / f"search_{setting.folder}"

    def tries(self, name: str) -> list[Setting]:
        """The settings of a search whose learning rates have been tried."""
        rates = [Setting(rate) for rate in RATES]
        best = chosen(self.found(name, rates))
        return [*rates, Setting(best, "stronger"), Setting(best, "tied")]

    def found(self, name: str, settings: Sequence[Setting]) -> Tries:
        """What finished tries have reached."""
        return {str(own): reached(self.folder(name, own)) for own in settings}

    def jobs(self, name: str, settings: Sequence[Setting]) -> list[Callable[[], None]]:
        return [partial(self._try, name, setting) for setting in settings]

    def words(self, name: str, setting: Setting) -> list[str]:
        """What makes a try, on the command line of `thundercat fit`."""
        variant = VARIANTS[name]
        words = [f"--config={BASE}", f"--config=configs/method/{variant.method}.yaml", *variant.extra]
        if variant.method == "red_team_replay":
            words.append(f"--vars.red_team={self.runs / 'red_team'}")
        return [*words, *setting.words(variant)]

    def _try(self, name: str, setting: Setting) -> None:
        """One process on one thread, as a user would type it. Raises: RuntimeError with the end of its
        output."""
        folder = self.folder(name, setting)
        if (folder / "results.json").is_file():
            return
        folder.mkdir(parents=True, exist_ok=True)
        own = [*self.words(name, setting), *self.overrides, f"--trainer.default_root_dir={folder}"]
        _run(["fit", *own, f"--seed_everything={SEED}", "--ckpt_path=last"], folder / "log.txt")

    def red_team(self) -> None:
        """Attack training requests, for red-team replay."""
        folder = self.runs / "red_team"
        if not (folder / "test_results.json").is_file():
            folder.mkdir(parents=True, exist_ok=True)
            _run(["test", f"--config={RED_TEAM}", f"--trainer.default_root_dir={folder}"], folder / "log.txt")


def _run(words: Sequence[str], log: Path) -> None:
    command = [sys.executable, "-m", "experiments.cli", *words]
    threads = {"OMP_NUM_THREADS": "1", "OMP_WAIT_POLICY": "PASSIVE"}
    with log.open("a", encoding="utf-8") as stream:
        status = subprocess.run(
            command, stdout=stream, stderr=subprocess.STDOUT, env=os.environ | threads, check=False
        ).returncode
    if status:
        end = log.read_text(encoding="utf-8")[-2000:]
        raise RuntimeError(f"{' '.join(command)}\nended with status {status}: {end}")


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
    add("--out", type=Path, default=Path("experiments/results/methods_cpu_202611"), help="of search.csv")
    add("--runs", type=Path, default=Path("runs/methods"), help="folder of the tries")
    add("--workers", type=int, default=2, help="tries at a time, one thread each")
    known = "; ".join(VARIANTS)
    add("--methods", nargs="+", choices=[*VARIANTS], default=[*VARIANTS], metavar="NAME", help=f"of: {known}")
    add("--override", nargs="+", default=[], metavar="KEY=VALUE", help="fields of every try, for a trial")
    call = parser.parse_args()
    try:
        found = searched(call.out, VARIANTS)
    except ValueError as error:
        sys.exit(str(error))
    if found and call.override:
        parser.error(f"--override: {call.out} holds a search; name another --out for a trial")
    search = Search(call.runs, tuple(f"--{own}" for own in call.override))
    for name in call.methods:
        if name not in found:
            found[name] = run(search, name, call.workers)
            # Method by method: a search that is cut short has whole methods in it.
            write(call.out, {own: found[own] for own in VARIANTS if own in found})
    told = {own: found[own] for own in VARIANTS if own in call.methods}
    print(table_text(table(told)))
    for name, tries in told.items():
        print(f"{name}: {chosen(tries)}: {' '.join(search.words(name, Setting.of(chosen(tries))))}")


def run(search: Search, name: str, workers: int) -> Tries:
    """Try a method's settings. Returns: what each has reached."""
    if VARIANTS[name].method == "red_team_replay":
        search.red_team()
    work(search.jobs(name, [Setting(rate) for rate in RATES]), workers, f"{name}: learning rate")
    work(search.jobs(name, search.tries(name)), workers, f"{name}: strength, tie")
    return search.found(name, search.tries(name))


if __name__ == "__main__":
    main()
