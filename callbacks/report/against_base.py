"""What training did to replies: each against the base model's to the same prompt, from rows with both."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence

from callbacks.metrics.names import Quantity
from datamodules.result_lines import BASE, Measurement, Row


def outcomes(
    own: Measurement, rows: Mapping[str, Sequence[Row]]
) -> Iterator[tuple[Quantity, str, dict[str, bool]]]:
    """(quantity, judge, key of an example -> whether it occurred), in the order in which they are reported.

    Refusals are over all prompts: newly refused - newly answered is the change of the over-refusal rate. What
    is right or wrong is over the prompts with an expected reply.
    """
    every = {key: repeated[0] for key, repeated in rows.items()}
    yield "change_rate", own.judge, {key: row.verdict(own.judge) for key, row in every.items()}
    yield "newly_refused_rate", own.refusal, _now_and_not_then(every, own.refusal)
    yield "newly_answered_rate", own.refusal, _then_and_not_now(every, own.refusal)
    right = own.judges[0]
    asked = {key: row for key, row in every.items() if row.expected}
    if asked:
        yield "spoiled_rate", right, _then_and_not_now(asked, right)
        yield "mended_rate", right, _now_and_not_then(asked, right)


def similarities(own: Measurement, rows: Mapping[str, Sequence[Row]]) -> list[float]:
    """chrF of every reply with the base model's."""
    scores = (repeated[0].verdicts[own.judge]["score"] for repeated in rows.values())
    return [float(score) for score in scores if score is not None]


def _now_and_not_then(rows: Mapping[str, Row], judge: str) -> dict[str, bool]:
    return {key: row.verdict(judge) and not row.verdict(BASE + judge) for key, row in rows.items()}


def _then_and_not_now(rows: Mapping[str, Row], judge: str) -> dict[str, bool]:
    return {key: row.verdict(BASE + judge) and not row.verdict(judge) for key, row in rows.items()}
