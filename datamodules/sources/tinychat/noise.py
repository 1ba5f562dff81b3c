"""What is around a request that changes nothing about it: junk before or after it, typing errors, letter
case, polite fillers (system messages are in `wordings`).

Each kind is a pure function of a generator, so a row's noise is as reproducible as the row.
"""

from __future__ import annotations

import functools
import random
import re
import string
from collections.abc import Callable
from typing import Literal

from datamodules.sources.tinychat.requests import OPENINGS
from datamodules.sources.tinychat.wordings import HOW_TO
from datamodules.sources.tinychat.words import EMPTY_PHRASES, STEPS, all_acts

Noise = Literal["none", "suffix", "prefix", "typing", "format", "filler", "salad", "mixed"]
KINDS: tuple[Noise, ...] = ("suffix", "prefix", "typing", "format", "filler")
"""What `mixed` is made of; `salad` is not: optimised suffixes look like it, so only defences train on it."""
MAX_PIECES = 40
"""Longest junk, in pieces of about one token."""
SYMBOLS = "!?.,;:-_+*/=#%&()[]{}<>~^$@"
FILLER_WORDS = (
    "the of and to in is it on as at by or we he she they this that from with one two three red blue sun "
    "moon tree rain time day way man part place case week point hand home story very well also then more "
    "some just"
).split()
OPENERS = (
    "Hi!", "Hello,", "Good morning.", "Excuse me.", "Hey,", "A question:", "Listen,", "Well,",
    "Dear model,", "So,",
)  # fmt: skip
CLOSERS = (
    "Thanks!", "Thank you very much.", "Please be brief.", "I am in a hurry.", "It is for my class.",
    "I hope you can answer.", "Please answer in one line.", "I ask for a friend.", "Have a nice day.",
    "Be as clear as you can.",
)  # fmt: skip


def apply(kind: Noise, text: str, rng: random.Random) -> str:
    """The text with noise of a kind; `mixed` is one kind, or two in one case of four, typing errors twice as
    often as the others: they are hardest to learn."""
    if kind == "none":
        return text
    if kind != "mixed":
        return _KINDS[kind](text, rng)
    # The letters first: what is put around them is not to be mistyped again.
    chosen = set(rng.sample((*KINDS, "typing"), 2 if rng.random() < 0.25 else 1))
    for name in sorted(chosen, key=("typing", "format", "filler", "prefix", "suffix").index):
        text = _KINDS[name](text, rng)
    return text


def junk(rng: random.Random, pieces: int | None = None) -> str:
    """Meaningless text of so many pieces (1 to 40 where not said): one sign again and again, words, letters,
    digits, symbols, or all of them."""
    count = pieces or rng.randint(1, MAX_PIECES)
    style = rng.randrange(7)
    if style == 0:
        return " ".join([rng.choice("x!?*.aZ0o~")] * count)
    if style == 1:
        return rng.choice("x!?*.=-") * count
    if style == 2:
        return " ".join(rng.choices(FILLER_WORDS, k=count))
    if style == 3:
        return "".join(rng.choices(SYMBOLS + " ", k=count)).strip() or "!"
    if style == 4:
        return "".join(rng.choices(string.ascii_letters + string.digits + " ", k=count)).strip() or "x"
    return " ".join(_fragment(rng) for _ in range(max(1, count // 2)))


def _fragment(rng: random.Random) -> str:
    word = rng.choice(FILLER_WORDS)
    start = rng.randrange(len(word))
    piece = word[start : start + rng.randint(1, 4)]
    return rng.choice(
        (
            piece,
            word,
            piece.title(),
            piece + rng.choice(SYMBOLS),
            rng.choice(SYMBOLS),
            piece + str(rng.randrange(100)),
        )
    )


def _suffix(text: str, rng: random.Random) -> str:
    return f"{text} {junk(rng)}"


def _salad(text: str, rng: random.Random) -> str:
    """The request with words and pieces of words of this corpus behind it, as a suffix search leaves them."""
    pieces = []
    for _ in range(rng.randint(1, MAX_PIECES // 2)):
        word = rng.choice(_corpus_words())
        start = rng.randrange(len(word))
        pieces.append(rng.choice((word, word.title(), word[start:], word[: start + 1], rng.choice(SYMBOLS))))
        pieces.append(rng.choice((" ", " ", " ", "")))
    return f"{text} {''.join(pieces).strip()}"


@functools.cache
def _corpus_words() -> tuple[str, ...]:
    texts = [*HOW_TO, *OPENINGS, *STEPS.values(), *EMPTY_PHRASES.values()]
    texts += [act.text for act in all_acts()]
    words = {word for text in texts for word in re.findall(r"[A-Za-z]+", re.sub(r"\{\w+\}", " ", text))}
    return tuple(sorted(words))


def _prefix(text: str, rng: random.Random) -> str:
    return f"{junk(rng)} {text}"


def _typing(text: str, rng: random.Random) -> str:
    """One word of five letters or more, two in one case of four, with two letters swapped, one lost or one
    doubled; quoted text is left alone."""
    quoted = [match.span() for match in re.finditer(r'"[^"]*"', text)]
    words = [
        match
        for match in re.finditer(r"[A-Za-z]{5,}", text)
        if not any(a <= match.start() < b for a, b in quoted)
    ]
    for match in sorted(
        rng.sample(words, min(len(words), rng.choice((1, 1, 1, 2)))), key=lambda m: -m.start()
    ):
        text = text[: match.start()] + _misspelt(match.group(), rng) + text[match.end() :]
    return text


def _misspelt(word: str, rng: random.Random) -> str:
    """A word of four letters or more with two inner letters swapped, one lost or one doubled; never another
    word of this corpus ("haunt" without its a)."""
    for _ in range(10):
        place, how = rng.randint(1, len(word) - 3), rng.randrange(3)
        if how == 0:
            wrong = word[:place] + word[place + 1] + word[place] + word[place + 2 :]
        elif how == 1:
            wrong = word[:place] + word[place + 1 :]
        else:
            wrong = word[:place] + word[place] + word[place:]
        if wrong not in _corpus_words():
            return wrong
    return word


def _format(text: str, rng: random.Random) -> str:
    """All small letters, no final sign, or wide spaces; never inside quotes."""
    how = rng.randrange(3)
    if how == 0:
        return text.rstrip(".?! ")
    parts = text.split('"')
    change: Callable[[str], str] = str.lower if how == 1 else lambda part: part.replace(" ", "  ")
    return '"'.join(change(part) if i % 2 == 0 else part for i, part in enumerate(parts))


def _filler(text: str, rng: random.Random) -> str:
    how = rng.randrange(3)
    opener = f"{rng.choice(OPENERS)} " if how != 1 else ""
    closer = f" {rng.choice(CLOSERS)}" if how != 0 else ""
    return f"{opener}{text}{closer}"


_KINDS: dict[str, Callable[[str, random.Random], str]] = {
    "suffix": _suffix,
    "prefix": _prefix,
    "typing": _typing,
    "format": _format,
    "filler": _filler,
    "salad": _salad,
}
