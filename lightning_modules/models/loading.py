"""Loading a causal language model for fine-tuning: hub id or folder, dtype, LoRA or all weights, optional
4-bit base."""

from __future__ import annotations

import importlib.util
import re
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

import torch
from peft import LoraConfig, PeftConfig, PeftModel, get_peft_model, prepare_model_for_kbit_training
from safetensors import SafetensorError
from torch import nn
from transformers import AutoConfig, AutoModelForCausalLM, BitsAndBytesConfig, PreTrainedModel

from datamodules.fields import Count, Fraction, NonNegativeInt, checked
from datamodules.text.model_files import model_path
from lightning_modules.models.decoder import causal_lm
from lightning_modules.models.low_rank import shorten

HUB_ID = re.compile(r"[A-Za-z0-9][\w.-]{0,95}(/[A-Za-z0-9][\w.-]{0,95})?")
FLASH = ("flash_attn", "kernels")
"""Either gives transformers that kernel."""
PICKLES = ("*.bin", "*.pt", "*.pth", "*.ckpt")


@checked
@dataclass
class LoraSettings:
    """Low-rank adapters (Hu et al. 2021); the defaults are those of the CAT authors' code."""

    r: Count = 64
    """Rank; lora: null trains all weights instead."""
    alpha: Count = 16
    """Scale: the adapter's delta is alpha / r * B A."""
    dropout: Fraction = 0.1
    """Dropout on the adapter's input, off during attacks."""
    target_modules: str | list[str] = "all-linear"
    """Names of the layers to adapt, or `all-linear` for every linear layer but the output head."""
    layers: list[NonNegativeInt] | None = None
    """Adapt these decoder layers only, counted from 0; null adapts all."""
    merge: Literal["rounded", "never"] | None = None
    """Where attacks run on merged weights: null on an fp32 base only, where merging is exact; `rounded` below
    too, which halves an attack's operations, rounds the sum and needs memory for a copy of the adapted
    weights (4-bit: none); `never` where there is no memory for that copy."""


@checked
@dataclass
class ModelConfig:
    """Which model to load and which of its weights learn."""

    name_or_path: str
    """Local folder, hub id, `tinychat:<stage>` for the packaged model, `package:NAME` for the folder of an
    installed Python package, or a folder with saved PEFT adapters; weights are read from safetensors or GGUF
    files only."""
    gguf_file: str | None = None
    """GGUF file in that folder, repository or package; dequantised to fp32 once, into the user's cache."""
    revision: str | None = None
    """Hub commit or tag; pin it for a run that must be repeatable."""
    dtype: Literal["auto", "float32", "bfloat16", "float16"] = "auto"
    """Dtype of the weights; `auto` takes the checkpoint's. Adapters are fp32 whatever the base, and read in
    bf16 where it is in bf16."""
    lora: LoraSettings | None = None
    """LoRA settings; null trains all weights."""
    quantization: Literal["nf4"] | None = None
    """4-bit NF4 base weights through bitsandbytes (needs lora)."""
    gradient_checkpointing: bool = False
    """Recompute activations in the backward pass of the training step; attacks run without."""
    attn_implementation: Literal["sdpa", "eager", "flash_attention_2"] | None = None
    """Attention kernel; null lets transformers choose."""
    compile_attacks: bool = False
    """What EmbeddingPGD computes of the model in an iteration is one graph of torch.compile's: made within a
    minute, once more for a second width of rows, and then kept. On a CPU it needs a C++ compiler. Results
    differ by rounding."""
    trust_remote_code: bool = False
    """Whether to run Python code that a hub repository ships."""
    from_scratch: bool = False
    """Random weights from the folder's config.json (with `config` merged over it) instead of trained ones."""
    config: dict[str, int | float | bool | str | None] = field(default_factory=dict)
    """Overrides of the model's configuration, e.g. {num_hidden_layers: 4}."""

    def __post_init__(self) -> None:
        if self.quantization is not None and self.lora is None:
            raise ValueError(
                "base.quantization: expected base.lora to be set with a 4-bit base, got null; 4-bit "
                "weights cannot learn themselves"
            )
        if self.quantization is not None and importlib.util.find_spec("bitsandbytes") is None:
            raise ValueError(
                "base.quantization: nf4 needs bitsandbytes, which is not installed; pip install "
                "bitsandbytes, or set it to null"
            )
        if self.attn_implementation == "flash_attention_2" and not any(map(importlib.util.find_spec, FLASH)):
            raise ValueError(
                "base.attn_implementation: flash_attention_2 needs flash-attn, which is not installed; pip "
                "install flash-attn (on a machine with its GPU), or set it to sdpa"
            )
        if self.dtype == "float16" and self.lora is None:
            raise ValueError(
                "base.dtype: expected float32 or bfloat16 when all weights learn, got float16; set "
                "it, or add base.lora"
            )


def load_model(config: ModelConfig) -> nn.Module:
    """Load the model (in train mode, so that checkpointing and dropout are on) with its learning weights
    marked.

    A folder with saved adapters is loaded on its own base model and its adapters go on learning.

    Raises: ValueError or OSError naming the model where it cannot be loaded.
    """
    path = _found(model_path(config.name_or_path, config.gguf_file, config.revision), config.from_scratch)
    adapters = path if (Path(path) / "adapter_config.json").is_file() else None
    if adapters is not None:
        if config.lora is not None:
            raise ValueError(
                f"base.lora: expected null for the saved adapters in {path!r}, whose own settings "
                "apply; set lora: null"
            )
        with _named(adapters):
            path = _found(str(PeftConfig.from_pretrained(adapters).base_model_name_or_path))
    model: nn.Module = _base_model(path, config)
    if config.quantization:
        model = prepare_model_for_kbit_training(model, use_gradient_checkpointing=False)
        for module in model.modules():
            # At the first pass without gradients bitsandbytes would put a CPU's weights into a layout for
            # inference, through which nothing is differentiated ever after, and only warn of it.
            if hasattr(module, "support_avx512bf16_for_cpu"):
                vars(module)["support_avx512bf16_for_cpu"] = False
    if config.gradient_checkpointing:
        model.gradient_checkpointing_enable({"use_reentrant": False})  # type: ignore[operator]
    if adapters is not None:
        with _named(adapters):
            model = PeftModel.from_pretrained(model, adapters, is_trainable=True)
    elif config.lora is not None:
        model = get_peft_model(model, _lora(causal_lm(model), config.lora))  # type: ignore[arg-type]
    if has_adapter(model):
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter.data = parameter.data.float()
    return shorten(model).train()


