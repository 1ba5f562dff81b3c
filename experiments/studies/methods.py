"""Training methods beside each other: each tuned by the same small search on validation, trained with several
seeds, judged once on test.

python -m experiments.studies.methods --out experiments/results/methods_cpu_202611

Every run is a run folder of its own; finished ones are kept, and a killed comparison goes on where it stood.
`--report_only` draws the tables from what is there.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from functools import partial
from pathlib import Path

from tqdm.auto import tqdm

from experiments.studies.methods_report import NO_DEFENCE, search_table, validation_score, write_comparison

BASE = "configs/experiment/methods_tinychat.yaml"
TEST = "configs/data/tinychat_test.yaml"
TRANSFER = "configs/evaluation/transfer.yaml"
RED_TEAM = "configs/experiment/red_team_tinychat.yaml"
NO_ATTACK, ONE_STEP = "configs/attack/none.yaml", "configs/attack/one_step.yaml"
RATES = ("2e-4", "6e-4", "1.5e-3")
"""Learning rates that the search of every method tries, each for all the steps and with one seed."""
SEARCH_SEED = 100


@dataclass(frozen=True)
class Variant:
    """A method's YAML with what is put on top of it."""

    method: str
    files: tuple[str, ...] = ()
    overrides: tuple[str, ...] = ()


VARIANTS: dict[str, Variant] = {
    "cat": Variant("cat"),
    "cat, no attack": Variant("cat", (NO_ATTACK,)),
    "cat, one step": Variant("cat", (ONE_STEP,)),
    "capo": Variant("capo"),
    "capo, no attack": Variant("capo", (NO_ATTACK,)),
    "capo, one step": Variant("capo", (ONE_STEP,)),
    "capo with utility": Variant(
        "capo",
        overrides=(
            "--model.init_args.objective.init_args.weight_utility=1.0",
            "--data.init_args.utility_per_step=32",
        ),
    ),
    **{
        name.replace("_", " "): Variant(name)
        for name in (
            "r2d2",
            "lat",
            "circuit_breakers",
            "mixat",
            "er_cat",
            "cat_kl",
            "capo_dpo",
            "capo_hinge",
            "npo",
            "noise_augmentation",
            "adversarial_fine_tuning",
            "distillation",
            "red_team_replay",
            "prompt_generator",
        )
    },
}


@dataclass(frozen=True)
class Study:
    """Where the runs lie and how long they are.

    Args:
        runs: folder of the run folders.
        steps: optimiser steps of every run.
        seeds: seeds of the runs that are judged on test.
        overrides: fields of every run, as on the command line, for a short trial of the study itself.
    """

    runs: Path
    steps: int
    seeds: tuple[int, ...]
    overrides: tuple[str, ...] = ()

    def folder(self, name: str, what: str) -> Path:
        return self.runs / name.replace(", ", "_").replace(" ", "_") / what

    def searched(self, name: str) -> dict[str, Path]:
        """The search's run folders by learning rate."""
        return {rate: self.folder(name, f"search_{rate}") for rate in RATES}

    def judged(self, name: str) -> dict[int, Path]:
        """The run folders that are judged on test, by seed; what is not trained has one."""
        seeds = self.seeds[:1] if name == NO_DEFENCE else self.seeds
        return {seed: self.folder(name, f"seed{seed}") for seed in seeds}

    def search(self, name: str) -> list[Callable[[], None]]:
        return [partial(self._search, name, rate) for rate in RATES] if name != NO_DEFENCE else []

    def _search(self, name: str, rate: str) -> None:
        folder = self.searched(name)[rate]
        if not (folder / "results.json").is_file():
            self._fit(name, folder, SEARCH_SEED, rate)

    def chosen(self, name: str) -> str:
        """The learning rate that does best on validation; see `validation_score`."""
        return max(RATES, key=lambda rate: validation_score(self.searched(name)[rate]))

    def final(self, name: str) -> list[Callable[[], None]]:
        return [partial(self._final, name, seed) for seed in self.judged(name)]

    def _final(self, name: str, seed: int) -> None:
        folder = self.judged(name)[seed]
        if (folder / "test_results.json").is_file():
            return
        if name == NO_DEFENCE:
            self._command("test", name, folder, seed, TEST)
            return
        if not (folder / "results.json").is_file():
            self._fit(name, folder, seed, self.chosen(name))
        more = (
            f"--config={TRANSFER}",
            f"--vars.transfer_from={self.judged(NO_DEFENCE)[self.seeds[0]]}",
            "--ckpt_path=last",
            self._rate(self.chosen(name)),
        )
        self._command("test", name, folder, seed, TEST, *more)

    def _fit(self, name: str, folder: Path, seed: int, rate: str) -> None:
        self._command("fit", name, folder, seed, None, "--ckpt_path=last", self._rate(rate))

    @staticmethod
    def _rate(rate: str) -> str:
        return f"--model.init_args.optimizer.lr={rate}"

    def _command(
        self, command: str, name: str, folder: Path, seed: int, data: str | None, *more: str
    ) -> None:
        """One process on one thread, as a user would type it. Raises: RuntimeError with the end of its
        output."""
        variant = VARIANTS.get(name, VARIANTS["cat"])
        files = [BASE, f"configs/method/{variant.method}.yaml", *variant.files, *([data] if data else [])]
        words = [sys.executable, "-m", "experiments.cli", command]
        words += [word for file in files for word in ("--config", file)]
        words += [*variant.overrides, *more, *self.overrides, f"--trainer.default_root_dir={folder}"]
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
    with ThreadPoolExecutor(workers) as pool, tqdm(total=len(jobs), desc=title, unit="run") as bar:
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
    names = "; ".join(VARIANTS)
    add("--methods", nargs="+", choices=[*VARIANTS], default=[*VARIANTS], metavar="NAME", help=f"of: {names}")
    add("--override", nargs="+", default=[], metavar="KEY=VALUE", help="fields of every run, for a trial")
    add("--report_only", action="store_true", help="run nothing")
    call = parser.parse_args()
    study = Study(call.runs, call.steps, tuple(call.seeds), tuple(f"--{own}" for own in call.override))
    if not call.report_only:
        if "red team replay" in call.methods:
            study.red_team()
        # Method by method, so that a comparison that is cut short has whole methods in it.
        for name in (NO_DEFENCE, *call.methods):
            work(study.search(name), call.workers, f"{name}: search")
            work(study.final(name), call.workers, f"{name}: seeds")
    judged = {name: study.judged(name) for name in (NO_DEFENCE, *call.methods)}
    done = {
        name: folders
        for name, folders in judged.items()
        if all((folder / "test_results.json").is_file() for folder in folders.values())
    }
    searched = {name: study.searched(name) for name in done if name != NO_DEFENCE}
    chosen = {name: study.chosen(name) for name in searched}
    call.out.mkdir(parents=True, exist_ok=True)
    (call.out / "search.json").write_text(json.dumps(search_table(searched, chosen), indent=1) + "\n")
    print(write_comparison(done, chosen, call.out))


if __name__ == "__main__":
    main()
