"""Which settings of the shipped recipes fit which card, and how long a run takes there: `thundercat plan`'s
figures as a table. Predicted: nothing here was measured on a GPU.

    python -m experiments.benchmarks.cards --out experiments/results/cards_plan_202611   # 6 minutes of a core

Models of DEPTHS layers are planned and their figures continued to the recipe's own depth: all layers are
alike, so that what a step costs grows by the same amount with each, once there are enough of them (three in
bf16) for the peak to lie where a deep model has it. A card takes the first of SETTINGS whose
planned peak is at most 90 % of its memory with all rows of a step attacked at once; where none is, those
that attack the most. Rows are as long as they may be. Hours are those of the step's arithmetic at 30 % of the
card's nominal rate.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import tempfile
from collections import Counter
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from callbacks.run_folder.provenance import environment_facts
from datamodules.division import Division
from experiments.commands.plan import Executed, PlanSettings, communication, executed, figures, in_bytes
from experiments.config.compose import compose
from experiments.planning.memory import ATTACK, MERGED
from experiments.planning.recipe import without_machine
from experiments.planning.step import StepCost
from experiments.planning.table import gib

MODELS = {
    "Zephyr-7B (and Mistral-7B)": "zephyr_7b",
    "Gemma-1.1-2B": "gemma_2b",
    "Llama-2-7B": "llama2_7b",
    "Phi-3-mini (3.8 B)": "phi3_mini",
}
RECIPES = {
    f"{method}, {name}": f"configs/experiment/{method.lower()}_{stem}.yaml"
    for method in ("CAT", "CAPO")
    for name, stem in MODELS.items()
}
BF16 = {"model.base.quantization": "null", "model.base.gradient_checkpointing": "false"}
SETTINGS: dict[str, dict[str, str]] = {
    "bf16, merged": {**BF16, "model.base.lora.merge": "rounded"},
    "bf16": BF16,
    "bf16, recomputed": {**BF16, "model.base.gradient_checkpointing": "true"},
    "nf4, recomputed": {},
}
"""The fastest first, as overrides of a recipe; the last is as shipped."""
CARDS = {"24GiB": 165.0, "40GiB": 312.0, "80GiB": 989.0, "141GiB": 989.0}
"""Memory, and the nominal dense bf16 rate of a card of that size, 10^12 operations a second: GeForce RTX
4090, A100, H100 SXM and H200 by their data sheets."""
USABLE, UTILISATION = 0.9, 0.3
SHARED = {"data.micro_batches": "1", "model.base.quantization": "null"}
TOGETHER: dict[str, dict[str, str]] = {
    "adapters": {**SHARED, "model.base.gradient_checkpointing": "false"},
    "all weights in fp32": {**SHARED, "model.base.lora": "null", "model.base.dtype": "float32"},
}
"""What is trained on several devices, for the volume that they send."""
DEPTHS, LAYERS = (4, 6), "model.base.config.num_hidden_layers"


class Choice(NamedTuple):
    """How a recipe runs on a card."""

    settings: str
    attacked: int
    """Rows at once."""
    of: int
    """Rows of a step."""
    peak: int
    hours: float


def choose(
    plans: Mapping[str, Executed], division: Division, steps: int, memory: int, tflops: float
) -> Choice | None:
    """The first settings that attack all rows at once in this memory, or else those that attack the most."""
    fewer: Choice | None = None
    for name, done in plans.items():
        rows = _attacked(done, division, memory)
        if rows == 0:
            continue
        seconds = done.cost.flops.total() / (tflops * 1e12 * UTILISATION)
        choice = Choice(name, rows, division.harmful_per_step, _peak(done, rows), seconds * steps / 3600)
        if rows == choice.of:
            return choice
        fewer = choice if fewer is None or rows > fewer.attacked else fewer
    return fewer


def _attacked(done: Executed, division: Division, memory: int) -> int:
    """The most rows that a step may attack at once in this memory, 0 where its passes do not fit."""
    count, outer = division.harmful_per_step, division.rows("harmful")
    sizes = [rows for rows in range(count, 0, -1) if count % rows == 0 and rows % outer == 0]
    return next((rows for rows in sizes if _peak(done, rows) <= memory), 0)


def _peak(done: Executed, rows: int) -> int:
    """The step's peak with so many rows attacked at once: what an attack holds beyond what stays grows with
    them."""
    held, fixed = done.cost.peaks[ATTACK], done.cost.persistent.total()
    merged = held[MERGED]
    attack = fixed + merged + (held.total() - fixed - merged) * rows // done.rows["attacked"]
    rest = [other.total() for part, other in done.cost.peaks.items() if part != ATTACK]
    return max(attack, *rest)


def continued(
    recipe: str, overrides: Mapping[str, str], settings: PlanSettings
) -> tuple[dict[str, Any], Executed]:
    """A recipe with these overrides, and its step at its own depth, from two shallow ones."""
    config = compose([recipe], list(overrides.items()))
    shallow, deep = (
        executed(compose([recipe], [*overrides.items(), (LAYERS, str(depth))]), settings) for depth in DEPTHS
    )
    with tempfile.TemporaryDirectory() as folder:
        path = without_machine(config, folder)["model"]["init_args"]["base"]["name_or_path"]
        depth = json.loads((Path(path) / "config.json").read_text(encoding="utf-8"))["num_hidden_layers"]
    cost = deeper(shallow.cost, deep.cost, (depth - DEPTHS[0]) / (DEPTHS[1] - DEPTHS[0]))
    return config, dataclasses.replace(deep, cost=cost)


def deeper(shallow: StepCost, deep: StepCost, times: float) -> StepCost:
    """The shallow step with so many times what the deep one adds to it."""

    def number(small: int, large: int) -> int:
        return round(small + times * (large - small))

    def counts(small: Counter[str], large: Counter[str]) -> Counter[str]:
        return Counter({name: number(small[name], large[name]) for name in small | large})

    return StepCost(
        peaks={part: counts(held, deep.peaks[part]) for part, held in shallow.peaks.items()},
        parameters=number(shallow.parameters, deep.parameters),
        trained=number(shallow.trained, deep.trained),
        persistent=counts(shallow.persistent, deep.persistent),
        flops=counts(shallow.flops, deep.flops),
        sweeps=counts(shallow.sweeps, deep.sweeps),
    )


def measure(recipe: str) -> tuple[dict[str, Any], dict[str, Choice | None]]:
    """All figures of a recipe's settings, and the choice of each card."""
    plans: dict[str, Executed] = {}
    found: dict[str, Any] = {}
    config: Mapping[str, Any] = {}
    settings = PlanSettings(utilisation=UTILISATION)
    for name, overrides in SETTINGS.items():
        config, plans[name] = continued(recipe, overrides, settings)
        found[name] = figures(config, settings, in_bytes(settings.device_memory), plans[name])
    own, steps = config["data"]["init_args"], config["trainer"]["max_steps"]
    fields = ("harmful_per_step", "utility_per_step", "micro_batches")
    division = Division(**{name: own[name] for name in fields})
    choices = {
        card: choose(plans, division, steps, int(USABLE * in_bytes(card)), rate)
        for card, rate in CARDS.items()
    }
    return found, choices


