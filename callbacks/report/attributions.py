"""What each token of a request adds to the margin by which it is refused: a picture and a table."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from callbacks.metrics.estimates import mean
from callbacks.metrics.names import Metric, Quantity
from callbacks.report.cells import MISSING, Cell, Table, count
from callbacks.report.results import Attribution, Measure, RunResults
from datamodules.result_lines import BASE, Measurement, Row

QUANTITY: Quantity = "refusal_margin"
MARGIN = "refusal_margin@1"
"""In a judge's place; its score is the margin in nats."""
WITHOUT = "refusal_margin_without@1"
"""The margin with all attackable tokens at the baseline."""
SIDES = {"": "model", BASE: "before training"}
FAINTEST = 0.005
"""Share of a picture's strongest contribution below which a token keeps the page's colour."""


def attributions(rows: Mapping[str, Sequence[Row]]) -> list[Attribution]:
    """One a request and a model: the one before training stands where its numbers are others."""
    found = []
    for repeated in rows.values():
        for row in repeated:
            own, known = _of(row, ""), _of(row, BASE)
            found += [own] if own.contributions == known.contributions else [known, own]
    return found


@dataclass(frozen=True)
class Piece:
    """One token as the page shows it."""

    text: str
    nats: str
    toward: bool
    """Whether it speaks for a refusal."""
    share: float
    """Of the picture's strongest contribution, 0 to 1: how deep its colour is."""


@dataclass(frozen=True)
class Picture:
    """One request's tokens, in the colours of every model that was asked; one scale for all of them."""

    key: str
    category: str
    lines: Sequence[tuple[str, Sequence[Piece]]]
    """What the line is of, and its tokens."""


def pictures(results: RunResults) -> list[Picture]:
    """A picture a request, of the latest snapshot."""
    by_key: dict[str, list[Attribution]] = {}
    for own in results.after.attributions if results.after is not None else ():
        by_key.setdefault(own.key, []).append(own)
    return [_picture(found) for found in by_key.values()]


def _picture(found: Sequence[Attribution]) -> Picture:
    sizes = [abs(value) for own in found for value in own.contributions if not math.isnan(value)]
    strongest = max(sizes, default=0.0)

    def piece(text: str, value: float) -> Piece:
        share = abs(value) / strongest if strongest > 0 and not math.isnan(value) else 0.0
        return Piece(text, _nats(value).text, value > 0, round(share, 2) if share >= FAINTEST else 0.0)

    lines = [
        (
            f"{SIDES[own.side]}: margin {_nats(own.margin).text} nats, {_nats(own.without).text} without it",
            [piece(text, value) for text, value in zip(own.pieces, own.contributions, strict=True)],
        )
        for own in found
    ]
    return Picture(found[0].key, found[0].category, lines)


def overall(own: Measurement, rows: Mapping[str, Sequence[Row]]) -> dict[Metric, Measure]:
    """Mean margin over the requests."""
    metric = Metric(QUANTITY, own.subject, block=own.block)
    values = {key: _score(row, MARGIN) for key, repeated in rows.items() for row in repeated}
    measure = Measure(metric, mean([*values.values()]), own.judge, settings=own.settings, values=values)
    return {metric: measure}


def margins(results: RunResults) -> Table:
    """A row a request and model, of the latest snapshot; requests by their number among the pictures, since
    harmful texts, and keys made of them, stand where the page folds them."""
    found = results.after.attributions if results.after is not None else ()
    numbers = {key: number for number, key in enumerate(dict.fromkeys(own.key for own in found), start=1)}
    rows = [
        [
            Cell(f"{numbers[own.key]}: {own.category}".removesuffix(": "), numbers[own.key]),
            Cell(SIDES[own.side]),
            _nats(own.margin),
            _nats(own.without),
            _nats(own.summed),
            count(len(own.pieces)),
        ]
        for own in found
    ]
    columns = ("request", "model", "margin, nats", "without the request", "sum of contributions", "tokens")
    return Table("Refusal margins of single requests", columns, rows)


def _of(row: Row, side: str) -> Attribution:
    return Attribution(
        row.example,
        row.category,
        side,
        row.pieces,
        [math.nan if value is None else value for value in row.contributions[side + MARGIN]],
        _score(row, side + MARGIN),
        _score(row, side + WITHOUT),
    )


def _score(row: Row, judge: str) -> float:
    score = row.verdicts[judge]["score"]
    return math.nan if score is None else float(score)


def _nats(value: float) -> Cell:
    return Cell(MISSING, math.nan) if math.isnan(value) else Cell(f"{value:+.2f}", value)
