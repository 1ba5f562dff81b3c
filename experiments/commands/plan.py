"""`thundercat plan`: what a training would cost, before it runs: memory, arithmetic, hours, checkpoints.

The run's own training step, attack included, is built and executed on tensors that hold nothing
(experiments/planning): neither weights nor a GPU are needed. What is assumed is said in the plan.
"""

from __future__ import annotations

import json
import re
import tempfile
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import yaml
from tqdm.auto import tqdm

from callbacks.run_folder.checkpoints import RunCheckpoints
from datamodules.adversarial import AdversarialData
from experiments.commands.run import callbacks_of, instantiate
from experiments.config.check import check
from experiments.config.compose import ConfigError, compose
from experiments.config.defaults import with_defaults
from experiments.config.seeds import with_seeds
from experiments.planning.evaluations import EvaluationCost, Forward, evaluations
from experiments.planning.four_bits import as_nf4
from experiments.planning.memory import ADAPTERS, ATTACK, GRADIENTS, MERGED, PARTS, WEIGHTS
from experiments.planning.recipe import check_plannable, quantised, without_machine
from experiments.planning.rows import full_rows, kinds_of_micro_batches
from experiments.planning.shapes_only import ShapesOnly, built_without_weights
from experiments.planning.step import StepCost, count_step
from experiments.planning.table import gib, table
from lightning_modules.adversarial import AdversarialFineTuning
from lightning_modules.models.decoder import text_config

UNITS = {"B": 1, "KIB": 2**10, "MIB": 2**20, "GIB": 2**30, "KB": 10**3, "MB": 10**6, "GB": 10**9}


@dataclass
class PlanSettings:
    """The machine that a run is planned for, and how long rows are taken to be."""

    devices: int = 1
    device_memory: str = "80GiB"
    tflops: float = 700.0
    """Peak arithmetic of one device in the run's precision, 10^12 operations a second."""
    utilisation: float = 0.3
    """Share of it that the run reaches."""
    prompt_tokens: int | None = None
    """Null: half of data.encoding.max_length."""
    reply_tokens: int | None = None
    """Null: the rest of it."""
    as_json: bool = False
    print_config: bool = False


def plan(files: Sequence[str], overrides: Sequence[tuple[str, str]], settings: PlanSettings) -> int:
    """Compose, execute a step without weights, print. Returns the exit status. Raises: ConfigError."""
    memory = in_bytes(settings.device_memory)
    for name in ("devices", "tflops", "utilisation"):
        if not getattr(settings, name) > 0:
            raise ConfigError(f"--{name}: expected a number above 0, got {getattr(settings, name)}")
    if settings.utilisation > 1:
        raise ConfigError(f"--utilisation: expected a share of 1 at most, got {settings.utilisation:g}")
    if not files:
        raise ConfigError("expected at least one --config FILE; start with --config configs/quickstart.yaml")
    config = compose(files, overrides)
    if settings.print_config:
        print(yaml.safe_dump(config, sort_keys=False), end="")
        return 0
    found = figures(config, settings, memory, executed(config, settings))
    print(json.dumps(found, indent=2) if settings.as_json else table(found))
    return 0


@dataclass
class Executed:
    """A recipe's step, counted."""

    cost: StepCost
    rows: dict[str, int]
    """The most of each kind in a micro-batch, or at once, and their tokens."""
    together: int
    """Rows of the largest micro-batch."""
    saving: RunCheckpoints | None
    compares: bool
    """Whether a reference scores every training row before the first step."""
    micro_batches: int = 1
    """Those of the recipe, or fewer where its devices could not share their rows evenly."""
    evaluations: EvaluationCost = field(default_factory=EvaluationCost)
    """Of the whole training, by all devices together."""


