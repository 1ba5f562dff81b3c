"""Replies drawn at random beside the greedy one: an attacker asks again, and the model answers anew."""

from __future__ import annotations

import hashlib
from dataclasses import dataclass

from datamodules.fields import Count, Positive, Share, checked
from lightning_modules.models.requests import Decoding


@checked
@dataclass(frozen=True)
class Sampling:
    """How many replies are sampled to every prompt, and how."""

    k: Count = 10
    """Sampled replies per prompt; the greedy one is apart."""
    temperature: Positive = 1.0
    """Of the sampling."""
    top_p: Share = 1.0
    """Nucleus of the sampling."""

    def decoding(self, max_new_tokens: int) -> Decoding:
        """How one of the replies is drawn."""
        return Decoding(max_new_tokens, self.temperature, self.top_p)


def sample_seed(seed: int, key: str, repetition: int) -> int:
    """Seed of one draw of a batch, named by its first key: neither batches nor repetitions share one."""
    digest = hashlib.blake2b(f"{seed}/{key}/{repetition}".encode(), digest_size=8).digest()
    return int.from_bytes(digest, "big") >> 1
