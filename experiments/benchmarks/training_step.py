"""Speed and memory of our attack and training step against the public implementations' schedule, interleaved
in one run.

    make bench                                    # all CPU shapes, about an hour on 2 cores
    python -m experiments.benchmarks.training_step --vocabulary 32000 --repeats 3 --out
    experiments/results/benchmark_cpu_202611

Same model, same rows, same mathematics: a figure is reported only if losses (to 1e-5 of their size) and
perturbations agree. Three settings: `equal` rows need no padding; `natural` takes HarmBench and Dolly rows
with the Llama-2 tokenizer's lengths, adversarial rows together on both sides; `interleaved` the same rows, of
which the yardstick draws its micro-batches at random and pads them to their longest, as the public code does.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from callbacks.cost import peak_memory_mib, reset_peak_memory
from callbacks.run_folder.provenance import environment_facts
from datamodules.batch import AdversarialBatch
from experiments.benchmarks.rows import MICRO_BATCH, equal_rows, natural_rows
from experiments.benchmarks.sides import STEP, Ours, Public, Step, build_model
from lightning_modules.attacks.base import AttackedPrompt

TOLERANCE = 1e-5


def losses_agree(ours: float, public: float) -> dict[str, float]:
    """How far apart the two sides' step losses are, relative to the loss. Raises: AssertionError beyond
    1e-5."""
    difference = abs(ours - public) / max(abs(public), 1.0)
    assert difference <= TOLERANCE, f"the two sides compute different losses: {ours} and {public}"
    return {"relative_loss_difference": difference, "loss": ours}


def perturbations_agree(
    batch: AdversarialBatch, attacked: AttackedPrompt, deltas: list[Tensor]
) -> dict[str, float]:
    """Which share of the coordinates of delta agrees. A sign step flips where a gradient vanishes, so single
    ones may differ.

    Raises: AssertionError below 99 %.
    """
    assert attacked.delta is not None
    masks = batch.prompt_mask
    rows = [(attacked.delta[i][masks[i]], deltas[i][: int(masks[i].sum())]) for i in range(len(masks))]
    same = torch.cat([((a - b).abs() <= 0.1 * STEP).flatten() for a, b in rows]).float().mean().item()
    assert same >= 0.99, f"the two sides find different perturbations: {same:.4f} of the coordinates agree"
    return {"equal_coordinates": same}


def interleaved(
    calls: dict[str, Callable[[], Any]], repeats: int
) -> tuple[dict[str, list[float]], dict[str, Any]]:
    """Seconds of each call, taken in turn, and the last result of each."""
    seconds: dict[str, list[float]] = {name: [] for name in calls}
    results = {}
    for _ in range(repeats):
        for name, call in calls.items():
            began = time.perf_counter()
            results[name] = call()
            seconds[name].append(time.perf_counter() - began)
    return seconds, results


def measure(vocabulary: int, setting: str, what: str, repeats: int) -> list[dict[str, Any]]:
    """Ratio of the medians for one shape, and what it was taken from; a measured step gives its attack's
    figure too."""
    model = build_model(vocabulary)
    adversarial, utility = (equal_rows if setting == "equal" else natural_rows)(vocabulary)
    ours = Ours(model, adversarial, utility)
    public = Public(model, adversarial, utility, MICRO_BATCH if setting == "interleaved" else None)
    shape = {
        "setting": setting,
        "vocabulary": vocabulary,
        "body_parameters": _body(model),
        "repeats": repeats,
        "rows": {"adversarial": len(adversarial), "utility": sum(map(len, utility))},
        "padded_length": {
            "ours": adversarial.prompt_ids.shape[1] + adversarial.harmful_ids.shape[1],
            "reference": [
                max(rows.ids.shape[1] for rows in (part.harmful, part.utility) if rows is not None)
                for part in public.micro_batches
            ],
        },
    }
    if what == "attack":
        seconds, results = interleaved({"ours": ours.attack, "reference": public.attack}, repeats)
        losses = [
            sum(loss.item() for loss in side.losses(results[name]))
            for name, side in (("ours", ours), ("reference", public))
        ]
        agreement = losses_agree(*losses) | perturbations_agree(
            adversarial, results["ours"], public.by_example(results["reference"])
        )
        return [{"what": "attack", **shape, "agreement": agreement, **ratio(seconds)}]
    attack_seconds: dict[str, list[float]] = {"ours": [], "reference": []}

    def recorded(name: str, step: Callable[[], Step]) -> Step:
        done = step()
        attack_seconds[name].append(done.attack_seconds)
        return done

    seconds, results = interleaved(
        {
            "ours": lambda: recorded("ours", ours.step),
            "reference": lambda: recorded("reference", public.step),
        },
        repeats,
    )
    agreement = losses_agree(results["ours"].loss, results["reference"].loss)
    agreement |= perturbations_agree(
        adversarial, results["ours"].perturbation, public.by_example(results["reference"].perturbation)
    )
    shared = {**shape, "agreement": agreement}
    return [
        {"what": "attack", **shared, **ratio(attack_seconds)},
        {"what": "step", **shared, **ratio(seconds)},
    ]


def ratio(seconds: dict[str, list[float]]) -> dict[str, Any]:
    """Medians, spread and the ratio of the medians of interleaved timings."""
    medians = {name: statistics.median(values) for name, values in seconds.items()}
    return {"median_seconds": medians, "seconds": seconds, "ratio": medians["reference"] / medians["ours"]}


def memory_of(vocabulary: int, side: str) -> float:
    """MiB that one attack adds to the peak of a fresh process that holds the model (run in a process of its
    own)."""
    model = build_model(vocabulary)
    adversarial, utility = equal_rows(vocabulary)
    runner = (Ours if side == "ours" else Public)(model, adversarial, utility)
    reset_peak_memory()
    before = peak_memory_mib()
    runner.attack()
    return peak_memory_mib() - before


def memory(vocabulary: int) -> dict[str, Any]:
    """Peak memory above the model's own, each side in a process of its own."""
    figures = {}
    for side in ("ours", "reference"):
        command = [
            sys.executable,
            "-m",
            "experiments.benchmarks.training_step",
            "--memory-of",
            side,
            "--vocabulary",
            str(vocabulary),
        ]
        done = subprocess.run(command, capture_output=True, text=True, check=True)
        figures[side] = float(done.stdout.strip().splitlines()[-1])
    return {
        "what": "memory",
        "vocabulary": vocabulary,
        "mib_above_model": figures,
        "ratio": figures["ours"] / figures["reference"],
    }


