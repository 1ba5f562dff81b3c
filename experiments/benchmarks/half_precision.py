"""Our attack and training step against the public schedule with base weights in bf16, interleaved in one run.
The public code's own configurations multiply in bf16 (4-bit weights, `bnb_4bit_compute_dtype: bfloat16`).

    python -m experiments.benchmarks.half_precision --repeats 5 --out experiments/results/benchmark_cpu_202611

Both sides hold the same bf16 base under the same fp32 adapters. The yardstick leaves adapters beside the
base, as the public code does, in PEFT's own layers; ours rounds their sum in the attack (`base.lora.merge:
rounded`, configs/model/bf16.yaml) and reads them in bf16 outside it (models/low_rank.py).
Neither is exact, and signs of gradients flip where they vanish: what is compared besides time is the loss
that each side's perturbation reaches on the exact fp32 model, beside what the attack in fp32 reaches there.
"""

from __future__ import annotations

import argparse
import copy
import json
import os
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from callbacks.run_folder.provenance import environment_facts
from datamodules.batch import AdversarialBatch
from experiments.benchmarks.rows import MICRO_BATCH, natural_rows
from experiments.benchmarks.sides import Ours, Public, build_model
from experiments.benchmarks.training_step import interleaved, ratio
from lightning_modules.attacks.base import AttackedPrompt
from lightning_modules.models.language_model import LanguageModel
from lightning_modules.models.low_rank import shorten
from lightning_modules.scoring import score_replies

LOST = 0.02
"""How much of the attack's gain over no attack either side may lose to rounding."""
APART = 0.01
"""How far apart the sides' step losses may be, of the loss: logits in bf16 have eight bits."""


def in_bf16(model: nn.Module) -> nn.Module:
    """A copy with base weights in bf16 and adapters as they are."""
    rounded = copy.deepcopy(model)
    for name, parameter in rounded.named_parameters():
        if "lora_" not in name:
            parameter.data = parameter.data.to(torch.bfloat16)
    return rounded


def reached(model: nn.Module, batch: AdversarialBatch, attacked: AttackedPrompt) -> float:
    """Mean negative log-likelihood (nats a token) of the harmful replies under a perturbation, unrounded."""
    with torch.no_grad():
        scores = score_replies(LanguageModel(model), batch, attacked)
    mask = scores.harmful_mask
    per_row = (scores.harmful_log_probs * mask).sum(1) / mask.sum(1)
    return -float(per_row.mean())


def measure(vocabulary: int, repeats: int) -> list[dict[str, Any]]:
    """Figures of the attack and of the step.

    Raises: AssertionError where a side's perturbation reaches visibly less on the exact model than fp32's.
    """
    exact = build_model(vocabulary)
    adversarial, utility = natural_rows(vocabulary)
    found = Ours(exact, adversarial, utility).attack()
    assert found.delta is not None
    model = in_bf16(exact)
    ours = Ours(shorten(copy.deepcopy(model)), adversarial, utility, merge_rounded=True)
    public = Public(model, adversarial, utility, MICRO_BATCH)
    shape = {"vocabulary": vocabulary, "setting": "interleaved", "precision": "bf16", "repeats": repeats}

    seconds, results = interleaved({"ours": ours.attack, "reference": public.attack}, repeats)
    theirs = _as_attacked(found, public.by_example(results["reference"]), adversarial)
    losses = {
        "unattacked": reached(exact, adversarial, replace(found, delta=torch.zeros_like(found.delta))),
        "fp32": reached(exact, adversarial, found),
        "ours": reached(exact, adversarial, results["ours"]),
        "reference": reached(exact, adversarial, theirs),
    }
    gain = losses["unattacked"] - losses["fp32"]
    for side in ("ours", "reference"):
        assert losses[side] - losses["fp32"] <= LOST * gain, f"{side}: rounding cost the attack: {losses}"
    rows = [{"what": "attack", **shape, "loss_on_fp32": losses, **ratio(seconds)}]

    seconds, results = interleaved({"ours": ours.step, "reference": public.step}, repeats)
    step = {side: results[side].loss for side in ("ours", "reference")}
    assert abs(step["ours"] - step["reference"]) <= APART * abs(step["reference"]), f"other losses: {step}"
    rows.append({"what": "step", **shape, "loss": step, **ratio(seconds)})
    return rows


def _as_attacked(like: AttackedPrompt, deltas: list[Tensor], batch: AdversarialBatch) -> AttackedPrompt:
    """The yardstick's perturbations in our padding."""
    assert like.delta is not None
    delta = torch.zeros_like(like.delta)
    for i, found in enumerate(deltas):
        kept = batch.prompt_mask[i]
        delta[i][kept] = found[: int(kept.sum())].to(delta.dtype)
    return replace(like, delta=delta)


def main(arguments: list[str] | None = None) -> None:
    """Measure, print a line per figure, and write `benchmark_bf16.json`."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--vocabulary", type=int, default=32_000, help="vocabulary size")
    parser.add_argument("--repeats", type=int, default=5, help="timed rounds per figure")
    parser.add_argument("--out", type=Path, default=None, help="folder to write the figures to")
    options = parser.parse_args(arguments)
    torch.set_num_threads(os.cpu_count() or 1)
    rows = measure(options.vocabulary, options.repeats)
    for row in rows:
        print(json.dumps(row), flush=True)
    if options.out:
        options.out.mkdir(parents=True, exist_ok=True)
        report = {"environment": environment_facts(), "rows": rows}
        (options.out / "benchmark_bf16.json").write_text(
            json.dumps(report, indent=2) + "\n", encoding="utf-8"
        )


if __name__ == "__main__":
    main()
