"""Operations, host time and waits of an attack iteration, a GCG step and an optimiser step, on a model as
deep as a 7B one and as narrow as a test's.

    python -m experiments.benchmarks.launches --out experiments/results/launches_cpu_202611   # 5 minutes

A GPU executes a narrow model faster than the host can ask for it: what counts there is how often it is asked,
and how often the host waits for an answer. Both are counted on a CPU (counters.py). Counts are exact; host
times are medians over interleaved rounds, and depend on what else the machine does. Beside ours stand the
yardsticks of the public code's schedule, on PEFT's own layers; ours runs with adapters as they are
(models/low_rank.py) and, on bf16 weights, merged and rounded (`base.lora.merge: rounded`).
"""

from __future__ import annotations

import argparse
import json
import statistics
from collections.abc import Callable, Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import torch
from peft import LoraConfig, get_peft_model
from torch import Tensor, nn
from transformers import LlamaConfig, LlamaForCausalLM

from callbacks.run_folder.provenance import environment_facts
from datamodules.batch import AdversarialBatch, UtilityBatch
from datamodules.sources.tinychat.sources import TinyChatHarmful
from datamodules.text.chat_format import ChatFormat
from datamodules.text.encoding import Encoder, EncodingConfig, adversarial_batch
from datamodules.text.tokenizers import TokenizerConfig, load_tokenizer
from experiments.benchmarks import gcg_yardstick, training_yardstick
from experiments.benchmarks.counters import Launches
from experiments.benchmarks.rows import UTILITY_BATCHES, equal_rows
from experiments.benchmarks.sides import EPSILON, STEP, Ours, Public
from experiments.benchmarks.training_step import interleaved
from lightning_modules.attacks.embedding.pgd import EmbeddingPGD, target_loss
from lightning_modules.attacks.suffix.gcg import GCG
from lightning_modules.attacks.suffix.search import SuffixSearch
from lightning_modules.attacks.suffix.slots import typable_tokens
from lightning_modules.models.language_model import LanguageModel
from lightning_modules.models.low_rank import shorten

VOCABULARY = 2048
"""The packaged tokenizer's."""
PROMPT, REPLY = 64, 32
WIDTH, TOPK = 64, 64

Run = Callable[[int], object]
"""Executes so many steps."""


def build_model(layers: int) -> nn.Module:
    """A random Llama in bf16 with fp32 LoRA r 64 on all linear layers, whose adapters do something."""
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=VOCABULARY, hidden_size=64, intermediate_size=128, num_hidden_layers=layers,
        num_attention_heads=4, num_key_value_heads=2, max_position_embeddings=512,
    )  # fmt: skip
    lora = LoraConfig(
        r=64, lora_alpha=16, lora_dropout=0.0, target_modules="all-linear", task_type="CAUSAL_LM"
    )
    model = get_peft_model(LlamaForCausalLM(config).to(torch.bfloat16), lora)
    generator = torch.Generator().manual_seed(1)
    for name, parameter in model.named_parameters():
        if parameter.requires_grad:
            parameter.data = parameter.data.float()
        if "lora_B" in name:
            parameter.data = 0.02 * torch.randn(parameter.shape, generator=generator)
    return model.train()


def pgd(steps: int) -> EmbeddingPGD:
    """The recipe's inner attack, with so many steps."""
    return EmbeddingPGD(EPSILON, steps, STEP, "absolute", "sign", keep="last")


def attack_iteration(layers: int) -> dict[str, Run]:
    """One row, as in the 7B recipe's micro-batches."""
    model = shorten(build_model(layers))
    batch = step_rows()[0].select([0])
    lengths = (torch.tensor(EPSILON), torch.tensor(STEP))
    sides = {"ours": LanguageModel(model), "ours, merged": LanguageModel(model, merge_rounded=True)}
    runs: dict[str, Run] = {
        name: partial(lambda side, steps: pgd(steps)(side, batch), side) for name, side in sides.items()
    }
    (whole,) = training_yardstick.apart(batch, [])
    assert whole.harmful is not None
    runs["yardstick"] = partial(_yardstick_attack, build_model(layers), whole.harmful, lengths)
    return runs


def _yardstick_attack(
    model: nn.Module, rows: training_yardstick.Rows, lengths: tuple[Tensor, Tensor], steps: int
) -> Tensor:
    return training_yardstick.attack(model, rows, steps, *lengths)


