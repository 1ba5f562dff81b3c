"""What a defence costs, from the rows of its replies."""

from __future__ import annotations

from collections.abc import Sequence

from callbacks.metrics.estimates import mean, rate
from callbacks.report.cells import Cell, Table, count, estimate
from callbacks.report.measured import Measured
from callbacks.report.results import Costs, RunResults

COSTED = "plain_tokens"
"""The count that a row has if its reply went through a defence."""


def costs(measured: Sequence[Measured]) -> list[Costs]:
    """Of every measurement whose replies went through a defence, in their order."""
    found = []
    for item in measured:
        every = [repeated[0].counts for repeated in item.rows.values()]
        own = [counts for counts in every if COSTED in counts]
        if own:
            found.append(
                Costs(
                    item.measurement.subject,
                    item.measurement.attack,
                    len(own),
                    mean([counts["queries"] for counts in own]),
                    mean([counts["tokens"] / max(1, counts[COSTED]) for counts in own]),
                    rate([bool(counts["stopped"]) for counts in own]),
                    sum(counts["bypassed"] for counts in own),
                )
            )
    return found


def cost_table(results: RunResults) -> Table:
    """Queries and tokens of the latest snapshot, what the defence answered itself and what it never saw."""
    rows = [
        [
            Cell(": ".join(part for part in (own.attack.replace("_", " "), own.subject) if part)),
            estimate(own.queries),
            estimate(own.tokens),
            estimate(own.stopped),
            count(own.bypassed),
            count(own.n),
        ]
        for own in (results.after.costs if results.after is not None else ())
    ]
    columns = ("replies to", "queries", "tokens, times plain", "refused by the defence", "bypassed", "n")
    return Table("What the defence costs", columns, rows)


def bypassed(results: RunResults) -> list[str]:
    """Which attacks the defence, or the one within it, never saw: their success is the model's without it."""
    names = [own.attack for own in (results.after.costs if results.after is not None else ()) if own.bypassed]
    return [
        f"{name.replace('_', ' ')}: enters as embeddings, behind the defence or the part of it that looks "
        "at requests: what it does is done to the model without that."
        for name in dict.fromkeys(names)
    ]