def _lora(model: PreTrainedModel, config: LoraSettings) -> LoraConfig:
    """The settings in PEFT's terms. Raises: ValueError for names or layers that the model has not, of which
    PEFT would leave some out without a word."""
    layers: Any = getattr(model.get_decoder(), "layers", None)
    parts = (model if layers is None else layers).named_modules()
    linear = {name.rpartition(".")[2] for name, part in parts if isinstance(part, nn.Linear)}
    wanted: str | list[str] = config.target_modules
    if wanted == "all-linear":
        # PEFT takes a choice of layers beside a list of names only.
        wanted = wanted if config.layers is None else sorted(linear)
    else:
        own = [name for name, _ in model.named_modules()]
        patterns = [wanted] if isinstance(wanted, str) else [rf"(.*\.)?{re.escape(w)}" for w in wanted]
        missing = [p for p in patterns if not any(re.fullmatch(p, name) for name in own)]
        if missing:
            raise ValueError(
                f"base.lora.target_modules: expected parts of the model, whose linear layers are "
                f"{sorted(linear)}, got {config.target_modules!r}"
            )
    if config.layers is not None and layers is not None and max(config.layers, default=0) >= len(layers):
        raise ValueError(
            f"base.lora.layers: expected numbers below {len(layers)}, the model's layers, got "
            f"{max(config.layers)}"
        )
    return LoraConfig(
        r=config.r,
        lora_alpha=config.alpha,
        lora_dropout=config.dropout,
        target_modules=wanted,
        layers_to_transform=config.layers,
        task_type="CAUSAL_LM",
    )


def load_seeded(config: ModelConfig, seed: int) -> nn.Module:
    """`load_model` with its own random state: fresh adapters and weights from scratch depend on `seed`
    alone."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        return load_model(config)


def has_adapter(model: nn.Module) -> bool:
    """Whether only adapters learn, so that a checkpoint needs to hold nothing else."""
    return isinstance(model, PeftModel)


def _base_model(path: str, config: ModelConfig) -> PreTrainedModel:
    shared: dict[str, object] = {"revision": config.revision, "trust_remote_code": config.trust_remote_code}
    if config.from_scratch:
        return _random_model(path, config, shared)
    with _named(path):
        model: PreTrainedModel = AutoModelForCausalLM.from_pretrained(
            path,
            dtype=config.dtype,
            attn_implementation=config.attn_implementation,
            use_safetensors=True,
            quantization_config=_nf4() if config.quantization else None,
            **shared,
            **config.config,
        )
    return model


def _random_model(path: str, config: ModelConfig, shared: dict[str, object]) -> PreTrainedModel:
    with _named(path):
        settings = AutoConfig.from_pretrained(path, **shared)
    for name, value in config.config.items():
        if not hasattr(settings, name):
            raise ValueError(
                f"base.config.{name}: expected a field of {type(settings).__name__}, got an unknown name"
            )
        setattr(settings, name, value)
    dtype = torch.float32 if config.dtype == "auto" else getattr(torch, config.dtype)
    model: PreTrainedModel = AutoModelForCausalLM.from_config(
        settings, dtype=dtype, attn_implementation=config.attn_implementation
    )
    return model


def _found(path: str, from_scratch: bool = False) -> str:
    """The path as it is, once it is known to be a folder whose weights can be read, or to read like a hub id.

    Raises: ValueError where it is neither, or where its weights are pickles, which can run code when loaded.
    """
    if not Path(path).is_dir():
        if not HUB_ID.fullmatch(path):
            raise ValueError(
                f"name_or_path: no model {path!r}; give a folder, a hub id (owner/name) or tinychat:<stage>"
            )
        return path
    pickles = sorted(file.name for pattern in PICKLES for file in Path(path).glob(pattern))
    if pickles and not from_scratch and not list(Path(path).glob("*.safetensors")):
        raise ValueError(
            f"name_or_path: the model {path!r} holds its weights as a pickle ({pickles[0]}), which can run "
            "code when it is loaded; convert them to safetensors"
        )
    return path


@contextmanager
def _named(path: str) -> Iterator[None]:
    """The library's words for what went wrong, on one line, after the name that the user gave."""
    try:
        yield
    except SafetensorError as error:
        raise ValueError(
            f"name_or_path: the weights of the model {path!r} are damaged or cut short ({error}); copy or "
            "download them again"
        ) from error
    except (OSError, ValueError) as error:
        # Not the error's own class: some of the libraries' take more than a message.
        kind = OSError if isinstance(error, OSError) else ValueError
        words = " ".join(str(error).split())
        raise kind(f"name_or_path: cannot load the model {path!r}: {words}") from error


def _nf4() -> BitsAndBytesConfig:
    return BitsAndBytesConfig(
        load_in_4bit=True,
        bnb_4bit_quant_type="nf4",
        bnb_4bit_compute_dtype=torch.bfloat16,
        bnb_4bit_use_double_quant=True,
    )