def gcg_step(layers: int) -> dict[str, Run]:
    """One behaviour, 64 candidates."""
    chat = ChatFormat(load_tokenizer(TokenizerConfig("tinychat:aligned")))
    rows = Encoder(chat, EncodingConfig(160)).harmful(TinyChatHarmful("validation").rows())
    batch = adversarial_batch(rows[:1], "user")
    module, theirs = shorten(build_model(layers)).eval(), build_model(layers).eval()
    sides = {
        "ours": LanguageModel(module, chat=chat),
        "ours, merged": LanguageModel(module, chat=chat, merge_rounded=True),
    }
    with sides["ours"].frozen():
        search = SuffixSearch(sides["ours"], batch, 20, " x", WIDTH)
    target = search.target.ids[0][search.target.mask[0]].tolist()
    behaviour = gcg_yardstick.Behaviour(chat, search.slots[0], batch.systems[0], target)
    allowed = typable_tokens(chat, VOCABULARY, True)

    def ours(side: LanguageModel, steps: int) -> None:
        attack = GCG(num_steps=steps, width=WIDTH, topk=TOPK, stop_at_target=False)
        attack(side, batch, torch.Generator().manual_seed(0))

    def yardstick(steps: int) -> None:
        generator = torch.Generator().manual_seed(0)
        for _ in range(steps):
            gcg_yardstick.step(theirs, behaviour, behaviour.slot.suffix, allowed, TOPK, WIDTH, generator)

    return {**{name: partial(ours, side) for name, side in sides.items()}, "yardstick": yardstick}


def step_rows() -> tuple[AdversarialBatch, UtilityBatch]:
    """8 rows of either kind, attackable from the first token on, as the 7B recipe has them."""
    adversarial, (utility,) = equal_rows(VOCABULARY, PROMPT, REPLY)
    adversarial = replace(adversarial, attackable_mask=adversarial.prompt_mask, lengths=())
    return replace(adversarial, lengths=adversarial.counted()), utility


def optimiser_step(layers: int, micro_batches: int) -> dict[str, Run]:
    """Gradients of 8 adversarial and 56 utility rows in so many micro-batches, either kind in a pass of its
    own: 8 as the 7B recipe has them, 4 as fit 80 GiB (configs/model/fast_7b.yaml), or one. Ours attacks all
    at once; the yardstick draws micro-batches of 8 rows in any case. The optimiser's own update is left out:
    on a GPU it is fused."""
    model, theirs = shorten(build_model(layers)), build_model(layers)
    adversarial, utility = step_rows()
    size = len(adversarial) // micro_batches
    every = [utility] * UTILITY_BATCHES
    parts = [adversarial.select(list(range(i, i + size))) for i in range(0, len(adversarial), size)]
    utilities = divided(joined(every), micro_batches)

    def ours(merged: bool, steps: int) -> None:
        for _ in range(steps):
            whole = Ours(model, adversarial, [])
            whole.model = LanguageModel(model, merge_rounded=merged)
            attacked = whole.attack()
            for number, part in enumerate(parts):
                own = attacked.select(number * size, (number + 1) * size)
                for loss in Ours(model, part, [utilities[number]]).losses(own):
                    loss.backward()
            model.zero_grad()

    def yardstick(steps: int) -> None:
        side = Public(theirs, adversarial, every, len(adversarial))
        for _ in range(steps):
            for loss in side.losses(side.attack()):
                loss.backward()
            theirs.zero_grad()

    return {"ours": partial(ours, False), "ours, merged": partial(ours, True), "yardstick": yardstick}


def joined(batches: Sequence[UtilityBatch]) -> UtilityBatch:
    """Rows of one length in one batch."""
    ids, mask, labels = (
        torch.cat([getattr(own, name) for own in batches])
        for name in ("input_ids", "attention_mask", "labels")
    )
    return UtilityBatch(ids, mask, labels, sum(own.num_scored or 0 for own in batches))


def divided(whole: UtilityBatch, parts: int) -> list[UtilityBatch]:
    """As many rows in each part."""
    size = len(whole) // parts
    cut = zip(
        *(rows.split(size) for rows in (whole.input_ids, whole.attention_mask, whole.labels)), strict=True
    )
    return [UtilityBatch(ids, mask, labels, int((labels[:, 1:] != -100).sum())) for ids, mask, labels in cut]


def measure_whole(what: str, runs: dict[str, Run], layers: int, repeats: int) -> dict[str, Any]:
    """Counts of one call, and its median milliseconds."""
    figures: dict[str, Any] = {}
    for name, run in runs.items():
        one = counted(run, 1)
        figures[name] = {"operations": one.operations, "kernels": one.kernels, "syncs": dict(one.syncs)}
    calls: dict[str, Callable[[], Any]] = {name: partial(run, 1) for name, run in runs.items()}
    for name, taken in interleaved(calls, repeats)[0].items() if repeats else ():
        figures[name]["host_milliseconds"] = 1e3 * statistics.median(taken)
    return {"what": what, "layers": layers, "repeats": repeats, "figures": figures}