def executed(config: Mapping[str, Any], settings: PlanSettings, steps: int = 2) -> Executed:
    """Execute a composed recipe's step without weights.

    Args:
        config: the resolved configuration.
        settings: the machine, and the rows' length.
        steps: how often; with 1 the optimiser's state is not in the peak, operations are the same.

    Raises: ConfigError.
    """
    with (
        tempfile.TemporaryDirectory() as folder,
        tqdm(total=3, desc="plan", leave=False, disable=None) as bar,
    ):
        runnable = without_machine(config, folder)
        check(runnable, "fit")
        cli = instantiate(with_seeds(with_defaults(runnable)))
        module, data = cli.model, cli.datamodule
        if isinstance(module, AdversarialFineTuning):
            check_plannable(module)
        if not isinstance(module, AdversarialFineTuning) or not isinstance(data, AdversarialData):
            raise ConfigError(
                "model: a plan expects lightning_modules.adversarial.AdversarialFineTuning with "
                f"AdversarialData, got {type(module).__name__}; give a training recipe"
            )
        bar.set_description("plan: the model without weights")
        module._chat = object()  # type: ignore[assignment]
        with built_without_weights():
            module.configure_model()
        saved = as_nf4(module.model) if quantised(config) else 0
        bar.update()
        division = data.division.shared_by(settings.devices) or data.division
        kinds = kinds_of_micro_batches(division, settings.devices)
        longest = data.encoding.max_length
        prompt = settings.prompt_tokens or longest // 2
        reply = settings.reply_tokens or longest - prompt
        if prompt < 1 or reply < 1 or prompt + reply > longest:
            raise ConfigError(
                f"--prompt-tokens and --reply-tokens: expected two lengths of together at most "
                f"data.encoding.max_length {longest}, got {prompt} and {reply}"
            )
        vocabulary = text_config(module.model).vocab_size
        batches = [
            full_rows(
                {"attacked": kind.attacked, "harmful": kind.harmful, "utility": kind.utility},
                prompt, reply, vocabulary,
            )
            for kind in kinds
        ]  # fmt: skip
        bar.set_description("plan: one step without weights")
        times = [(kind.attacks, kind.times) for kind in kinds]
        mode = ShapesOnly()
        cost = count_step(module, batches, config.get("trainer") or {}, steps, mode, times)
        for held in (cost.persistent, *cost.peaks.values()):
            held[WEIGHTS] -= saved
        asked = evaluations(
            callbacks_of(cli.trainer),
            vars(data.evaluation),
            cli.trainer.max_steps,
            Forward(module.model, mode, vocabulary, prompt, reply),
        )
        bar.update()
    rows = {name: max(getattr(kind, name) for kind in kinds) for name in ("attacked", "harmful", "utility")}
    return Executed(
        cost,
        {**rows, "prompt_tokens": prompt, "reply_tokens": reply},
        max(kind.harmful + kind.utility for kind in kinds),
        next((c for c in callbacks_of(cli.trainer) if isinstance(c, RunCheckpoints)), None),
        module.objective is not None and module.objective.needs_reference,
        division.micro_batches,
        asked,
    )


def figures(config: Mapping[str, Any], settings: PlanSettings, memory: int, done: Executed) -> dict[str, Any]:
    """Everything that a plan says."""
    found = summary(config, settings, memory, done.cost, done.saving)
    found["rows"] = done.rows
    asked = done.evaluations
    found["evaluations"] = {
        "replies": asked.replies,
        "passes": asked.passes,
        "flops": asked.flops,
        "hours": asked.flops / settings.devices / (settings.tflops * 1e12 * settings.utilisation) / 3600,
    }
    found["largest_rows"] = largest_rows(done.cost, memory, done.together, attack=False)
    found["largest_attack"] = largest_rows(done.cost, memory, done.rows["attacked"], attack=True)
    if settings.devices > 1:
        found["communication"] = communication(done.cost, settings.devices)
    found["assumptions"] = assumptions(config, settings, done)
    own = config["data"]["init_args"].get("micro_batches", 1)
    if done.micro_batches != own:
        found["warnings"].append(
            f"{own} micro-batches of a step's rows do not divide among {settings.devices} devices: planned "
            f"with {done.micro_batches}; set data.micro_batches: {done.micro_batches} in the run too"
        )
    return found


def summary(
    config: Mapping[str, Any],
    settings: PlanSettings,
    memory: int,
    cost: StepCost,
    saving: RunCheckpoints | None,
) -> dict[str, Any]:
    """All figures of a plan, from a step's counts."""
    steps = (config.get("trainer") or {}).get("max_steps")
    per_step = {"attack": cost.flops[ATTACK], "outer": cost.flops.total() - cost.flops[ATTACK]}
    seconds = sum(per_step.values()) / (settings.tflops * 1e12 * settings.utilisation)
    checkpoint = 3 * 4 * cost.trained
    found: dict[str, Any] = {
        "parameters": {"all": cost.parameters, "trained": cost.trained},
        "memory": {part: cost.at_peak[part] for part in PARTS},
        "memory_at_most": {part: max(held[part] for held in cost.peaks.values()) for part in PARTS},
        "peak": cost.peak,
        "device_memory": memory,
        "flops_per_step_and_device": per_step,
        "sweeps_per_step": cost.sweeps.total(),
        "seconds_per_step": seconds,
        "checkpoint": checkpoint,
        "warnings": [],
    }
    if isinstance(steps, int) and steps > 0:
        found |= {"steps": steps, "hours": seconds * steps / 3600}
        if saving is not None:
            found["checkpoints"] = number_of_checkpoints(saving, steps, seconds)
            found["checkpoint_bytes_written"] = found["checkpoints"] * checkpoint
    if cost.peak > memory:
        found["warnings"].append(
            f"does not fit: the peak of {gib(cost.peak)} is above the device's {gib(memory)}; raise "
            "data.micro_batches, set data.attack_batch, or model.base.gradient_checkpointing: true"
        )
    return found


