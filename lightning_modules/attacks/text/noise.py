"""Random changes of a text: Best-of-N's augmentations, and typing errors of characters or words."""

from __future__ import annotations

import random
from typing import Literal

LETTERS = "abcdefghijklmnopqrstuvwxyz"


def augment(text: str, sigma: float, rng: random.Random) -> str:
    """Best-of-N's text augmentation: scramble long words, flip letter case, shift printable characters.

    Each word of more than three letters has its inner letters shuffled with probability sqrt(sigma), each
    letter flips its case with probability sqrt(sigma), and each printable character moves to a neighbour in
    ASCII with probability sigma^3.
    """
    words = [
        _scrambled(word, rng) if len(word) > 3 and rng.random() < sigma**0.5 else word
        for word in text.split(" ")
    ]
    flipped = (c.swapcase() if rng.random() < sigma**0.5 else c for c in " ".join(words))
    shifted = (_neighbour(c, rng) if "!" <= c <= "~" and rng.random() < sigma**3 else c for c in flipped)
    return "".join(shifted)


def misspell(text: str, level: Literal["character", "word"], rate: float, rng: random.Random) -> str:
    """Change each character or word with probability `rate`: swap with the next, drop, double, or
    (characters) replace by a letter."""
    units: list[str] = list(text) if level == "character" else text.split(" ")
    out: list[str] = []
    i = 0
    while i < len(units):
        unit = units[i]
        i += 1
        if unit.isspace() or rng.random() >= rate:
            out.append(unit)
            continue
        kind = rng.randrange(4 if level == "character" else 3)
        if kind == 0 and i < len(units):
            out += [units[i], unit]
            i += 1
        elif kind == 1 and len(units) > 1:
            continue
        elif kind == 2:
            out += [unit, unit]
        else:
            out.append(rng.choice(LETTERS) if level == "character" else unit)
    noisy = ("" if level == "character" else " ").join(out)
    return noisy if noisy.strip() else text


def _scrambled(word: str, rng: random.Random) -> str:
    inner = list(word[1:-1])
    rng.shuffle(inner)
    return word[0] + "".join(inner) + word[-1]


def _neighbour(character: str, rng: random.Random) -> str:
    return chr(min(126, max(33, ord(character) + rng.choice((-1, 1)))))
