"""Candidates per second of our GCG step against the usual public one, and whether it finds suffixes as good
at equal budget.

    python -m experiments.benchmarks.gcg --out experiments/results/gcg_cpu_202611     # about 10 minutes on 2
    cores

Speed: a Llama of about 20 M parameters with the Llama-2 tokenizer (V = 32,000) and HarmBench behaviours, both
    sides interleaved; a
figure is reported only if both compute the same candidates' losses to 1e-4. Quality: the packaged tiny chat
model, 20 held-out behaviours, the same number of steps and candidates on both sides, paired by behaviour.
"""

from __future__ import annotations

import argparse
import json
import os
import random
import statistics
import time
from pathlib import Path
from typing import Any

import torch

from callbacks.run_folder.provenance import environment_facts
from datamodules.batch import AdversarialBatch
from datamodules.sources.gather import evenly
from datamodules.sources.harmbench import HarmBench
from datamodules.sources.tinychat.sources import TinyChatHarmful
from datamodules.text.chat_format import ChatFormat
from datamodules.text.encoding import Encoder, EncodingConfig, adversarial_batch
from datamodules.text.tokenizers import TokenizerConfig, load_tokenizer
from experiments.benchmarks import gcg_yardstick
from experiments.benchmarks.rows import LLAMA2_TEMPLATE
from experiments.benchmarks.sides import build_model
from lightning_modules.attacks.base import example_rngs
from lightning_modules.attacks.suffix.gcg import GCG
from lightning_modules.attacks.suffix.search import SuffixSearch
from lightning_modules.attacks.suffix.slots import typable_tokens
from lightning_modules.models.embeddings import embedding_weight
from lightning_modules.models.language_model import LanguageModel
from lightning_modules.models.loading import ModelConfig, load_model

TOLERANCE = 1e-4


