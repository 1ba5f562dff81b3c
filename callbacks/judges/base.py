"""What a judge is: a verdict on one completion, with a name and a revision that are stored beside every
score."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol

import numpy as np


class Judge(Protocol):
    """Says whether a completion counts: as a refusal, as a success of an attack, as a right answer - the
    judge's name tells.

    A judge that is faster on many completions at once may also have `judge_batch(prompts, completions,
    expected)`, which returns a list of `Judgement`. One with `prompt = "attacked"` is given what was sent
    in place of the request, where there is such a text; all others are given the request. One with
    `against = "answer"` or `"forbidden"` compares with that field of a row instead of `expected`.
    """

    @property
    def name(self) -> str: ...

    @property
    def revision(self) -> str: ...

    def __call__(self, prompt: str, completion: str, expected: str) -> bool:
        """`expected` is the harmful target or the expected reply; judges that need none ignore it."""
        ...


@dataclass(frozen=True)
class Judgement:
    """One verdict, with the score behind it where the judge gives one."""

    verdict: bool
    score: float | None = None


def judge_all(
    judge: Judge, prompts: Sequence[str], completions: Sequence[str], expected: Sequence[str]
) -> list[Judgement]:
    """Judge several completions, in one call where the judge can. Raises: TypeError for a judge that says
    something other than yes or no, which would count as yes."""
    batch = getattr(judge, "judge_batch", None)
    found: list[Judgement] = (
        [Judgement(judge(p, c, r)) for p, c, r in zip(prompts, completions, expected, strict=True)]
        if batch is None
        else batch(prompts, completions, expected)
    )
    wrong = [own.verdict for own in found if not isinstance(own.verdict, bool | np.bool_)]
    if wrong:
        raise TypeError(f"judge {judge.name}: expected True or False, got {wrong[0]!r:.60}")
    return found


def sees(judge: Judge) -> str:
    """Which prompt a judge is given: `original` or `attacked`."""
    return getattr(judge, "prompt", "original")


class Compared(Protocol):
    """What a row offers for comparison (datamodules/results.py)."""

    @property
    def expected(self) -> str: ...

    @property
    def answer(self) -> str: ...

    @property
    def forbidden(self) -> str: ...


def compared_with(judge: Judge, row: Compared) -> str:
    """The text that a judge is given as expected: of a row without an answer of its own, or without
    forbidden text, it is what is expected."""
    match getattr(judge, "against", "expected"):
        case "answer":
            return row.answer or row.expected
        case "forbidden":
            return row.forbidden or row.expected
    return row.expected


def label(judge: Judge) -> str:
    """`name@revision`, as stored beside a verdict."""
    return f"{judge.name}@{judge.revision}"
