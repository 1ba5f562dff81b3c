"""The rows of a planned step: as many as the run's, as long as they may be, without padding."""

from __future__ import annotations

from collections import Counter

import torch

from datamodules.batch import AdversarialBatch, TrainingBatch, UtilityBatch
from datamodules.division import STREAMS, Division
from experiments.config.errors import ConfigError


def kinds_of_micro_batches(division: Division, devices: int) -> Counter[tuple[int, int, int]]:
    """How many of a step's micro-batches hold so many rows to attack, harmful rows to train on and utility
    rows on one device, in their order. Raises: ConfigError where they do not divide."""
    try:
        division.check_devices(devices)
    except ValueError as error:
        raise ConfigError(f"{error}; set it or --devices") from error
    kinds: Counter[tuple[int, int, int]] = Counter()
    for place in range(division.micro_batches):
        harmful, utility = (division.part(name, place) for name in STREAMS)
        outer = 0 if harmful is None else division.rows("harmful") // devices
        together = harmful is not None and division.begins_attack(harmful)
        attacked = division.attacked // devices if together else 0
        kinds[attacked, outer, 0 if utility is None else division.rows("utility") // devices] += 1
    return kinds


def full_rows(counts: dict[str, int], prompt: int, reply: int, vocabulary: int) -> TrainingBatch:
    """Rows without any padding, of the given lengths in tokens; a utility row is a prompt and a reply."""

    def ids(rows: int, length: int) -> torch.Tensor:
        return torch.arange(rows * length).view(rows, length) % vocabulary

    def full(rows: int, length: int) -> torch.Tensor:
        return torch.ones(rows, length, dtype=torch.bool)

    def behaviours(rows: int) -> AdversarialBatch | None:
        prompts, replies = (ids(rows, prompt), full(rows, prompt)), (ids(rows, reply), full(rows, reply))
        return (
            AdversarialBatch(torch.arange(rows), *prompts, prompts[1], *replies, *replies) if rows else None
        )

    utility = counts["utility"]
    chats = None
    if utility:
        conversations = ids(utility, prompt + reply)
        labels = conversations.clone()
        labels[:, :prompt] = -100
        chats = UtilityBatch(conversations, full(utility, prompt + reply), labels)
    return TrainingBatch(behaviours(counts["harmful"]), chats, behaviours(counts.get("attacked", 0)))
