"""The model card of an exported model, filled from what its run wrote down: nothing in it is typed by hand.

What was not recorded is called so, and what was not measured is "not evaluated".
"""

from __future__ import annotations

import importlib
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import yaml
from huggingface_hub import ModelCard, ModelCardData, try_to_load_from_cache

from callbacks.metrics.names import Quantity
from callbacks.report.escape import markdown
from callbacks.report.load import load
from callbacks.report.markdown import table_text
from callbacks.report.results import RunResults, Stage
from callbacks.report.tables import INTERVALS, arguments, class_name, inline, judges, rates, warnings
from callbacks.report.tables_beside import perplexities, replies
from callbacks.run_folder.folder import RunFolder
from datamodules.fields import constructor
from datamodules.results import read_measurements
from datamodules.text.model_files import PACKAGED, resolve_path

TAG = "thundercat"
"""Metadata of every card: by it a later export knows an earlier one."""
NOT_RECORDED, NOT_EVALUATED = "not recorded", "not evaluated"
STAGES: Mapping[Stage, str] = {
    "fit": "During training (on the rows that the recipe names for it)",
    "validate": "By `thundercat validate`",
    "test": "By `thundercat test`",
}
ASKED: Mapping[Quantity, str] = {
    "refusal_rate": "refusals of harmful requests",
    "over_refusal_rate": "over-refusals of harmless requests",
    "exact_match": "utility on benign tasks",
    "success_rate": "success of attacks",
    "change_rate": "replies against the base model's",
    "word_perplexity": "perplexity",
    "accuracy": "standard benchmarks",
}
"""What a reader of a robust model's card looks for; each is named where it was not measured."""
USE = (
    "For research on adversarial robustness: to study, attack and compare. Whatever robustness the numbers "
    "show, they promise nothing against other attacks, radii, wordings, languages or more effort, and none "
    "is a statement about safety in use. What the base model lacks, this one lacks too. Look at "
    "over-refusals and utility before success rates: a model that refuses everything is robust."
)
LOADING = {
    "adapters": """from peft import AutoPeftModelForCausalLM
from transformers import AutoTokenizer

model = AutoPeftModelForCausalLM.from_pretrained(FOLDER)  # loads the base model too
tokenizer = AutoTokenizer.from_pretrained(FOLDER)""",
    "whole": """from transformers import AutoModelForCausalLM, AutoTokenizer

model = AutoModelForCausalLM.from_pretrained(FOLDER)
tokenizer = AutoTokenizer.from_pretrained(FOLDER)""",
}


def model_card(
    run: str | Path, step: int, kind: str, merged: bool = False, weights: str | None = None
) -> str:
    """The card as Markdown with the hub's metadata in front.

    Args:
        run: the run folder.
        step: optimiser step of the exported weights; only what was measured at this step is told.
        kind: `adapters` (PEFT) or `whole`.
        merged: whether the whole model is one whose adapters were merged.
        weights: fingerprint of the exported weights: what was measured on others, as on another base model in
            the same folder, is left out. None trusts the step.
    """
    own = RunFolder.of(run)
    config = _read(own.config())
    base = arguments(config.get("model")).get("base") or {}
    name = str(base.get("name_or_path", ""))
    data = ModelCardData(
        base_model=name if _on_hub(name) else None,
        library_name="peft" if kind == "adapters" else "transformers",
        pipeline_tag="text-generation",
        license=licence(name, base.get("revision")),
        tags=["adversarial-training", TAG],
    )
    title = own.path.resolve().name
    parts = [f"# {markdown(title)}", _summary(config, step, kind, merged), "## Training"]
    parts.append("\n".join(f"- {what}: {markdown(text)}" for what, text in _training(config, own, step)))
    parts += ["## Data", _data(config), "## Evaluation", *_evaluation(own, step, weights)]
    parts += ["## Intended use and limits", USE, "## Loading", f"```python\n{LOADING[kind]}\n```"]
    return str(ModelCard(f"---\n{data.to_yaml()}\n---\n\n" + "\n\n".join(parts) + "\n"))


def licence(name: str, revision: str | None = None) -> str | None:
    """The base model's, as its own card states it; None where no card is at hand. Nothing is downloaded."""
    if name.partition(":")[0] == PACKAGED:
        return "apache-2.0"
    if not name:
        return None
    card: Any = Path(resolve_path(name)) / "README.md"
    if _on_hub(name):
        card = try_to_load_from_cache(name, "README.md", revision=revision)
    if not isinstance(card, str | Path) or not Path(card).is_file():
        return None
    try:
        found = ModelCard(Path(card).read_text(encoding="utf-8"), ignore_metadata_errors=True).data.license
    except (ValueError, yaml.YAMLError):
        return None
    return found if isinstance(found, str) else None


def _on_hub(name: str) -> bool:
    return bool(name) and ":" not in name and not Path(name).exists() and name.count("/") <= 1


def _summary(config: Mapping[str, Any], step: int, kind: str, merged: bool) -> str:
    base = _base(config)
    what = {"adapters": f"LoRA adapters for {base}", "whole": f"{base}, all its weights"}[kind]
    if merged:
        what = f"{base} with its LoRA adapters merged into the weights"
    trained = f"after {step} optimiser steps" if step else "as it was before training"
    return (
        f"{what[0].upper()}{what[1:]}, {trained}; by Thundercat, a framework for continuous adversarial "
        "training ([arXiv 2405.15589](https://arxiv.org/abs/2405.15589))."
    )


