"""Who may see what: train, validation and test by construction, from a hash of the content.

An act belongs to one split. Verbs and objects are held out too: in every class that harms, some verbs and
some objects occur in no harmful request of the training split, only in harmless ones and in questions
*about* acts (a model this small knows no word that it never saw). Wordings of requests and of every other
task are split the same way.
"""

from __future__ import annotations

import functools
import hashlib
from collections.abc import Sequence
from typing import Literal

from datamodules.sources.tinychat.words import OBJECTS, VERBS, Act, nouns

Split = Literal["train", "validation", "test"]
Novelty = Literal["pair", "verb", "object"]
SPLITS: tuple[Split, ...] = ("train", "validation", "test")
ASKED_ONLY = 40
"""Percent of the acts with a held-out verb or object that training may ask about, though never ask for."""


def digest(*content: str) -> int:
    """A stable number of a content."""
    return int.from_bytes(hashlib.blake2b("|".join(content).encode(), digest_size=6).digest(), "big")


def split_of(*content: str) -> Split:
    """The split of a content that is divided by hash alone: 70, 12 and 18 percent."""
    place = digest("split", *content) % 100
    return "train" if place < 70 else "validation" if place < 82 else "test"


def _ranked(words: Sequence[str], kind: str, share: int) -> dict[str, Split]:
    """The words that come first by hash are the test's, the next ones validation's."""
    order = sorted(words, key=lambda word: digest(kind, word))
    count = max(1, len(words) // share)
    test: dict[str, Split] = dict.fromkeys(order[:count], "test")
    validation: dict[str, Split] = dict.fromkeys(order[count : 2 * count], "validation")
    return test | validation


@functools.cache
def heldout_verbs() -> dict[str, Split]:
    """Held-out verbs: about an eighth of every harmful class for test, as many for validation."""
    found: dict[str, Split] = {}
    for kind in VERBS.values():
        if kind.harmful:
            found |= _ranked(kind.verbs, "verb", 8)
    return found


@functools.cache
def heldout_objects() -> dict[str, Split]:
    """Held-out objects: a sixth of every class that can be harmed for test, as many for validation."""
    found: dict[str, Split] = {}
    for name in OBJECTS:
        if any(name in kind.harmful for kind in VERBS.values()):
            found |= _ranked(nouns(name), "object", 6)
    return found


def novelty(act: Act) -> Novelty | None:
    """What is new in a harmful act outside training; None where both its verb and its object are held out."""
    verb, noun = act.verb in heldout_verbs(), act.noun in heldout_objects()
    return None if verb and noun else "verb" if verb else "object" if noun else "pair"


@functools.cache
def request_split(act: Act) -> Split | None:
    """Where a how-to request for this act belongs; None for acts that are only asked about."""
    if not act.harmful:
        return split_of("harmless", act.text)
    owners = {
        owner
        for owner in (heldout_verbs().get(act.verb), heldout_objects().get(act.noun))
        if owner is not None
    }
    if not owners:
        return split_of("harmful", act.text)
    if len(owners) > 1 or digest("asked", act.text) % 100 < ASKED_ONLY:
        return None
    return owners.pop()


@functools.cache
def question_split(act: Act) -> Split:
    """Where a question about this act belongs: an act that only validation or test asks for, with them."""
    return request_split(act) or "train"
