"""A judge of multiple-choice answers in a chat: which letter was chosen."""

from __future__ import annotations

import re

ALONE = re.compile(r"\W*([A-Z])(?:[.):,*\]]|\s*$|\s*\n)")
"""A reply that begins with a letter on its own, not with the article of a sentence."""
SAID = re.compile(
    r"\b(?:answer|option|choice|letter)\b(?: is| would be|:)?[\s*:(\"'\[]*([A-Z])\b(?![a-z'])", re.IGNORECASE
)
MARKED = re.compile(r"(?<![A-Za-z])\(?([A-Z])[.)](?=\s|$)")
"""A choice repeated with its mark, as in `B. iron`."""


class AnswerLetter:
    """True where the letter that a reply chooses is the expected one.

    Read in this order: a letter alone at the beginning, `the answer is X`, the first marked letter. A reply
    that names none is wrong.
    """

    name = "answer_letter"
    revision = "1"

    def __call__(self, prompt: str, completion: str, expected: str) -> bool:
        return chosen(completion) == expected.strip()


def chosen(completion: str) -> str | None:
    """The letter that a reply chooses, None where it names none."""
    text = completion.strip()
    for found in (ALONE.match(text), SAID.search(text), MARKED.search(text)):
        if found is not None:
            return found.group(1).upper()
    return None