def sent(recipe: str, devices: int) -> dict[str, dict[str, int]]:
    """Bytes that each of several devices sends in a step, by what is trained and how the work is shared."""
    volumes = {}
    for name, overrides in TOGETHER.items():
        _, done = continued(recipe, overrides, PlanSettings(devices=devices))
        # What stays on a replica decides whether there can be replicas at all.
        volumes[name] = {
            **communication(done.cost, devices),
            "sweeps": done.cost.sweeps.total(),
            "peak": done.cost.peak,
        }
    return volumes


def cell(choice: Choice | None) -> str:
    """A card's way as text."""
    if choice is None:
        return "-"
    at_once = "" if choice.attacked == choice.of else f", {choice.attacked} of {choice.of} at once"
    return f"{choice.settings}{at_once}: {gib(choice.peak)}, {choice.hours:.1f} h"


def table(choices: Mapping[str, Mapping[str, Choice | None]]) -> str:
    """Recipe by card, in Markdown."""
    lines = [("recipe, predicted", *CARDS), ("---",) * (1 + len(CARDS))]
    lines += [(name, *(cell(own[card]) for card in CARDS)) for name, own in choices.items()]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


def volumes_table(volumes: Mapping[str, Mapping[str, int]], devices: int) -> str:
    """What is trained by what is sent, in Markdown."""
    columns = {
        "sweeps": "passes over the layers",
        "ddp": "DDP",
        "fsdp2": "FSDP2",
        "gathered_each_pass": "gathered for each pass",
        "gathered_once_a_step": "gathered once a step",
        "peak": "peak of a replica",
    }
    lines: list[Sequence[str]] = [
        (f"trained on {devices} devices", *columns.values()),
        ("---",) * (1 + len(columns)),
    ]
    for name, own in volumes.items():
        cells = (str(own[key]) if key == "sweeps" else gib(own[key]) for key in columns)
        lines.append((name, *cells))
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


def main(arguments: list[str] | None = None) -> None:
    """Plan, print the tables, write `cards.json` and `cards.md`."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--recipes", nargs="*", default=list(RECIPES.values()), help="files to plan")
    parser.add_argument("--devices", type=int, default=8, help="of the volumes sent; 1 leaves them out")
    parser.add_argument("--out", type=Path, default=None, help="folder to write the figures to")
    options = parser.parse_args(arguments)
    names = {path: name for name, path in RECIPES.items()}
    report: dict[str, Any] = {"environment": environment_facts(), "cards": CARDS, "recipes": {}}
    choices, text = {}, ""
    if options.out:
        options.out.mkdir(parents=True, exist_ok=True)
    for recipe in [*options.recipes, None]:
        if recipe is not None:
            name = names.get(recipe, recipe)
            found, choices[name] = measure(recipe)
            own = {card: choice and choice._asdict() for card, choice in choices[name].items()}
            report["recipes"][name] = {"file": recipe, "choices": own, "plans": found}
            text = table(choices)
        elif options.devices > 1:
            volumes = sent(options.recipes[0], options.devices)
            report["sent"] = {"file": options.recipes[0], "devices": options.devices, "bytes": volumes}
            text += "\n\n" + volumes_table(volumes, options.devices)
        if options.out:
            (options.out / "cards.json").write_text(json.dumps(report) + "\n", encoding="utf-8")
            (options.out / "cards.md").write_text(text + "\n", encoding="utf-8")
    print(text)


if __name__ == "__main__":
    main()
