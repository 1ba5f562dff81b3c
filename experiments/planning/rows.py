"""The rows of a planned step: as many as the run's, as long as they may be, without padding."""

from __future__ import annotations

from typing import NamedTuple

import torch

from datamodules.batch import AdversarialBatch, TrainingBatch, UtilityBatch
from datamodules.division import STREAMS, Division
from experiments.config.errors import ConfigError


class Kind(NamedTuple):
    """Micro-batches of one kind, on one device."""

    harmful: int
    """Rows to train on."""
    utility: int
    attacked: int
    """Rows of one call of the attack."""
    times: int
    """How many of a step's micro-batches these are."""
    attacks: int
    """How many of them call the attack."""


def kinds_of_micro_batches(division: Division, devices: int) -> list[Kind]:
    """A step's micro-batches, in the order of their first ones. Raises: ConfigError where their rows do not
    divide."""
    try:
        division.check_devices(devices)
    except ValueError as error:
        raise ConfigError(f"{error}; set it or --devices") from error
    apart = division.attacked == division.rows("harmful")
    kinds: dict[tuple[int, int], Kind] = {}
    for place in range(division.micro_batches):
        harmful, utility = (division.part(name, place) for name in STREAMS)
        rows = (
            0 if harmful is None else division.rows("harmful") // devices,
            0 if utility is None else division.rows("utility") // devices,
        )
        attacks = harmful is not None and (apart or division.begins_attack(harmful))
        before = kinds.get(
            rows, Kind(*rows, division.attacked // devices if harmful is not None else 0, 0, 0)
        )
        kinds[rows] = before._replace(times=before.times + 1, attacks=before.attacks + attacks)
    return list(kinds.values())


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