def measure(what: str, runs: dict[str, Run], layers: int, repeats: int) -> dict[str, Any]:
    """Counts of one step: those of two steps less those of one, after a first that fills what is remembered;
    what is done once per call is told apart. Milliseconds likewise, medians."""
    figures: dict[str, Any] = {}
    for name, run in runs.items():
        run(1)
        one, two = counted(run, 1), counted(run, 2)
        figures[name] = {
            "operations": two.operations - one.operations,
            "kernels": two.kernels - one.kernels,
            "syncs": dict(two.syncs - one.syncs),
            "once_per_call": {
                "operations": 2 * one.operations - two.operations,
                "syncs": dict(one.syncs - (two.syncs - one.syncs)),
            },
        }
    calls: dict[str, Callable[[], Any]] = {
        f"{name}/{steps}": partial(run, steps) for name, run in runs.items() for steps in (1, 2)
    }
    if repeats:
        seconds, _ = interleaved(calls, repeats)
        for name in runs:
            pairs = zip(seconds[f"{name}/1"], seconds[f"{name}/2"], strict=True)
            figures[name]["host_milliseconds"] = 1e3 * statistics.median(two - one for one, two in pairs)
    return {"what": what, "layers": layers, "repeats": repeats, "figures": figures}


def counted(run: Run, steps: int) -> Launches:
    """What so many steps launch."""
    with Launches() as launches:
        run(steps)
    return launches


def agreement(layers: int, steps: int = 10) -> dict[str, Any]:
    """What rounding costs: the share of the perturbation's signs that agree with those found in fp32, and the
    attacked loss of what was found, on the fp32 model."""
    model = shorten(build_model(layers))
    batch, _ = step_rows()
    sides = {"ours": LanguageModel(model), "ours, merged": LanguageModel(model, merge_rounded=True)}
    found = {name: pgd(steps)(side, batch).delta for name, side in sides.items()}
    exact = LanguageModel(model.float())
    best = pgd(steps)(exact, batch)

    def loss(delta: Tensor | None) -> float:
        assert delta is not None
        with torch.no_grad(), exact.frozen():
            embeds = exact.embed(batch.prompt_ids) + delta
            return float(target_loss(exact, batch, embeds, None).mean())

    return {
        "what": "agreement with fp32",
        "layers": layers,
        "rows": len(batch),
        "signs": {
            name: float((delta.sign() == best.delta.sign()).float().mean())  # type: ignore[union-attr]
            for name, delta in found.items()
        },
        "loss": {"none": float(best.start_loss.mean()), "fp32": loss(best.delta)}
        | {name: loss(delta) for name, delta in found.items()},
    }


def main(arguments: list[str] | None = None) -> None:
    """Measure, print a line per figure, write `launches.json`."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--layers", type=int, default=32, help="decoder layers")
    parser.add_argument("--repeats", type=int, default=3, help="timed rounds; 0 counts only")
    parser.add_argument("--only", nargs="*", default=[""], help="figures whose names begin so")
    parser.add_argument("--out", type=Path, default=None, help="folder to write the figures to")
    options = parser.parse_args(arguments)
    whats: dict[str, Callable[[], dict[str, Run]]] = {
        "attack iteration, 1 row": lambda: attack_iteration(options.layers),
        "GCG step, 1 behaviour x 64": lambda: gcg_step(options.layers),
        "optimiser step, 8 + 56 rows, one pass of each kind": lambda: optimiser_step(options.layers, 1),
        "optimiser step, 8 + 56 rows, 4 micro-batches": lambda: optimiser_step(options.layers, 4),
        "optimiser step, 8 + 56 rows, 8 micro-batches": lambda: optimiser_step(options.layers, 8),
    }
    rows = []
    wanted = tuple(options.only)
    for what, runs in whats.items():
        if not what.startswith(wanted):
            continue
        # A step of training is long, and nothing is remembered from one to the next.
        taken = measure_whole if what.startswith("optimiser") else measure
        rows.append(taken(what, runs(), options.layers, options.repeats))
        print(json.dumps(rows[-1]), flush=True)
    if "agreement".startswith(wanted):
        rows.append(agreement(options.layers))
        print(json.dumps(rows[-1]), flush=True)
    if options.out:
        options.out.mkdir(parents=True, exist_ok=True)
        report = {"environment": environment_facts(), "rows": rows}
        (options.out / "launches.json").write_text(json.dumps(report, indent=2) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
