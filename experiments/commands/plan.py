"""`thundercat plan`: what a training would cost, before it runs: memory, arithmetic, hours, checkpoints.

The run's own training step, attack included, is built and executed on tensors that hold nothing
(experiments/planning): neither weights nor a GPU are needed. What is assumed is said in the plan.
"""

from __future__ import annotations

import copy
import json
import re
import tempfile
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml
from huggingface_hub import try_to_load_from_cache
from tqdm.auto import tqdm

from callbacks.run_folder.checkpoints import RunCheckpoints
from datamodules.adversarial import AdversarialData
from datamodules.text.model_files import resolve_path
from experiments.commands.run import callbacks_of, instantiate
from experiments.config.check import check
from experiments.config.compose import PROJECT_ROOT, ConfigError, compose
from experiments.config.defaults import with_defaults
from experiments.config.seeds import with_seeds
from experiments.planning.memory import ATTACK, MERGED, PARTS
from experiments.planning.rows import full_rows, kinds_of_micro_batches
from experiments.planning.shapes_only import ShapesOnly, built_without_weights
from experiments.planning.step import StepCost, count_step
from lightning_modules.adversarial import AdversarialFineTuning
from lightning_modules.models.decoder import text_config

ARCHITECTURES = "experiments/planning/architectures.yaml"
UNITS = {"": 1, "B": 1, "KIB": 2**10, "MIB": 2**20, "GIB": 2**30, "KB": 10**3, "MB": 10**6, "GB": 10**9}


@dataclass
class PlanSettings:
    """The machine that a run is planned for, and how long rows are where no tokenizer is at hand."""

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
    if not files:
        raise ConfigError("expected at least one --config FILE; start with --config configs/quickstart.yaml")
    config = compose(files, overrides)
    if settings.print_config:
        print(yaml.safe_dump(config, sort_keys=False), end="")
        return 0
    with tempfile.TemporaryDirectory() as folder, tqdm(total=3, desc="plan", leave=False) as bar:
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
        bar.update()
        kinds = kinds_of_micro_batches(data.division, settings.devices)
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
        cost = count_step(module, batches, config.get("trainer") or {}, 2, ShapesOnly(), times)
        bar.update()
    saving = next((c for c in callbacks_of(cli.trainer) if isinstance(c, RunCheckpoints)), None)
    found = summary(config, settings, memory, cost, saving)
    rows = {name: max(getattr(kind, name) for kind in kinds) for name in ("attacked", "harmful", "utility")}
    found["rows"] = {**rows, "prompt_tokens": prompt, "reply_tokens": reply}
    largest = max(kind.harmful + kind.utility for kind in kinds)
    found["largest_rows"] = largest_rows(cost, memory, largest, attack=False)
    found["largest_attack"] = largest_rows(cost, memory, rows["attacked"], attack=True)
    found["assumptions"] = assumptions(config, settings, rows, prompt, reply)
    print(json.dumps(found, indent=2) if settings.as_json else table(found))
    return 0


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
        "peak": cost.peak,
        "device_memory": memory,
        "flops_per_step_and_device": per_step,
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


def check_plannable(module: AdversarialFineTuning) -> None:
    """Raises: ConfigError for what would read weights while a plan has none."""
    if module.base.lora is None and (module.terms or getattr(module.objective, "needs_reference", False)):
        raise ConfigError(
            "model.base.lora: a plan cannot hold the copy of the model that this recipe compares with where "
            "all weights learn; set model.base.lora, or model.terms=[] for the rest of the plan"
        )
    if module.objective is not None and module.objective.needs_reference:
        raise ConfigError(
            "model.objective: reference scores are computed from weights before training, which a plan has "
            "not; plan the recipe with --model.objective=TowardAwayUtility, whose step costs the same"
        )


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


def assumptions(
    config: Mapping[str, Any], settings: PlanSettings, counts: Mapping[str, int], prompt: int, reply: int
) -> list[str]:
    """What stands in for what a plan does not know."""
    said = [
        f"{counts['attacked']} rows are attacked at once, and micro-batches hold up to {counts['harmful']} "
        f"harmful and {counts['utility']} utility rows, without padding: prompts of {prompt} and replies of "
        f"{reply} tokens, as long as rows may be; the run's own are not read",
        f"a device reaches {settings.utilisation:.0%} of {settings.tflops:g} TFLOP a second; evaluations, "
        "loading and launches are not in the hours",
        "tensors alone: no allocator's fragments, no kernels' workspace, no buffers of several devices; "
        "attention by a kernel that keeps no scores",
        "a checkpoint holds what learns and two moments of it, in fp32",
        "no example reaches the attack's stop_loss, and all losses are finite",
    ]
    if config["model"]["init_args"]["base"].get("quantization"):
        said.append(
            "4-bit weights are planned in base.dtype, and without a 4-bit layer's own work: the quantised "
            "layers' memory is about a quarter of what stands here, embedding and head are as planned"
        )
    return said