def largest_rows(cost: StepCost, memory: int, rows: int, attack: bool) -> int:
    """Rows of an attack, or of a micro-batch, that fit: whatever a step works on, what it holds beyond its
    weights, merged ones among them, gradients and optimiser's state grows at most in proportion to its rows.
    """
    fits = []
    for part, held in cost.peaks.items():
        if (part == ATTACK) != attack:
            continue
        fixed = cost.persistent.total() + held[MERGED]
        growing = max(1, held.total() - fixed)
        fits.append((memory - fixed) * rows // growing)
    return max(0, min(fits, default=0))


def communication(cost: StepCost, devices: int) -> dict[str, int]:
    """Bytes that a device sends in a step, by how the devices share the work, collectives in rings: replicas
    add up what learns (DDP); shards gather all weights once for the attack and for each of the outer passes
    over the layers (`lightning_modules.sharded.FSDP2`), for each pass of the attack too, or once a step where
    they are kept, and each takes its part of the summed gradients."""
    weights, gradients = cost.persistent[WEIGHTS] + cost.persistent[ADAPTERS], cost.persistent[GRADIENTS]
    attack = cost.sweeps[ATTACK]
    outer = cost.sweeps.total() - attack
    volumes = {
        "ddp": 2 * gradients,
        "fsdp2": (min(attack, 1) + outer) * weights + gradients,
        "gathered_each_pass": (attack + outer) * weights + gradients,
        "gathered_once_a_step": weights + gradients,
    }
    return {name: volume * (devices - 1) // devices for name, volume in volumes.items()}


def assumptions(config: Mapping[str, Any], settings: PlanSettings, done: Executed) -> list[str]:
    """What stands in for what a plan does not know."""
    counts = done.rows
    prompt, reply = counts["prompt_tokens"], counts["reply_tokens"]
    said = [
        f"{counts['attacked']} rows are attacked at once, and micro-batches hold up to {counts['harmful']} "
        f"harmful and {counts['utility']} utility rows, without padding: prompts of {prompt} and replies of "
        f"{reply} tokens, as long as rows may be; the run's own are not read",
        f"a device reaches {settings.utilisation:.0%} of {settings.tflops:g} TFLOP a second; loading and "
        "launches are not in the hours",
        "evaluations: whole passes and replies of full length, more than is done where passes are shared or "
        "replies end; a reply reads all weights for each token, which takes longer than its arithmetic",
        "tensors alone: no allocator's fragments, no kernels' workspace, no buffers of several devices; "
        "attention by a kernel that keeps no scores",
        "a checkpoint holds what learns and two moments of it, in fp32",
        "no example reaches the attack's stop_loss, and all losses are finite",
    ]
    if done.evaluations.uncounted:
        said.append(f"not counted among the evaluations: {', '.join(done.evaluations.uncounted)}")
    if done.compares:
        said.append(
            "what the objective compares with, a forward pass of both replies of every harmful training row, "
            "is computed before the first step and is not in the hours"
        )
    if quantised(config):
        said.append(
            "4-bit weights take half a byte and their scales, all else of the base is fp32; 4-bit layers "
            "compute in bf16 on a copy of their weight made at each use, and return what they are given"
        )
    if settings.devices > 1:
        said.append(
            "of several devices: FSDP2's weights are gathered in the dtype that they are held in, for the "
            "attack all at once; the memory is a replica's"
        )
    return said


def number_of_checkpoints(saving: RunCheckpoints, steps: int, seconds: float) -> int:
    """How many checkpoints a run of so many steps writes, the last one included."""
    by_steps = 0 if saving.every_n_steps is None else steps // saving.every_n_steps
    by_time = 0 if saving.every_minutes is None else int(steps * seconds // (60 * saving.every_minutes))
    return max(1, by_steps + by_time)


def in_bytes(text: str) -> int:
    """`80GiB` as a number. Raises: ConfigError."""
    match = re.fullmatch(r"\s*([\d.]+)\s*([a-zA-Z]+)\s*", text)
    unit = match[2].upper() if match else ""
    try:
        size = float(match[1]) * UNITS[unit] if match else 0.0
    except (KeyError, ValueError):
        size = 0.0
    if size <= 0:
        raise ConfigError(f"--device-memory: expected a size like 80GiB or 40GB, got {text!r}")
    return int(size)
