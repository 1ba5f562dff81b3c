"""Speed and memory of our attack and training step against the public implementations' schedule, interleaved
in one run.

    make bench                                    # all CPU shapes, about an hour on 2 cores
    python -m experiments.benchmarks.training_step --vocabulary 32000 --repeats 3 --out
    experiments/results/benchmark_cpu_202611

Same model, same batch, same mathematics: a figure is reported only if losses (to 1e-5 of their size) and
perturbations agree.
Two settings: `equal` pads both sides alike (adversarial rows to 128 prompt + 32 reply tokens), `natural`
    takes HarmBench and
Dolly rows with the Llama-2 tokenizer, where the reference pads its adversarial rows to the utility length of
256.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from peft import LoraConfig, get_peft_model
from torch import Tensor, nn
from transformers import LlamaConfig, LlamaForCausalLM

from callbacks.cost import peak_memory_mib, reset_peak_memory
from callbacks.run_folder.provenance import environment_facts
from datamodules.batch import AdversarialBatch, UtilityBatch
from experiments.benchmarks import training_yardstick
from experiments.benchmarks.rows import equal_rows, natural_rows
from lightning_modules.attacks.base import AttackedPrompt
from lightning_modules.attacks.embedding.pgd import EmbeddingPGD
from lightning_modules.losses.toward_away import TowardAwayUtility
from lightning_modules.models.embeddings import mean_embedding_norm
from lightning_modules.models.language_model import LanguageModel
from lightning_modules.scoring import score_replies, score_utility

STEPS = 10
EPSILON, STEP = 0.05, 1e-3
REFERENCE_LENGTH = 256
TOLERANCE = 1e-5


def build_model(vocabulary: int) -> nn.Module:
    """A random Llama with LoRA r 64 on all linear layers: 19.4 M parameters at V = 32,000, of which the body
    is 7.1 M."""
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=vocabulary, hidden_size=384, intermediate_size=1024, num_hidden_layers=4,
        num_attention_heads=6, num_key_value_heads=6, max_position_embeddings=512, tie_word_embeddings=True,
    )  # fmt: skip
    lora = LoraConfig(
        r=64, lora_alpha=16, lora_dropout=0.0, target_modules="all-linear", task_type="CAUSAL_LM"
    )
    model = get_peft_model(LlamaForCausalLM(config), lora)
    generator = torch.Generator().manual_seed(1)
    for name, parameter in model.named_parameters():
        if "lora_B" in name:
            parameter.data = 0.02 * torch.randn(parameter.shape, generator=generator)
    return model.train()


class Ours:
    """This project's attack and training step."""

    def __init__(self, model: nn.Module, adversarial: AdversarialBatch, utility: list[UtilityBatch]) -> None:
        self.model, self.adversarial, self.utility = LanguageModel(model), adversarial, utility
        self.pgd = EmbeddingPGD(
            epsilon=EPSILON,
            num_steps=STEPS,
            step_size=STEP,
            step_unit="absolute",
            step_rule="sign",
            keep="last",
        )
        self.objective = TowardAwayUtility()

    def attack(self) -> AttackedPrompt:
        return self.pgd(self.model, self.adversarial)

    def losses(self, attacked: AttackedPrompt) -> Iterator[Tensor]:
        """The losses of a step's micro-batches, each to be differentiated before the next is asked for."""
        yield self.objective.adversarial(score_replies(self.model, self.adversarial, attacked)).loss.mean()
        for utility in self.utility:
            yield self.objective.utility(*score_utility(self.model, utility)).loss.mean() / len(self.utility)

    def step(self) -> Step:
        return timed_step(self.model.module, self.attack, self.losses)


class Public:
    """The reference's attack and training step; `length` is what its adversarial rows are padded to."""

    def __init__(
        self, model: nn.Module, adversarial: AdversarialBatch, utility: list[UtilityBatch], length: int
    ) -> None:
        self.model, self.adversarial, self.utility, self.length = model, adversarial, utility, length
        self.radius = EPSILON * mean_embedding_norm(LanguageModel(model))

    def attack(self) -> Tensor:
        return training_yardstick.attack(
            self.model, self.adversarial, self.length, STEPS, self.radius, torch.tensor(STEP)
        )

    def losses(self, delta: Tensor) -> Iterator[Tensor]:
        """As `Ours.losses`."""
        yield training_yardstick.adversarial_loss(self.model, self.adversarial, delta)
        for utility in self.utility:
            yield training_yardstick.utility_loss(self.model, utility) / len(self.utility)

    def step(self) -> Step:
        return timed_step(self.model, self.attack, self.losses)


@dataclass
class Step:
    """One training step: its loss, the perturbation it trained under, and the seconds spent on finding
    that."""

    loss: float
    perturbation: Any
    attack_seconds: float


def timed_step(
    model: nn.Module, attack: Callable[[], Any], losses: Callable[[Any], Iterator[Tensor]]
) -> Step:
    """Attack, then a backward pass per micro-batch; gradients are dropped, as an optimiser step would leave
    them."""
    began = time.perf_counter()
    perturbation = attack()
    seconds, total = time.perf_counter() - began, 0.0
    for loss in losses(perturbation):
        loss.backward()
        total += loss.item()
    model.zero_grad()
    return Step(total, perturbation, seconds)


def losses_agree(ours: float, public: float) -> dict[str, float]:
    """How far apart the two sides' step losses are, relative to the loss. Raises: AssertionError beyond
    1e-5."""
    difference = abs(ours - public) / max(abs(public), 1.0)
    assert difference <= TOLERANCE, f"the two sides compute different losses: {ours} and {public}"
    return {"relative_loss_difference": difference, "loss": ours}


def perturbations_agree(batch: AdversarialBatch, attacked: AttackedPrompt, delta: Tensor) -> dict[str, float]:
    """Which share of the coordinates of delta agrees. A sign step flips where a gradient vanishes, so single
    ones may differ.

    Raises: AssertionError below 99 %.
    """
    assert attacked.delta is not None
    masks = batch.prompt_mask
    rows = [(attacked.delta[i][masks[i]], delta[i, : int(masks[i].sum())]) for i in range(len(masks))]
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
    length = (
        adversarial.prompt_ids.shape[1] + adversarial.harmful_ids.shape[1]
        if setting == "equal"
        else REFERENCE_LENGTH
    )
    ours, public = Ours(model, adversarial, utility), Public(model, adversarial, utility, length)
    shape = {
        "setting": setting,
        "vocabulary": vocabulary,
        "body_parameters": _body(model),
        "repeats": repeats,
        "rows": {"adversarial": len(adversarial), "utility": sum(map(len, utility))},
        "padded_length": {
            "ours": adversarial.prompt_ids.shape[1] + adversarial.harmful_ids.shape[1],
            "reference": length,
        },
    }
    if what == "attack":
        seconds, results = interleaved({"ours": ours.attack, "reference": public.attack}, repeats)
        losses = [
            sum(loss.item() for loss in side.losses(results[name]))
            for name, side in (("ours", ours), ("reference", public))
        ]
        agreement = losses_agree(*losses) | perturbations_agree(
            adversarial, results["ours"], results["reference"]
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
        adversarial, results["ours"].perturbation, results["reference"].perturbation
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
    length = adversarial.prompt_ids.shape[1] + adversarial.harmful_ids.shape[1]
    runner = (
        Ours(model, adversarial, utility) if side == "ours" else Public(model, adversarial, utility, length)
    )
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
        default=["memory", "attack/equal", "step/natural"],
        help="figures to take (a step includes its attack)",
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
