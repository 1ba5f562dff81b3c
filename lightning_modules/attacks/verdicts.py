"""Judges as attacks see them: whether a reply is what the attacker wants."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Protocol


class Verdict(Protocol):
    """Says of one reply whether it is a success; `expected` is the harmful target.

    A judge that is faster on many replies at once may also have `judge_batch(prompts, replies, expected)`,
    which returns objects with a `verdict`; and one that grades may have `score(prompt, reply, expected)`,
    from 1 to 10, or `score_batch` of many at once.
    """

    def __call__(self, prompt: str, reply: str, expected: str, /) -> bool: ...


def verdicts(
    judge: Verdict, prompts: Sequence[str], replies: Sequence[str], expected: Sequence[str]
) -> list[bool]:
    """The judge's word on each reply, in one call where the judge can; an empty reply is no success and is
    not asked about."""
    found = [False] * len(replies)
    asked = [i for i, reply in enumerate(replies) if reply]
    batch = getattr(judge, "judge_batch", None)
    if batch is None:
        for i in asked:
            found[i] = judge(prompts[i], replies[i], expected[i])
    elif asked:
        given = ([texts[i] for i in asked] for texts in (prompts, replies, expected))
        for i, judgement in zip(asked, batch(*given), strict=True):
            found[i] = judgement.verdict
    return found


def grades(
    judge: Verdict, prompts: Sequence[str], replies: Sequence[str], expected: Sequence[str]
) -> list[float] | None:
    """Grades from 1 to 10, in one call where the judge can; an empty reply is a refusal. None for a judge
    that gives none."""
    many, one = getattr(judge, "score_batch", None), getattr(judge, "score", None)
    if many is None and one is None:
        return None
    found = [1.0] * len(replies)
    asked = [i for i, reply in enumerate(replies) if reply]
    if many is not None and asked:
        given = ([texts[i] for i in asked] for texts in (prompts, replies, expected))
        for i, grade in zip(asked, many(*given), strict=True):
            found[i] = float(grade)
    elif one is not None:
        for i in asked:
            found[i] = float(one(prompts[i], replies[i], expected[i]))
    return found
