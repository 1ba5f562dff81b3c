"""Batches for the benchmark: random rows of equal length, or HarmBench and Dolly rows with the Llama-2
tokenizer's lengths."""

from __future__ import annotations

import os
from dataclasses import replace
from pathlib import Path

import torch

from datamodules.batch import AdversarialBatch, UtilityBatch
from datamodules.sources.harmbench import HarmBench
from datamodules.sources.tables import ChatTable
from datamodules.streams import Stream
from datamodules.text.chat_format import ChatFormat
from datamodules.text.encoding import (
    EncodedChat,
    EncodedHarmful,
    Encoder,
    EncodingConfig,
    adversarial_batch,
    utility_batch,
)
from datamodules.text.tokenizers import TokenizerConfig, load_tokenizer

LLAMA2_TEMPLATE = (
    "{{ bos_token }}[INST] {{ messages[0]['content'].strip() }} [/INST]"
    "{% if messages|length > 1 %} {{ messages[1]['content'].strip() }} {{ eos_token }}{% endif %}"
)
# A step of the recipe: 8 adversarial rows and 56 utility rows, these in micro-batches of 8.
ADVERSARIAL_ROWS, MICRO_BATCH, UTILITY_BATCHES, MAX_LENGTH = 8, 8, 7, 256


def equal_rows(
    vocabulary: int, prompt: int = 128, reply: int = 32
) -> tuple[AdversarialBatch, list[UtilityBatch]]:
    """Random rows without any padding; the first 24 prompt tokens are the template's, or all but the last."""
    generator = torch.Generator().manual_seed(0)

    def ids(length: int) -> torch.Tensor:
        return torch.randint(0, vocabulary, (ADVERSARIAL_ROWS, length), generator=generator)

    def full(length: int) -> torch.Tensor:
        return torch.ones(ADVERSARIAL_ROWS, length, dtype=torch.bool)

    attackable = full(prompt)
    attackable[:, : min(24, prompt - 1)] = False
    batch = AdversarialBatch(
        torch.arange(ADVERSARIAL_ROWS),
        ids(prompt),
        full(prompt),
        attackable,
        ids(reply),
        full(reply),
        ids(reply),
        full(reply),
    )
    batch = replace(batch, lengths=batch.counted()).validate()
    conversations = ids(prompt + reply)
    labels = conversations.clone()
    labels[:, :prompt] = -100
    return batch, [UtilityBatch(conversations, full(prompt + reply), labels, ADVERSARIAL_ROWS * reply)]


def natural_examples() -> tuple[list[EncodedHarmful], list[EncodedChat]]:
    """HarmBench's training rows and 2,000 rows of Dolly, by the Llama-2 tokenizer."""
    root = Path(os.environ.get("THUNDERCAT_DATA", "../shared"))
    data = root / "data"
    chat = ChatFormat(
        load_tokenizer(TokenizerConfig(str(root / "models/tokenizers/llama2"), chat_template=LLAMA2_TEMPLATE))
    )
    encoder = Encoder(chat, EncodingConfig(MAX_LENGTH, "prompt", on_bad_row="skip"))
    bench = data / "harmbench"
    source = HarmBench(
        str(bench / "behavior_datasets/extra_behavior_datasets/adv_training_behaviors.csv"),
        str(bench / "optimizer_targets/extra_targets/adv_training_targets.json"),
        str(data / "cat_official/adv_training_behaviors_safe_responses.csv"),
    )
    harmful = encoder.harmful(source.rows())
    dolly = ChatTable(str(data / "dolly/databricks-dolly-15k.jsonl"), "dolly", limit=2000)
    return harmful, encoder.chats(dolly.rows())


def natural_rows(vocabulary: int) -> tuple[AdversarialBatch, list[UtilityBatch]]:
    """One length-bucketed micro-batch of HarmBench rows and the utility rows of a step, from Dolly.

    A vocabulary other than the tokenizer's 32,000 keeps the lengths and spreads the ids over it.
    """
    harmful, chats = natural_examples()
    rows = [harmful[i] for i in Stream([e.length for e in harmful], ADVERSARIAL_ROWS, 0).batch(0)]
    order = Stream([e.length for e in chats], MICRO_BATCH, 1)
    keep = [utility_batch([chats[i] for i in order.batch(number)]) for number in range(UTILITY_BATCHES)]
    batch = adversarial_batch(rows, "prompt")
    if vocabulary == 32_000:
        return batch, keep
    factor = vocabulary // 32_000
    spread = {f"{name}_ids": getattr(batch, f"{name}_ids") * factor for name in ("prompt", "harmful", "safe")}
    return AdversarialBatch(**(vars(batch) | spread)), [
        _spread(conversations, factor) for conversations in keep
    ]


def _spread(utility: UtilityBatch, factor: int) -> UtilityBatch:
    labels = torch.where(utility.labels == -100, -100, utility.labels * factor)
    return UtilityBatch(utility.input_ids * factor, utility.attention_mask, labels, utility.num_scored)
