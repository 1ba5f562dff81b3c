"""What defences by majority share: of several replies to copies of a request, one that agrees with most."""

from __future__ import annotations

from collections.abc import Sequence

import torch

from lightning_modules.attacks.verdicts import Verdict, verdicts


def elected(
    refusal: Verdict, prompt: str, replies: Sequence[str], rng: torch.Generator
) -> tuple[str, list[bool]]:
    """One of the replies that agree with the majority, at random, and which of them refuse.

    As published, a jailbreak needs more than half: a tie is a refusal.
    """
    refused = verdicts(refusal, [prompt] * len(replies), replies, [""] * len(replies))
    most = 2 * sum(refused) >= len(refused)
    agreeing = [reply for reply, own in zip(replies, refused, strict=True) if own == most]
    return agreeing[int(torch.randint(0, len(agreeing), (1,), generator=rng))], refused
