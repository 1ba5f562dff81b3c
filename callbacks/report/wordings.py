"""Two named sets of the same requests in other words, paired by the requests' keys, from rows."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Protocol

from callbacks.metrics.estimates import paired_difference, rate
from callbacks.metrics.names import Metric
from callbacks.report.results import PairedSets


class Happened(Protocol):
    """What occurred on which example (report/measured.py)."""

    @property
    def metric(self) -> Metric: ...

    @property
    def outcome(self) -> dict[str, bool]: ...

    @property
    def judge(self) -> str: ...

    @property
    def against(self) -> str: ...


def paired_sets(events: Sequence[Happened]) -> list[PairedSets]:
    """The difference of every event of a set that names another one to the same event there.

    A key that only one of both has is counted, never compared; a set without its partner is one whose keys
    are all unmatched.
    """
    found = []
    for event in events:
        if not event.against:
            continue
        own = event.metric
        there = Metric(own.quantity, own.subject, own.attack, own.judge, event.against)
        partner = next((e for e in events if (e.metric, e.judge) == (there, event.judge)), None)
        plain = partner.outcome if partner is not None else {}
        shared = sorted(plain.keys() & event.outcome.keys())
        found.append(
            PairedSets(
                metric=own,
                plain=there,
                judge=event.judge,
                difference=paired_difference(plain, event.outcome),
                shares=(rate([plain[k] for k in shared]), rate([event.outcome[k] for k in shared])),
                only_plain=len(plain.keys() - event.outcome.keys()),
                only_reworded=len(event.outcome.keys() - plain.keys()),
            )
        )
    return found