def number_of_checkpoints(saving: RunCheckpoints, steps: int, seconds: float) -> int:
    """How many checkpoints a run of so many steps writes, the last one included."""
    by_steps = 0 if saving.every_n_steps is None else steps // saving.every_n_steps
    by_time = 0 if saving.every_minutes is None else int(steps * seconds // (60 * saving.every_minutes))
    return max(1, by_steps + by_time)


def table(found: Mapping[str, Any]) -> str:
    """The figures as text."""
    rows = [
        ("parameters", f"{found['parameters']['all']:,}, of which {found['parameters']['trained']:,} learn"),
        *((f"memory: {part}", gib(size)) for part, size in found["memory"].items()),
        ("memory: peak", f"{gib(found['peak'])} of {gib(found['device_memory'])}"),
        *(
            (f"operations a step: {name}", f"{number / 1e12:,.1f} TFLOP")
            for name, number in found["flops_per_step_and_device"].items()
        ),
        ("seconds a step", f"{found['seconds_per_step']:,.2f}"),
    ]
    if "steps" in found:
        rows += [("steps", f"{found['steps']:,}"), ("hours", f"{found['hours']:,.2f}")]
    rows.append(("checkpoint", gib(found["checkpoint"])))
    if "checkpoints" in found:
        written = f"{found['checkpoints']:,}, {gib(found['checkpoint_bytes_written'])} in all"
        rows.append(("checkpoints written", written))
    rows.append(("rows of a micro-batch that fit", f"{found['largest_rows']:,}"))
    rows.append(("rows of an attack that fit", f"{found['largest_attack']:,}"))
    width = max(len(name) for name, _ in rows)
    lines = [f"{name:<{width}}  {value}" for name, value in rows]
    notes = [f"assumed: {text}" for text in found["assumptions"]]
    return "\n".join([*lines, *notes, *(f"warning: {text}" for text in found["warnings"])])


def gib(size: int) -> str:
    return f"{size / 2**30:,.2f} GiB"


def in_bytes(text: str) -> int:
    """`80GiB` as a number. Raises: ConfigError."""
    match = re.fullmatch(r"\s*([\d.]+)\s*([a-zA-Z]*)\s*", text)
    unit = match[2].upper() if match else ""
    try:
        size = float(match[1]) * UNITS[unit] if match else 0.0
    except (KeyError, ValueError):
        size = 0.0
    if size <= 0:
        raise ConfigError(f"--device-memory: expected a size like 80GiB or 40GB, got {text!r}")
    return int(size)


def without_machine(config: Mapping[str, Any], folder: str) -> dict[str, Any]:
    """The configuration on no device at all, its model from scratch. Raises: ConfigError where nobody knows
    the model's architecture."""
    own: dict[str, Any] = copy.deepcopy(dict(config))
    trainer = own.get("trainer") or {}
    own["trainer"] = {**trainer, "accelerator": "cpu", "devices": 1, "strategy": "auto"}
    base = ((own.get("model") or {}).get("init_args") or {}).get("base")
    if not isinstance(base, dict) or not isinstance(base.get("name_or_path"), str):
        raise ConfigError(
            "model.base.name_or_path: expected a model, got none; add a model file with --config"
        )
    path = architecture(base["name_or_path"], base.get("revision"), folder)
    base |= {"name_or_path": path, "from_scratch": True, "quantization": None, "revision": None}
    if base.get("dtype", "auto") == "auto":
        settings = json.loads((Path(path) / "config.json").read_text(encoding="utf-8"))
        base["dtype"] = settings.get("dtype") or settings.get("torch_dtype") or "float32"
    return own


def architecture(name: str, revision: str | None, folder: str) -> str:
    """A folder with the model's config.json. Raises: ConfigError where it is not at hand."""
    path = Path(resolve_path(name))
    if (path / "config.json").is_file():
        return str(path)
    cached = try_to_load_from_cache(name, "config.json", revision=revision) if not path.is_dir() else None
    if isinstance(cached, str):
        return str(Path(cached).parent)
    known = yaml.safe_load((PROJECT_ROOT / ARCHITECTURES).read_text(encoding="utf-8"))
    if name not in known:
        raise ConfigError(
            f"model.base.name_or_path: the configuration of {name!r} is not at hand; put its config.json "
            f"into a folder and name that, or add its values to {ARCHITECTURES}"
        )
    (Path(folder) / "config.json").write_text(json.dumps(known[name]), encoding="utf-8")
    return folder
