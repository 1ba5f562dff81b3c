"""What a judge is: a verdict on one completion, with a name and a revision that are stored beside every score."""

from __future__ import annotations

from typing import Protocol


class Judge(Protocol):
    """Says whether a completion counts: as a refusal, as a success of an attack, as a right answer - the judge's name tells."""

    name: str
    revision: str

    def __call__(self, prompt: str, completion: str, reference: str) -> bool:
        """`reference` is the harmful target or the expected reply; judges that need none ignore it."""
        ...
