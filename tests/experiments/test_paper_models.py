"""The recipes for the paper's models: a step of each at toy width, with the real tokenizer and template where
they are at hand."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
import yaml
from transformers import (
    GemmaConfig,
    LlamaConfig,
    MistralConfig,
    Phi3Config,
    PreTrainedConfig,
    PreTrainedTokenizerFast,
)

from datamodules.text.model_files import PACKAGED_ROOT
from experiments.config.compose import compose
from tests.conftest import ROOT

Run = Callable[..., tuple[int, str, str]]
NARROW = {
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 512,
    "pad_token_id": 0,
}
MISTRAL = (
    "{{ bos_token }}{% for m in messages %}{% if m['role'] == 'user' %}[INST] {{ m['content'] }} [/INST]"
    "{% else %} {{ m['content'] }} {{ eos_token }}{% endif %}{% endfor %}"
)
"""One turn of Mistral's, whose tokenizer is not at hand."""
LLAMA2 = (
    "{% set told = messages[0]['role'] == 'system' %}{% for m in messages[told:] %}"
    "{% if m['role'] == 'user' %}{{ bos_token }}[INST] {% if told and loop.first %}<<SYS>>\n"
    "{{ messages[0]['content'] }}\n<</SYS>>\n\n{% endif %}{{ m['content'].strip() }} [/INST]"
    "{% else %} {{ m['content'].strip() }} {{ eos_token }}{% endif %}{% endfor %}"
)
"""The format that Llama-2-chat was trained in: its tokenizer at hand comes without a template."""
MODELS: dict[str, tuple[type[PreTrainedConfig], str | None, str | None, float]] = {
    "zephyr_7b": (MistralConfig, None, None, 0.075),
    "gemma_2b": (GemmaConfig, None, None, 0.1),
    "phi3_mini": (Phi3Config, "phi3-mini", None, 0.1),
    "mistral_7b": (MistralConfig, "llama2", MISTRAL, 0.05),
    "llama2_7b": (LlamaConfig, "llama2", LLAMA2, 0.05),
}
"""Architecture; tokenizer at hand (null: the packaged model's); template where that has none; radius."""


@pytest.mark.parametrize("name", MODELS)
@pytest.mark.parametrize("method", ["cat", "capo"])
def test_radii_are_the_model_s(name: str, method: str, in_root: Path) -> None:
    config = compose([f"configs/experiment/{method}_{name}.yaml"], [])
    radius = MODELS[name][3]
    assert config["model"]["init_args"]["attack"]["init_args"]["epsilon"] == radius
    evaluated = yaml.safe_dump(config["trainer"]["callbacks"])
    assert f"epsilon: {radius}" in evaluated
    assert config["trainer"]["default_root_dir"] == f"runs/{method}_{name}_seed0"


@pytest.mark.parametrize("name", MODELS)
@pytest.mark.parametrize("method", ["cat", "capo"])
def test_a_step_at_toy_width(
    name: str, method: str, thundercat: Run, in_root: Path, public_data: Path, tmp_path: Path
) -> None:
    architecture, tokenizer, template, _ = MODELS[name]
    source = public_data / "models" / "tokenizers" / tokenizer if tokenizer else PACKAGED_ROOT / "aligned"
    folder = tmp_path / "toy"
    folder.mkdir()
    for path in source.iterdir():
        if path.name.startswith(("tokenizer", "chat_template", "special")):
            shutil.copy(path, folder)
    words = PreTrainedTokenizerFast.from_pretrained(folder)
    settings = architecture(**NARROW, vocab_size=len(words), head_dim=8)
    settings.save_pretrained(folder)
    status, _, err = thundercat(
        *("fit", "--config", str(ROOT / f"configs/experiment/{method}_{name}.yaml"), "--trainer.max_steps=1"),
        *(f"--model.base.name_or_path={folder}", "--model.base.from_scratch=true", "--trainer.callbacks=[]"),
        *("--model.base.quantization=null", "--model.base.dtype=float32", "--trainer.precision=32-true"),
        *("--data.harmful.0.limit=2", "--data.utility.0.limit=40", "--data.encoding.max_length=512"),
        *("--data.harmful_per_step=4", f"--data.utility_per_step={2 if method == 'cat' else 0}"),
        *("--data.micro_batches=2", f"--data.tokenizer.chat_template={json.dumps(template)}"),
        *(f"--trainer.default_root_dir={tmp_path / 'run'}", "--trainer.accelerator=cpu"),
    )
    assert status == 0, err
