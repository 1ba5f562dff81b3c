"""Shared fixtures: tiny random models of every supported family, ragged batches, the folder of public
data."""

from __future__ import annotations

import copy
import gc
import os
from collections.abc import Callable
from functools import cache
from itertools import islice
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import (
    AutoModelForCausalLM,
    Gemma2Config,
    GemmaConfig,
    LlamaConfig,
    MistralConfig,
    Phi3Config,
    PreTrainedConfig,
    PreTrainedModel,
    Qwen2Config,
)
from transformers.masking_utils import ALL_MASK_ATTENTION_FUNCTIONS, eager_mask

from datamodules.batch import AdversarialBatch, UtilityBatch
from datamodules.sources.injection.sources import Injected
from datamodules.sources.tinychat.sources import TinyChatHarmful
from datamodules.sources.tinychat.tickets import TinyChatTickets
from datamodules.text.chat_format import ChatFormat
from datamodules.text.encoding import Encoder, EncodingConfig, adversarial_batch
from datamodules.text.tokenizers import TokenizerConfig, load_tokenizer
from lightning_modules.models.language_model import LanguageModel

ROOT = Path(__file__).resolve().parent.parent
VOCABULARY = 97
SHAPE = {
    "vocab_size": VOCABULARY,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 128,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
}
FAMILIES: dict[str, PreTrainedConfig] = {
    "llama": LlamaConfig(**SHAPE),
    "llama_tied": LlamaConfig(**SHAPE, tie_word_embeddings=True),
    "mistral": MistralConfig(**SHAPE, sliding_window=6),
    "gemma": GemmaConfig(**SHAPE, head_dim=8),
    "gemma2": Gemma2Config(**SHAPE, head_dim=8, sliding_window=6),
    "phi3": Phi3Config(**SHAPE, sliding_window=6),
    "qwen2": Qwen2Config(**SHAPE),
}


def _finite_mask(*args: Any, **kwargs: Any) -> torch.Tensor:
    """Eager attention takes its softmax in fp32, where the lowest fp64 number is minus infinity: a column of
    padding, which sees nothing, would be nan and all columns after it."""
    return eager_mask(*args, **kwargs).clamp_min(torch.finfo(torch.float32).min)


ALL_MASK_ATTENTION_FUNCTIONS.register("eager", _finite_mask)


def tiny_model(
    family: str = "llama", dtype: torch.dtype = torch.float32, seed: int = 0, **settings: int
) -> PreTrainedModel:
    """A random two-layer model, in evaluation mode; `settings` replace fields of its configuration."""
    torch.manual_seed(seed)
    config = copy.deepcopy(FAMILIES[family])
    for name, value in settings.items():
        setattr(config, name, value)
    model: PreTrainedModel = AutoModelForCausalLM.from_config(config, dtype=dtype)
    return model.eval()


@cache
def tinychat_format() -> ChatFormat:
    """The packaged model's chat format."""
    return ChatFormat(load_tokenizer(TokenizerConfig("tinychat:aligned")))


def chat_model(family: str = "llama", dtype: torch.dtype = torch.float32) -> LanguageModel:
    """A random model of a family behind the packaged model's chat format."""
    return LanguageModel(
        tiny_model(family, dtype, vocab_size=2048, max_position_embeddings=256), chat=tinychat_format()
    )


def text_batch(size: int = 3, start: int = 0) -> AdversarialBatch:
    """Held-out requests of the packaged corpus with prompts of different lengths, texts included."""
    rows = Encoder(tinychat_format(), EncodingConfig(160)).harmful(TinyChatHarmful("validation").rows())
    return adversarial_batch(rows[3 * start : 3 * (start + size) : 3], "user")


def data_batch(size: int = 2) -> AdversarialBatch:
    """Documents with hidden instructions, of which attacks may write the document alone."""
    source = Injected(TinyChatTickets("test", size), "test", kinds=["fact"])
    rows = Encoder(tinychat_format(), EncodingConfig(200, attackable="data", system="Be brief."))
    return adversarial_batch(rows.harmful(source.rows()), "data")


