"""What a defence costs and what it promises, from the rows of its replies."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from callbacks.metrics.estimates import mean, rate
from callbacks.report.cells import Cell, Table, count, estimate
from callbacks.report.measured import Measured
from callbacks.report.results import Costs, RunResults

COSTED = "plain_tokens"
"""The count that a row has if its reply went through a defence."""
WHERE = {"suffix": "behind the request", "insertion": "blocks anywhere", "infusion": "anywhere"}
"""What is added in a mode of erase-and-check."""
GUARANTEED = "guaranteed"
"""The count of a defence that promises something of a request under attack."""


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
                    rate([bool(counts[GUARANTEED]) for counts in own])
                    if all(GUARANTEED in counts for counts in own)
                    else None,
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


def erased_and_checked(results: RunResults) -> list[str]:
    """What erase-and-check guarantees: what its filter says of harmful requests that nothing is erased of.
    What it flags by a shorter one is not guaranteed; nothing is where it looks at a part of what is left."""
    own = {c.subject: c for c in (results.after.costs if results.after is not None else ()) if not c.attack}
    found = []
    for node in _nodes((results.configuration.get("model") or {}).get("init_args", {}).get("defence")):
        if not str(node.get("class_path")).endswith(".EraseAndCheck"):
            continue
        settings, harmful, harmless = node.get("init_args") or {}, own.get("harmful"), own.get("harmless")
        if settings.get("sample") is not None:
            found.append("erase and check: looks at some of what is left only, and guarantees nothing.")
        elif harmful is not None and harmful.guaranteed is not None:
            blocks, mode = settings.get("num_insertions", 1), settings.get("mode", "suffix")
            many = f"{blocks} times " if blocks > 1 else ""
            added = f"{many}{settings.get('max_erase', 20)} tokens of their own ({WHERE[mode]})"
            price = "" if harmless is None else f"; {estimate(harmless.stopped).text} of harmless ones are"
            found.append(
                f"erase and check: {estimate(harmful.guaranteed).text} of harmful requests are guaranteed to "
                f"be refused with up to {added} added, whatever they are; {estimate(harmful.stopped).text} "
                f"are refused as they are{price}."
            )
    return found


def _nodes(node: Any) -> Iterator[Mapping[str, Any]]:
    """Every mapping within a configuration."""
    if isinstance(node, Mapping):
        yield node
        for value in node.values():
            yield from _nodes(value)
    elif isinstance(node, list):
        for value in node:
            yield from _nodes(value)
