"""SmoothLLM's guarantee (Robey et al. 2023, arXiv 2310.03684, proposition 4.2), which holds under an
assumption only: the suffix is k-unstable, i.e. the attack fails whenever at least k of its characters have
changed, and the changed request beside it alters nothing.

The assumption is measured, not believed: `instability` changes exactly k characters of found suffixes and
counts how often the attack still works.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

import torch
from scipy.stats import binom, hypergeom

from lightning_modules.attacks.verdicts import Verdict, verdicts
from lightning_modules.defences.smooth_llm import ALPHABET
from lightning_modules.models.language_model import LanguageModel
from lightning_modules.models.requests import Decoding, Request


def copy_fails(k: int, length: int, suffix: int, share: float, alphabet: int = len(ALPHABET)) -> float:
    """Chance that one swapped copy changes at least k of the suffix's characters.

    Of `length` characters floor(share * length) are drawn, i of which fall on the suffix (hypergeometric);
    each becomes another one with probability (v - 1) / v (binomial).
    """
    drawn = max(1, int(share * length))
    hits = hypergeom(length, suffix, drawn)
    changes = (alphabet - 1) / alphabet
    return float(sum(hits.pmf(i) * binom.sf(k - 1, i, changes) for i in range(k, min(drawn, suffix) + 1)))


def defence_success(num_copies: int, chance: float) -> float:
    """Chance that the majority fails to be jailbroken, each copy failing with this chance on its own; a tie
    counts for the defence."""
    return float(binom.sf((num_copies - 1) // 2, num_copies, chance))


@dataclass(frozen=True)
class Instability:
    """How often an attack still works with exactly k characters of its suffix changed."""

    k: int
    works: int
    draws: int


def instability(
    model: LanguageModel,
    requests: Sequence[Request],
    targets: Sequence[str],
    suffix_lengths: Sequence[int],
    success: Verdict,
    ks: Sequence[int],
    draws: int,
    seed: int = 0,
    decoding: Decoding | None = None,
) -> list[Instability]:
    """Change exactly k characters of the last `suffix_lengths` ones to other ones, at random, so often a
    request.

    Args:
        requests: whose attack works as it is.
        success: says whether a reply is the attacker's.
    """
    rng = torch.Generator().manual_seed(seed)
    found = []
    for k in ks:
        changed, wanted = [], []
        for request, target, length in zip(requests, targets, suffix_lengths, strict=True):
            for _ in range(draws if k <= length else 0):
                text = model.chat.neutralised(change(request.text, length, k, rng))
                changed.append(replace(request, text=text.strip()))
                wanted.append(target)
        replies = model.reply(changed, decoding or Decoding())
        works = verdicts(success, [own.text for own in changed], replies, wanted)
        found.append(Instability(k, sum(works), len(works)))
    return found


def change(text: str, suffix: int, k: int, rng: torch.Generator) -> str:
    """The text with exactly k of its last `suffix` characters replaced by other ones."""
    characters, start = list(text), len(text) - suffix
    for place in torch.randperm(suffix, generator=rng)[:k].tolist():
        others = [own for own in ALPHABET if own != characters[start + place]]
        characters[start + place] = others[int(torch.randint(0, len(others), (1,), generator=rng))]
    return "".join(characters)