def _body(model: nn.Module) -> int:
    return sum(
        p.numel() for name, p in model.named_parameters() if "embed_tokens" not in name and "lora" not in name
    )


def main(arguments: list[str] | None = None) -> None:
    """Measure, print a line per figure, and write `benchmark_<vocabularies>.json`."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument(
        "--vocabulary", type=int, nargs="*", default=[32_000, 256_000], help="vocabulary sizes"
    )
    parser.add_argument("--repeats", type=int, default=5, help="timed rounds per figure")
    parser.add_argument("--out", type=Path, default=None, help="folder to write the figures to")
    parser.add_argument(
        "--only",
        nargs="*",
        default=["memory", "attack/equal", "step/natural", "step/interleaved"],
        help="figures to take (a step includes its attack), each as WHAT/SETTING",
    )
    parser.add_argument("--memory-of", choices=["ours", "reference"], help=argparse.SUPPRESS)
    options = parser.parse_args(arguments)
    torch.set_num_threads(os.cpu_count() or 1)
    if options.memory_of:
        print(memory_of(options.vocabulary[0], options.memory_of))
        return
    rows = []
    for vocabulary in options.vocabulary:
        for figure in options.only:
            what, _, setting = figure.partition("/")
            taken = (
                [memory(vocabulary)]
                if what == "memory"
                else measure(vocabulary, setting, what, options.repeats)
            )
            rows.extend(taken)
            for row in taken:
                print(json.dumps(row), flush=True)
    if options.out:
        options.out.mkdir(parents=True, exist_ok=True)
        report = {"environment": environment_facts(), "rows": rows}
        name = "benchmark_" + "_".join(map(str, options.vocabulary)) + ".json"
        (options.out / name).write_text(json.dumps(report, indent=2) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
