"""What `experiments.benchmarks.gpu` calls: the model of a shape, and our side and the yardstick's on it."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass, replace
from functools import partial
from typing import Any, NamedTuple

import torch
from peft import LoraConfig, get_peft_model, prepare_model_for_kbit_training
from torch import nn
from transformers import AutoModelForCausalLM, LlamaConfig

from datamodules.batch import AdversarialBatch, UtilityBatch
from datamodules.sources.tinychat.sources import TinyChatHarmful
from datamodules.text.chat_format import ChatFormat
from datamodules.text.encoding import Encoder, EncodingConfig, adversarial_batch
from datamodules.text.tokenizers import TokenizerConfig, load_tokenizer
from experiments.benchmarks import gcg_yardstick
from experiments.benchmarks.rows import MICRO_BATCH, UTILITY_BATCHES, equal_rows
from experiments.benchmarks.sides import STEPS, Ours, Public
from lightning_modules.attacks.suffix.gcg import GCG
from lightning_modules.attacks.suffix.search import SuffixSearch
from lightning_modules.attacks.suffix.slots import typable_tokens
from lightning_modules.models.decoder import causal_lm
from lightning_modules.models.language_model import LanguageModel
from lightning_modules.models.low_rank import lengthen, shorten


class Shape(NamedTuple):
    """Sizes of a model, of its rows, and of a GCG step."""

    model: dict[str, int]
    prompt: int
    reply: int
    candidates: int


SHAPES = {
    "7b": Shape(
        {
            "vocab_size": 32_000, "hidden_size": 4096, "intermediate_size": 14_336, "num_hidden_layers": 32,
            "num_attention_heads": 32, "num_key_value_heads": 8, "max_position_embeddings": 4096,
        }, 128, 64, 512,
    ),
    "toy": Shape(
        {
            "vocab_size": 2048, "hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 2,
            "num_attention_heads": 4, "num_key_value_heads": 2, "max_position_embeddings": 512,
        }, 24, 8, 16,
    ),
}  # fmt: skip
"""Mistral's sizes, and a test's."""


@dataclass
class Call:
    """What one side does, and how much of it there is."""

    run: Callable[[], object]
    units: float
    unit: str
    ready: Callable[[], AbstractContextManager[object]] = nullcontext
    """What holds around it and is not timed."""
    like: str | None = None
    """The side whose operations it has: a compiler's kernels are not dispatched, and cannot be counted."""


@dataclass
class Model:
    """A model under measurement, with a step's rows on its device."""

    module: nn.Module
    shape: Shape
    adversarial: AdversarialBatch
    utility: list[UtilityBatch]
    four_bits: bool

    @property
    def device(self) -> torch.device:
        return self.adversarial.prompt_ids.device


def build(name: str, device: torch.device, four_bits: bool = False) -> Model:
    """Random weights with fp32 LoRA r 64 on all linear layers, whose adapters do something."""
    shape = SHAPES[name]
    torch.manual_seed(0)
    with torch.device(device):
        config = LlamaConfig(**shape.model)
        module: Any = AutoModelForCausalLM.from_config(config, dtype=torch.bfloat16)
    if four_bits:
        _quantise(module, device)
    lora = LoraConfig(
        r=64, lora_alpha=16, lora_dropout=0.0, target_modules="all-linear", task_type="CAUSAL_LM"
    )
    module = shorten(get_peft_model(module, lora))
    for own, parameter in module.named_parameters():
        if parameter.requires_grad:
            parameter.data = parameter.data.float()
        if "lora_B" in own:
            nn.init.normal_(parameter, std=0.02)
    adversarial, utility = equal_rows(shape.model["vocab_size"], shape.prompt, shape.reply)
    rows = [utility[0].to(device)] * UTILITY_BATCHES
    return Model(module.train(), shape, adversarial.to(device), rows, four_bits)


def _quantise(module: Any, device: torch.device) -> None:
    """Its linear layers in NF4, as a checkpoint is loaded."""
    import bitsandbytes

    head = module.get_output_embeddings()
    for parent in list(module.modules()):
        for name, layer in list(parent.named_children()):
            if type(layer) is not nn.Linear or layer is head:
                continue
            made = bitsandbytes.nn.Linear4bit(
                layer.in_features, layer.out_features, bias=False, compute_dtype=torch.bfloat16,
                compress_statistics=True, quant_type="nf4", device="meta",
            )  # fmt: skip
            made.weight = bitsandbytes.nn.Params4bit(
                layer.weight.data.cpu(), requires_grad=False, compress_statistics=True, quant_type="nf4"
            )
            setattr(parent, name, made.to(device))
    module.is_loaded_in_4bit = True
    prepare_model_for_kbit_training(module, use_gradient_checkpointing=False)