def speed(behaviours: int, width: int, topk: int, repeats: int) -> dict[str, Any]:
    """Candidates per second on both sides for one step of all behaviours, medians over interleaved rounds."""
    model, batch = llama(behaviours)
    # Ours is timed with its set-up (slots, cached prefixes, typable tokens), spread over some steps as in
    # use; the yardstick without.
    steps = max(1, 1024 // (behaviours * width))
    ours = GCG(num_steps=steps, width=width, topk=topk, stop_at_target=False)
    allowed = typable_tokens(model.chat, 32_000, True)
    others = _yardstick_behaviours(model, batch)
    difference = _loss_difference(model, batch, others)
    rates: dict[str, list[float]] = {"ours": [], "reference": []}
    for repeat in range(repeats):
        generator = torch.Generator().manual_seed(repeat)
        began = time.perf_counter()
        found = ours(model, batch, generator)
        # The gradients' forward passes are no candidates.
        rates["ours"].append(
            (int(found.forward_passes.sum()) - steps * len(batch)) / (time.perf_counter() - began)
        )
        rngs = example_rngs(batch, torch.Generator().manual_seed(repeat))
        began, evaluated = time.perf_counter(), 0
        for behaviour, own in zip(others, rngs, strict=True):
            evaluated += gcg_yardstick.step(
                model.module, behaviour, behaviour.slot.suffix, allowed, topk, width, own
            )[2]
        rates["reference"].append(evaluated / (time.perf_counter() - began))
    medians = {name: statistics.median(values) for name, values in rates.items()}
    return {
        "what": "candidates per second",
        "vocabulary": 32_000,
        "behaviours": behaviours,
        "width": width,
        "topk": topk,
        "repeats": repeats,
        "steps_ours": steps,
        "loss_difference": difference,
        "rates": rates,
        "medians": medians,
        "ratio": medians["ours"] / medians["reference"],
    }


def quality(behaviours: int, width: int, topk: int, steps: int) -> dict[str, Any]:
    """Best losses of both sides at equal budget, paired by behaviour; each side draws with seeds of its
    own."""
    chat = ChatFormat(load_tokenizer(TokenizerConfig("tinychat:aligned")))
    rows = Encoder(chat, EncodingConfig(160)).harmful(TinyChatHarmful("validation").rows())
    batch = adversarial_batch(evenly(rows, behaviours), "user")
    model = LanguageModel(load_model(ModelConfig("tinychat:aligned")).eval().requires_grad_(False), chat=chat)
    ours = GCG(num_steps=steps, width=width, topk=topk, stop_at_target=False)(
        model, batch, torch.Generator().manual_seed(0)
    ).best_loss
    allowed = typable_tokens(chat, embedding_weight(model).shape[0], True)
    theirs = []
    rngs = example_rngs(batch, torch.Generator().manual_seed(1))
    for behaviour, generator in zip(_yardstick_behaviours(model, batch), rngs, strict=True):
        suffix, best = behaviour.slot.suffix, float("inf")
        for _ in range(steps):
            suffix, loss, _ = gcg_yardstick.step(
                model.module, behaviour, suffix, allowed, topk, width, generator
            )
            best = min(best, loss)
        theirs.append(best)
    differences = [a - b for a, b in zip(ours.tolist(), theirs, strict=True)]
    return {
        "what": "best loss after equal budget",
        "model": "tinychat:aligned",
        "behaviours": len(batch),
        "steps": steps,
        "width": width,
        "topk": topk,
        "ours": ours.tolist(),
        "reference": theirs,
        "medians": [statistics.median(ours.tolist()), statistics.median(theirs)],
        "mean_difference": statistics.mean(differences),
        "p_ours_worse": sign_flip_test(differences),
    }


def sign_flip_test(differences: list[float], flips: int = 20_000, seed: int = 0) -> float:
    """One-sided paired permutation test: chance of a mean difference at least this large if signs were
    arbitrary."""
    rng, observed = random.Random(seed), sum(differences)
    hits = sum(
        sum(d if rng.random() < 0.5 else -d for d in differences) >= observed - 1e-12 for _ in range(flips)
    )
    return (hits + 1) / (flips + 1)


def llama(behaviours: int) -> tuple[LanguageModel, AdversarialBatch]:
    """20 M parameters of random weights with a real tokenizer, and public behaviours."""
    root = Path(os.environ.get("THUNDERCAT_DATA", "../shared"))
    chat = ChatFormat(
        load_tokenizer(TokenizerConfig(str(root / "models/tokenizers/llama2"), chat_template=LLAMA2_TEMPLATE))
    )
    bench = root / "data/harmbench"
    source = HarmBench(
        str(bench / "behavior_datasets/harmbench_behaviors_text_val.csv"),
        str(bench / "optimizer_targets/harmbench_targets_text.json"),
    )
    rows = [
        row
        for row in Encoder(chat, EncodingConfig(256, on_bad_row="skip")).harmful(source.rows())
        if not row.row.functional.startswith("context")
    ]
    model = build_model(32_000).merge_and_unload().eval().requires_grad_(False)  # type: ignore[operator]
    return LanguageModel(model, chat=chat), adversarial_batch(evenly(rows, behaviours), "user")


def _yardstick_behaviours(model: LanguageModel, batch: AdversarialBatch) -> list[gcg_yardstick.Behaviour]:
    with model.frozen():
        search = SuffixSearch(model, batch, 20, " x", 512)
    targets = [ids[mask].tolist() for ids, mask in zip(search.target.ids, search.target.mask, strict=True)]
    return [
        gcg_yardstick.Behaviour(model.chat, s, y, t)
        for s, y, t in zip(search.slots, batch.systems, targets, strict=True)
    ]


def _loss_difference(
    model: LanguageModel,
    batch: AdversarialBatch,
    others: list[gcg_yardstick.Behaviour],
    candidates: int = 8,
    vocabulary: int = 32_000,
) -> float:
    """Largest difference of the losses of the same random candidates. Raises: AssertionError beyond 1e-4."""
    allowed = typable_tokens(model.chat, vocabulary, True).nonzero().squeeze(1)
    generator, worst = torch.Generator().manual_seed(0), 0.0
    with model.frozen():
        search = SuffixSearch(model, batch, 20, " x", 512)
        for row, behaviour in enumerate(others):
            drawn = allowed[torch.randint(0, len(allowed), (candidates, 20), generator=generator)]
            index = torch.full((candidates,), row)
            mine = search.mean(index, search.losses(index, drawn))
            worst = max(
                worst,
                float(
                    (mine - gcg_yardstick.candidate_losses(model.module, behaviour, drawn.tolist()))
                    .abs()
                    .max()
                ),
            )
    assert worst <= TOLERANCE, f"the two sides compute different losses: they differ by {worst}"
    return worst


def main(arguments: list[str] | None = None) -> None:
    """Measure, print a line per figure, write `gcg.json`."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    shapes = ["1x512", "8x64", "1x64"]
    parser.add_argument(
        "--shapes",
        nargs="*",
        default=shapes,
        help="behaviours advanced together x candidates per step, for the speed",
    )
    parser.add_argument("--repeats", type=int, default=5, help="timed rounds per figure")
    parser.add_argument(
        "--steps",
        type=int,
        default=30,
        help="steps of the quality comparison (width 32, 20 behaviours); 0 leaves it out",
    )
    parser.add_argument("--out", type=Path, default=None, help="folder to write the figures to")
    options = parser.parse_args(arguments)
    torch.set_num_threads(os.cpu_count() or 1)
    rows = []
    for shape in options.shapes:
        behaviours, _, width = shape.partition("x")
        rows.append(speed(int(behaviours), int(width), 256, options.repeats))
        print(json.dumps(rows[-1]), flush=True)
    if options.steps:
        rows.append(quality(20, 32, 64, options.steps))
        print(json.dumps(rows[-1]), flush=True)
    if options.out:
        options.out.mkdir(parents=True, exist_ok=True)
        report = {"environment": environment_facts(), "rows": rows}
        (options.out / "gcg.json").write_text(json.dumps(report, indent=2) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
