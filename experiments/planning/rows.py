"""The rows of a planned step: as many as the run's, as long as they may be, without padding."""

from __future__ import annotations

import torch

from datamodules.adversarial import AdversarialData
from datamodules.batch import AdversarialBatch, TrainingBatch, UtilityBatch
from experiments.config.errors import ConfigError


def per_micro_batch(data: AdversarialData, devices: int) -> dict[str, int]:
    """Rows of each stream in a micro-batch on one device. Raises: ConfigError where they do not divide."""
    counts = {}
    for name, count in data.per_step.items():
        parts = data.micro_batches * devices
        if count % parts:
            raise ConfigError(
                f"data.{name}_per_step: expected a multiple of micro_batches x devices = "
                f"{data.micro_batches} x {devices}, got {count}; set data.micro_batches or --devices"
            )
        counts[name] = count // parts
    return counts


def full_rows(counts: dict[str, int], prompt: int, reply: int, vocabulary: int) -> TrainingBatch:
    """Rows without any padding, of the given lengths in tokens; a utility row is a prompt and a reply."""

    def ids(rows: int, length: int) -> torch.Tensor:
        return torch.arange(rows * length).view(rows, length) % vocabulary

    def full(rows: int, length: int) -> torch.Tensor:
        return torch.ones(rows, length, dtype=torch.bool)

    harmful, utility = counts["harmful"], counts["utility"]
    adversarial = None
    if harmful:
        adversarial = AdversarialBatch(
            torch.arange(harmful),
            ids(harmful, prompt),
            full(harmful, prompt),
            full(harmful, prompt),
            ids(harmful, reply),
            full(harmful, reply),
            ids(harmful, reply),
            full(harmful, reply),
        )
    chats = None
    if utility:
        conversations = ids(utility, prompt + reply)
        labels = conversations.clone()
        labels[:, :prompt] = -100
        chats = UtilityBatch(conversations, full(utility, prompt + reply), labels)
    return TrainingBatch(adversarial, chats)