def attacks(model: Model, backend: str) -> dict[str, Call]:
    """A step's rows attacked at once: all iterations, set-up and merging included."""
    tokens = STEPS * len(model.adversarial) * (model.shape.prompt + model.shape.reply)
    return _calls(model, [], backend, "attack", tokens, size=None)


def training_steps(model: Model, backend: str) -> dict[str, Call]:
    """Attack and gradients of 8 + 56 rows; the optimiser's own update is left out."""
    shape, rows = model.shape, (len(model.adversarial), sum(map(len, model.utility)))
    tokens = rows[0] * (shape.prompt + 2 * shape.reply) + rows[1] * (shape.prompt + shape.reply)
    return _calls(model, model.utility, backend, "step", tokens, size=MICRO_BATCH)


def gcg_steps(model: Model, backend: str) -> dict[str, Call]:
    """One step of one behaviour, set-up included; with the packaged tokenizer, whatever the vocabulary."""
    chat = ChatFormat(load_tokenizer(TokenizerConfig("tinychat:aligned")))
    rows = Encoder(chat, EncodingConfig(160)).harmful(TinyChatHarmful("validation").rows())
    batch = adversarial_batch(rows[:1], "user").to(model.device)
    width = model.shape.candidates
    attack = GCG(num_steps=1, width=width, topk=64, stop_at_target=False)

    def ours(side: LanguageModel) -> object:
        return attack(side, batch, torch.Generator().manual_seed(0))

    sides = {"ours": LanguageModel(model.module, chat=chat)}
    if not model.four_bits:
        sides["ours, merged"] = LanguageModel(model.module, chat=chat, merge_rounded=True)
    calls = {
        name: Call(partial(_mixed, model.device, partial(ours, side)), width, "candidates")
        for name, side in sides.items()
    }
    if model.four_bits:
        return calls
    with sides["ours"].frozen():
        search = SuffixSearch(sides["ours"], batch, 20, " x", width)
    target = search.target.ids[0][search.target.mask[0]].tolist()
    behaviour = gcg_yardstick.Behaviour(chat, search.slots[0], batch.systems[0], target)
    allowed = typable_tokens(chat, model.shape.model["vocab_size"], True).to(model.device)

    def yardstick() -> object:
        rng = torch.Generator().manual_seed(0)
        given = model.module, behaviour, behaviour.slot.suffix, allowed, 64, width, rng
        return gcg_yardstick.step(*given)

    own = partial(pefts_layers, model.module)
    calls["yardstick"] = Call(partial(_mixed, model.device, yardstick), width, "candidates", own)
    return calls


def _calls(
    model: Model, utility: list[UtilityBatch], backend: str, method: str, tokens: int, size: int | None
) -> dict[str, Call]:
    """Our side as it is, on merged weights where they can be, and compiled; and the yardstick, which has no
    way with a base in 4 bits."""

    def call(side: Ours | Public) -> Call:
        return Call(partial(_mixed, model.device, getattr(side, method)), tokens, "tokens")

    ours = {"ours": Ours(model.module, model.adversarial, utility)}
    if not model.four_bits:
        ours["ours, merged"] = Ours(model.module, model.adversarial, utility)
        ours["ours, merged"].model = LanguageModel(model.module, merge_rounded=True)
    calls = {name: call(side) for name, side in ours.items()}
    if backend != "none":
        last = list(calls)[-1]
        ready = partial(compiled, model.module, backend)
        calls[f"{last}, compiled"] = replace(calls[last], ready=ready, like=last)
        if backend == "inductor":
            # `base.compile_attacks`: an iteration's passes as one graph.
            graph = Ours(model.module, model.adversarial, utility)
            graph.model = LanguageModel(model.module, merge_rounded=not model.four_bits, compiled=True)
            calls[f"{last}, attack in one graph"] = replace(call(graph), like=last)
    if not model.four_bits:
        public = call(Public(model.module, model.adversarial, utility, size))
        calls["yardstick"] = replace(public, ready=partial(pefts_layers, model.module))
    return calls


@contextmanager
def pefts_layers(module: nn.Module) -> Iterator[None]:
    """Adapters computed as the public code has them, by PEFT's own layers, while the context lasts."""
    lengthen(module)
    try:
        yield
    finally:
        shorten(module)


@contextmanager
def compiled(module: nn.Module, backend: str) -> Iterator[None]:
    """Every decoder layer compiled while the context lasts."""
    layers: Any = causal_lm(module).get_decoder().layers
    for layer in layers:
        layer.compile(backend=backend)
    try:
        yield
    finally:
        for layer in layers:
            layer._compiled_call_impl = None


def _mixed(device: torch.device, call: Callable[[], object]) -> object:
    """As the trainer's `bf16-mixed`."""
    with torch.autocast(device.type, torch.bfloat16):
        return call()