def untrusted_batch() -> AdversarialBatch:
    """A document with a hidden instruction, then a request without one: of each an attack may write what
    comes from outside."""
    document = Injected(TinyChatTickets("test", 1), "test", kinds=["fact"]).rows()
    rows = Encoder(tinychat_format(), EncodingConfig(200, attackable="untrusted"))
    return adversarial_batch(
        rows.harmful([*document, *islice(TinyChatHarmful("validation").rows(), 1)]), "untrusted"
    )


def ragged_batch(
    seed: int = 0, size: int = 3, prompt: int = 9, harmful: int = 5, safe: int = 7, start: int = 0
) -> AdversarialBatch:
    """A ragged batch whose row i depends only on (seed, start + i): rows can be compared across batches."""
    rows = []
    for i in range(start, start + size):
        g = torch.Generator().manual_seed(1000 * seed + i)
        lengths = [prompt - (2 * i) % 5, harmful - i % 3, safe - (2 * i) % 5]
        rows.append([torch.randint(0, VOCABULARY, (n,), generator=g) for n in lengths])

    def pad(column: int, left: bool) -> tuple[torch.Tensor, torch.Tensor]:
        length = max(len(row[column]) for row in rows)
        ids, mask = torch.zeros(size, length, dtype=torch.long), torch.zeros(size, length, dtype=torch.bool)
        for i, row in enumerate(rows):
            where = slice(length - len(row[column]), length) if left else slice(0, len(row[column]))
            ids[i, where], mask[i, where] = row[column], True
        return ids, mask

    prompt_ids, prompt_mask = pad(0, left=True)
    harmful_ids, harmful_mask = pad(1, left=False)
    safe_ids, safe_mask = pad(2, left=False)
    # The last two prompt tokens and each row's first one are the template's.
    attackable = prompt_mask.clone()
    attackable[:, -2:] = False
    attackable[torch.arange(size), prompt_mask.long().argmax(1)] = False
    ids = torch.arange(start, start + size)
    return AdversarialBatch(
        ids, prompt_ids, prompt_mask, attackable, harmful_ids, harmful_mask, safe_ids, safe_mask
    ).validate()


def utility(seed: int = 0, size: int = 4, length: int = 10) -> UtilityBatch:
    """Right-padded conversations; token id 0 occurs as an ordinary token."""
    g = torch.Generator().manual_seed(seed)
    ids = torch.randint(0, VOCABULARY, (size, length), generator=g)
    mask = torch.arange(length)[None] < torch.tensor([length - i % 3 for i in range(size)])[:, None]
    labels = ids.masked_fill(~mask, -100)
    labels[:, :4] = -100
    return UtilityBatch(ids, mask, labels)


@pytest.fixture(scope="session")
def public_data() -> Path:
    """The folder of public data and models; tests that need it are skipped where it is absent."""
    folder = Path(os.environ.get("THUNDERCAT_DATA", ROOT.parent / "shared"))
    if not (folder / "data").is_dir():
        pytest.skip(f"public data not found at {folder}; set THUNDERCAT_DATA")
    return folder


@pytest.fixture
def in_root(monkeypatch: pytest.MonkeyPatch) -> Path:
    """Run from the project's root, as a user would."""
    monkeypatch.chdir(ROOT)
    return ROOT


@pytest.fixture
def thundercat(in_root: Path, capsys: pytest.CaptureFixture[str]) -> Callable[..., tuple[int, str, str]]:
    """Run the command line in this process: returns (exit status, stdout, stderr)."""
    from experiments.cli import main

    def run(*arguments: str) -> tuple[int, str, str]:
        status = main(arguments)
        captured = capsys.readouterr()
        return status, captured.out, captured.err

    return run


def pytest_collection_finish() -> None:
    """What is imported need not be searched for garbage again and again."""
    gc.collect()
    gc.freeze()


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--regenerate", action="store_true", help="write the golden loss curve again")
