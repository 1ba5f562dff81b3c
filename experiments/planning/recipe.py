"""What a plan changes in a recipe, so that neither weights nor a GPU are needed."""

from __future__ import annotations

import copy
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import yaml
from huggingface_hub import try_to_load_from_cache
from huggingface_hub.errors import HFValidationError
from transformers import AutoConfig

from datamodules.text.model_files import resolve_path
from experiments.config.compose import PROJECT_ROOT, ConfigError
from lightning_modules.adversarial import AdversarialFineTuning

ARCHITECTURES = "experiments/planning/architectures.yaml"


def quantised(config: Mapping[str, Any]) -> bool:
    """Whether the recipe's base is in 4 bits."""
    return bool(config["model"]["init_args"]["base"].get("quantization"))


def check_plannable(module: AdversarialFineTuning) -> None:
    """Raises: ConfigError for what would read weights while a plan has none."""
    # Objectives compare with scores from before training, and the copy is gone by the first step.
    if module.base.lora is None and module.terms:
        raise ConfigError(
            "model.base.lora: a plan cannot hold the copy of the model that this recipe compares with where "
            "all weights learn; set model.base.lora, or model.terms=[] for the rest of the plan"
        )


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
    path = architecture(base["name_or_path"], base.get("revision"), folder, base.get("gguf_file"))
    base |= {"name_or_path": path, "from_scratch": True, "quantization": None, "revision": None}
    base |= {"compile_attacks": False, "gguf_file": None}
    if base.get("attn_implementation") == "flash_attention_2":  # counts as sdpa does: no scores are kept
        base["attn_implementation"] = "sdpa"
    if base.get("dtype", "auto") == "auto":
        settings = json.loads((Path(path) / "config.json").read_text(encoding="utf-8"))
        base["dtype"] = settings.get("dtype") or settings.get("torch_dtype") or "float32"
    return own


def architecture(name: str, revision: str | None, folder: str, gguf_file: str | None = None) -> str:
    """A folder with the model's config.json, where there is none and a GGUF file is named this `folder`, with
    what that file says. Raises: ConfigError where it is not at hand."""
    path = Path(resolve_path(name))
    if (path / "config.json").is_file():
        return str(path)
    if gguf_file is not None and (path / gguf_file).is_file():
        AutoConfig.from_pretrained(path, gguf_file=gguf_file).save_pretrained(folder)
        return folder
    try:
        cached = try_to_load_from_cache(name, "config.json", revision=revision) if not path.is_dir() else None
    except HFValidationError:  # the path of a folder that is not there
        cached = None
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
