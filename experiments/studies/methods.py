"""All training methods beside each other: each from its YAML with several seeds, judged alike, with what the
paper's claims come to.

python -m experiments.studies.methods --out experiments/results/objectives_cpu_202611

Runs that are finished are kept: a killed comparison goes on where it stood. `--report_only` draws the tables
from what is there.
"""

from __future__ import annotations

import argparse
import os
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

from tqdm.auto import tqdm

from experiments.studies.methods_report import NO_DEFENCE, write_comparison

BASE = "configs/experiment/methods_tinychat.yaml"
RED_TEAM = "configs/experiment/red_team_tinychat.yaml"
NO_ATTACK, ONE_STEP = "configs/attack/none.yaml", "configs/attack/one_step.yaml"


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
    "capo, beta 1": Variant("capo", overrides=("--model.init_args.objective.init_args.beta=1.0",)),
    "capo with utility": Variant(
        "capo",
        overrides=(
            "--model.init_args.objective.init_args.weight_utility=1.0",
            "--data.init_args.utility_per_step=32",
        ),
    ),
    "capo, LoRA": Variant(
        "capo", overrides=("--model.init_args.base.lora={r: 64, alpha: 16, dropout: 0.1}",)
    ),
    **{
        name.replace("_", " "): Variant(name)
        for name in (
            "capo_dpo",
            "capo_hinge",
            "npo",
            "er_cat",
            "cat_kl",
            "lat",
            "circuit_breakers",
            "r2d2",
            "mixat",
            "noise_augmentation",
            "adversarial_fine_tuning",
            "distillation",
            "red_team_replay",
            "prompt_generator",
        )
    },
}


def command(name: str, seed: int, folder: Path, red_team: Path, steps: int) -> list[str]:
    """The command line of one run, as a user would type it."""
    variant = VARIANTS.get(name, VARIANTS["cat"])
    files = [BASE, f"configs/method/{variant.method}.yaml", *variant.files]
    overrides = [
        *variant.overrides,
        f"--trainer.default_root_dir={folder}",
        f"--seed_everything={seed}",
        "--trainer.enable_progress_bar=false",
    ]
    if variant.method == "red_team_replay":
        overrides.append(f"--vars.red_team={red_team}")
    # The model before training is what no defence means.
    overrides += (
        ["--vars.at_start=true", "--trainer.max_steps=1"]
        if name == NO_DEFENCE
        else [f"--trainer.max_steps={steps}"]
    )
    return [
        sys.executable,
        "-m",
        "experiments.cli",
        "fit",
        *(word for file in files for word in ("--config", file)),
        *overrides,
    ]


def run(words: list[str], log: Path) -> None:
    """One process on one thread. Raises: RuntimeError with the end of its output where it fails."""
    log.parent.mkdir(parents=True, exist_ok=True)
    threads = {"OMP_NUM_THREADS": "1", "OMP_WAIT_POLICY": "PASSIVE"}
    with log.open("w", encoding="utf-8") as stream:
        status = subprocess.run(
            words, stdout=stream, stderr=subprocess.STDOUT, env=os.environ | threads, check=False
        ).returncode
    if status:
        raise RuntimeError(
            f"{' '.join(words)}\nended with status {status}: {log.read_text(encoding='utf-8')[-2000:]}"
        )


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument(
        "--out",
        type=Path,
        default=Path("experiments/results/objectives_cpu_202611"),
        help="folder of the tables and the figure",
    )
    parser.add_argument("--runs", type=Path, default=Path("runs/objectives"), help="folder of the runs")
    parser.add_argument(
        "--seeds", type=int, nargs="+", default=[0, 1, 2], help="seeds of weights, data order and attacks"
    )
    parser.add_argument("--steps", type=int, default=60, help="optimiser steps of every method")
    parser.add_argument("--workers", type=int, default=2, help="runs at a time, one thread each")
    parser.add_argument(
        "--methods",
        nargs="+",
        choices=[*VARIANTS],
        default=[*VARIANTS],
        metavar="NAME",
        help=f"of: {'; '.join(VARIANTS)}",
    )
    parser.add_argument("--report_only", action="store_true", help="run nothing")
    arguments = parser.parse_args()
    names = [NO_DEFENCE, *arguments.methods]
    red_team: Path = arguments.runs / "red_team"
    folders = {
        (name, seed): arguments.runs / f"{name.replace(', ', '_').replace(' ', '_')}_{seed}"
        for seed in arguments.seeds
        for name in names
    }
    if not arguments.report_only:
        if "red team replay" in names and not (red_team / "test_results.json").is_file():
            print("attacking training requests for red-team replay")
            run(
                [
                    sys.executable,
                    "-m",
                    "experiments.cli",
                    "test",
                    "--config",
                    RED_TEAM,
                    f"--trainer.default_root_dir={red_team}",
                ],
                red_team / "log.txt",
            )
        todo = [(key, folder) for key, folder in folders.items() if not (folder / "results.json").is_file()]
        with ThreadPoolExecutor(arguments.workers) as pool, tqdm(total=len(todo), desc="runs") as bar:
            jobs = [
                pool.submit(run, command(name, seed, folder, red_team, arguments.steps), folder / "log.txt")
                for (name, seed), folder in todo
            ]
            for job in jobs:
                job.add_done_callback(lambda _: bar.update())
            for job in jobs:
                job.result()
    done = {key: folder for key, folder in folders.items() if (folder / "results.json").is_file()}
    print(write_comparison(done, arguments.out))


if __name__ == "__main__":
    main()
