"""Seconds of a CAPO step beside a CAT step, on the same adversarial rows, interleaved in one run.

    python -m experiments.benchmarks.objectives --repeats 5 --out runs/objectives

CAT is timed with its utility rows, as it is trained, and without, which is the share that CAPO has too.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path

import torch
from torch import Tensor

from callbacks.run_folder.provenance import environment_facts
from experiments.benchmarks.rows import natural_rows
from experiments.benchmarks.sides import Ours, Step, build_model, timed_step
from experiments.benchmarks.training_step import interleaved
from lightning_modules.attacks.base import AttackedPrompt
from lightning_modules.losses.preference import Preference
from lightning_modules.models.frozen import Reference
from lightning_modules.models.loading import LoraSettings, ModelConfig
from lightning_modules.reference_scores import ReferenceTable
from lightning_modules.scoring import score_replies


def steps(vocabulary: int, folder: Path) -> dict[str, Callable[[], Step]]:
    """The timed steps by name; CAPO's reference log-probabilities are computed before, once per row as in
    training."""
    model = build_model(vocabulary)
    adversarial, utility = natural_rows(vocabulary)
    cat, bare = Ours(model, adversarial, utility), Ours(model, adversarial, [])
    table = ReferenceTable(folder, Reference(cat.model, ModelConfig("in memory", lora=LoraSettings())))
    table.fill([adversarial], torch.device("cpu"))
    objective = Preference()

    def losses(attacked: AttackedPrompt) -> Iterator[Tensor]:
        yield objective.adversarial(
            score_replies(cat.model, adversarial, attacked, table(adversarial))
        ).loss.mean()

    return {
        "cat": cat.step,
        "cat_without_utility": bare.step,
        "capo": lambda: timed_step(model, cat.attack, losses),
    }


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--vocabulary", type=int, default=32_000, help="vocabulary size of the model")
    parser.add_argument("--repeats", type=int, default=5, help="timed rounds, after one that is not counted")
    parser.add_argument("--out", type=Path, default=None, help="folder to write step_time.json to")
    options = parser.parse_args()
    torch.set_num_threads(os.cpu_count() or 1)
    with tempfile.TemporaryDirectory() as folder:
        calls = steps(options.vocabulary, Path(folder))
        interleaved(calls, 1)
        seconds, _ = interleaved(calls, options.repeats)
    medians = {name: statistics.median(values) for name, values in seconds.items()}
    report = {
        "vocabulary": options.vocabulary,
        "repeats": options.repeats,
        "median_seconds": medians,
        "seconds": seconds,
        "capo_over_cat": medians["capo"] / medians["cat"],
        "capo_over_cat_without_utility": medians["capo"] / medians["cat_without_utility"],
    }
    print(json.dumps(report, indent=2))
    if options.out:
        options.out.mkdir(parents=True, exist_ok=True)
        text = json.dumps(report | {"environment": environment_facts()}, indent=2)
        (options.out / "step_time.json").write_text(text + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