def _base(config: Mapping[str, Any]) -> str:
    base = arguments(config.get("model")).get("base") or {}
    name = str(base.get("name_or_path") or f"a base model ({NOT_RECORDED})")
    revision = f" at revision {base['revision']}" if base.get("revision") else ""
    return f"`{_public(name)}`{revision}"


def _training(config: Mapping[str, Any], own: RunFolder, step: int) -> Iterator[tuple[str, str]]:
    """What decided the weights; the order is the reader's."""
    model, environment = arguments(config.get("model")), _read(own.environment())
    base, git = dict(model.get("base") or {}), environment.get("git") or {}
    base["name_or_path"] = _public(str(base.get("name_or_path", "")))
    found = {
        "base model": inline(base),
        "licence of the base model": licence(
            str((model.get("base") or {}).get("name_or_path", "")), base.get("revision")
        )
        or "not known here; look at the base model's own card",
        "method": class_name(config.get("model")),
        "objective": _block(model.get("objective")),
        "attack in training": _block(model.get("attack")),
        "further terms": "; ".join(_block(term) for term in model.get("terms") or ()) or "none",
        "optimiser": inline(model.get("optimizer")),
        "steps": str(step),
        "seed": inline(environment.get("seed_everything")),
        "precision": inline((config.get("trainer") or {}).get("precision")) or "32-true",
        "hardware": inline(environment.get("hardware")),
        "cost": inline({key: f"{value:,.0f}" for key, value in _read(own.cost).items() if value}),
        "code": f"{git.get('revision') or ''}{' (modified)' if git.get('modified') else ''}",
        "packages": inline(environment.get("packages")),
    }
    return ((what, text or NOT_RECORDED) for what, text in found.items())


def _data(config: Mapping[str, Any]) -> str:
    data = arguments(config.get("data"))
    lines = [
        f"- {kind}: {markdown(_block(source))}"
        for kind in ("harmful", "utility")
        for source in data.get(kind) or ()
    ]
    return "\n".join(lines) if lines else f"Training data: {NOT_RECORDED}."


def _evaluation(own: RunFolder, step: int, weights: str | None) -> Iterator[str]:
    """A table a stage that has measured these weights, and what none has."""
    measured = {
        item.stage
        for item in read_measurements(own.path)
        if item.step == step and weights in (None, item.model)
    }
    seen: set[str] = set()
    for stage, title in STAGES.items():
        if stage not in measured:
            continue
        results = load(own.path, stage)
        if results.after is None or results.after.step != step:
            continue
        seen |= {metric.quantity for metric in results.after.measures}
        yield from _stage(results, title)
    lacking = [words for quantity, words in ASKED.items() if quantity not in seen]
    if seen:
        yield INTERVALS
    if lacking:
        yield f"{NOT_EVALUATED.capitalize()}: {'; '.join(lacking)}."


def _stage(results: RunResults, title: str) -> Iterator[str]:
    yield f"### {title}"
    for table in (rates(results), replies(results), perplexities(results)):
        if table.rows:
            yield table_text(table)
    notes = [*judges(results), *(f"Warning: {text}" for text in warnings(results))]
    if notes:
        yield "\n".join(f"- {markdown(text)}" for text in notes)


def _block(block: Any) -> str:
    """`EmbeddingPGD (epsilon 0.1, num_steps 10)`, with what its class sets by default; local files by their
    names alone."""
    own = arguments(block)
    further = {key: value for key, value in _defaults(block).items() if key not in own}
    name, inside = class_name(block), inline(_public_values({**own, **further}))
    return f"{name} ({inside})" if name and inside else name or inside


def _defaults(block: Any) -> dict[str, Any]:
    """Plain defaults of the class's constructor; {} of a class that is not at hand any more."""
    path = block.get("class_path", "") if isinstance(block, Mapping) else ""
    module, _, name = str(path).rpartition(".")
    try:
        found = constructor(getattr(importlib.import_module(module), name)) if module else {}
    except (ImportError, AttributeError):
        return {}
    defaults = {key: parameter.default for key, (parameter, _) in found.items()}
    return {key: value for key, value in defaults.items() if isinstance(value, bool | int | float | str)}


def _public_values(value: Any) -> Any:
    if isinstance(value, Mapping) and "class_path" in value:
        return _block(value)
    if isinstance(value, Mapping):
        return {key: _public_values(part) for key, part in value.items()}
    if isinstance(value, list | tuple):
        return [_public_values(part) for part in value]
    return _public(value) if isinstance(value, str) else value


def _public(text: str) -> str:
    """A text as it is, of a local file or folder its name: where it lay concerns nobody else."""
    return Path(text).name if "/" in text and Path(text).expanduser().exists() else text


def _read(path: Path) -> dict[str, Any]:
    """A YAML or JSON file; {} where there is none."""
    found = yaml.safe_load(path.read_text(encoding="utf-8")) if path.is_file() else None
    return found if isinstance(found, dict) else {}
