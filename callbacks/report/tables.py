"""What a report says in tables and sentences, once: page, Markdown and terminal only lay it out."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from callbacks.judges.card import line
from callbacks.metrics.names import WORST_CASE, WORST_CASE_TEXT, Metric
from callbacks.report.grades import grade_differences
from callbacks.report.results import (
    Estimate,
    Measure,
    PairedDifference,
    RunResults,
    Snapshot,
)
from callbacks.report.signs import carried, ungraded, unmatched, words

MISSING = "-"
INTERVALS = "Intervals are 95 %: Wilson's for shares, normal ones for means."
GRADES = ("grade", "grade_turn_1", "grade_turn_2")
UNDER_ATTACK = ("benign refused under it", "utility under it")
"""Columns beside an attack's success: the same done to harmless prompts and to benign tasks, after
training."""
DIFFERENCES = (
    "Differences are after - before on the same examples, in percentage points, with a 95 % interval and the "
    "exact McNemar p; + and - behind them count the examples that gained and lost the event."
)


@dataclass(frozen=True)
class Cell:
    """A text, and the number that it is sorted by (None: by the text; NaN: last)."""

    text: str
    order: float | None = None


@dataclass(frozen=True)
class Table:
    title: str
    columns: Sequence[str]
    rows: Sequence[Sequence[Cell]]


def tables(results: RunResults) -> list[Table]:
    """Every table that has a row: rates, means, groups, history, cost."""
    every = [
        rates(results),
        paired(results),
        grades(results),
        means(results),
        groups(results),
        history(results),
        cost(results),
    ]
    return [table for table in every if table.rows]


def rates(results: RunResults) -> Table:
    """The shares before and after (where there is no before: of the one model), changes and judges."""
    if results.after is None:
        return Table("Results", (), ())
    found = _measures(results.after, "rate")
    beside = UNDER_ATTACK if results.after.benign else ()
    if results.stage != "fit" and results.before is None:
        rows = [
            [
                Cell(m.title),
                estimate(m.estimate),
                *_beside(results.after, m.metric),
                _count(m.estimate.n),
                Cell(m.judge or MISSING),
            ]
            for m in found
        ]
        return Table("Results", ("metric", "rate", *beside, "n", "judge"), rows)
    changes = {difference.metric: difference for difference in results.differences}
    rows = [
        [
            Cell(m.title),
            _earlier(results.before, m.metric),
            estimate(m.estimate),
            change(changes.get(m.metric)),
            *_beside(results.after, m.metric),
            _count(m.estimate.n),
            Cell(m.judge or MISSING),
        ]
        for m in found
    ]
    columns = ("metric", "before", "after", "difference", *beside, "n", "judge")
    return Table("Before and after", columns, rows)


def means(results: RunResults) -> Table:
    """Losses and efforts of the attacks."""
    if results.after is None:
        return Table("Means", (), ())
    rows = []
    for m in _measures(results.after, "mean"):
        if m.metric.quantity in GRADES:
            continue
        own = [estimate(m.estimate), _count(m.estimate.n)]
        earlier = [_earlier(results.before, m.metric)] if results.before is not None else []
        rows.append([Cell(m.metric.title), *earlier, *own])
    columns = ("before", "after") if results.before is not None else ("mean",)
    return Table("Attacks: losses and effort", ("quantity", *columns, "n"), rows)


def paired(results: RunResults) -> Table:
    """The same requests in two wordings, of the latest snapshot."""
    rows = []
    for own in results.after.paired if results.after is not None else ():
        found = own.difference
        rows.append(
            [
                Cell(own.metric.titled(own.judge)),
                *map(estimate, own.shares),
                change(None if found is None else PairedDifference(own.metric, **vars(found))),
                _count(0 if found is None else found.n),
                _count(own.only_plain + own.only_reworded),
                Cell(own.judge),
            ]
        )
    columns = ("metric", "plain", "reworded", "reworded - plain", "pairs", "without a partner", "judge")
    return Table("The same requests in other words", columns, rows)


def grades(results: RunResults) -> Table:
    """Mean grades of conversations, their change on the same ones, and who graded."""
    rows = []
    before, after = results.before, results.after
    changes = grade_differences(before, after) if before is not None and after is not None else {}
    for m in _measures(results.after, "mean") if results.after is not None else ():
        if m.metric.quantity not in GRADES:
            continue
        own = [estimate(m.estimate)]
        if results.before is not None:
            own = [_earlier(results.before, m.metric), *own, _shift(changes.get(m.metric))]
        rows.append([Cell(m.title), *own, _count(m.estimate.n), Cell(m.judge)])
    columns = ("before", "after", "difference") if results.before is not None else ("mean",)
    return Table("Grades", ("metric", *columns, "n", "judge"), rows)


def groups(results: RunResults) -> Table:
    """Success in the worst case, and shares and grades without an attack, by the examples' groups."""
    rows = []
    for measure in results.after.measures.values() if results.after is not None else ():
        if measure.metric.attack not in ("", WORST_CASE):
            continue
        for kind, by_name in measure.groups.items():
            for name, value in by_name.items():
                cells = Cell(measure.title), Cell(f"{kind}: {name}"), estimate(value), _count(value.n)
                rows.append(cells)
    return Table("By group", ("metric", "group", "value", "n"), rows)


def history(results: RunResults) -> Table:
    """Every share at every evaluated step, where there are more than two of them."""
    snapshots = results.snapshots
    if results.after is None or len(snapshots) < 3:
        return Table("Over training", (), ())
    rows = [
        [Cell(m.title), *(_earlier(snapshot, m.metric) for snapshot in snapshots)]
        for m in _measures(results.after, "rate")
    ]
    return Table("Over training", ("metric", *(f"step {snapshot.step}" for snapshot in snapshots)), rows)


def cost(results: RunResults) -> Table:
    """What training cost; nobody trains outside `fit`."""
    if results.stage != "fit":
        return Table("Cost of training", (), ())
    rows = [
        [Cell(name.replace("_", " ")), Cell(f"{v:,.{0 if v == round(v) else 1}f}", v)]
        for name, v in results.cost.items()
    ]
    return Table("Cost of training", ("quantity", "value"), rows)


def warnings(results: RunResults) -> list[str]:
    """Signs that a number is not what it seems, of the latest snapshot."""
    after = results.after
    if after is None:
        return []
    found = []
    if not after.complete:
        found.append("An evaluation was cut short: its numbers are over the rows that are there.")
    for attack in after.attacks.values():
        raised = [f"{words(flag)} in {count}" for flag, count in attack.flags.items() if count]
        if raised:
            found.append(f"{words(attack.name)}: {', '.join(raised)} of the examples.")
    found += [said for name, own in after.benign.items() if (said := carried(name, own))]
    found += [said for own in after.paired if (said := unmatched(own))]
    found += [said for name, own in after.gradings.items() if (said := ungraded(name, own, results.stage))]
    crossed = [f"{words(flag)} in {count}" for flag, count in after.cross_flags.items() if count]
    if crossed:
        found.append(f"Between the attacks: {', '.join(crossed)} of the examples.")
    if results.set_aside:
        found.append(
            "Measured in another way before (attack, length of replies, rows, batches or judge), so not "
            f"compared: {', '.join(results.set_aside)}."
        )
    return found


def judges(results: RunResults) -> list[str]:
    """A line on every judge that has decided something: what its card says, or that it has none."""
    snapshots = (results.before, results.after)
    measures = [m for own in snapshots if own is not None for m in own.measures.values()]
    # A worst case joins what its attacks' judges said.
    single = [m.judge for m in measures if m.metric.attack not in (WORST_CASE, WORST_CASE_TEXT)]
    return [line(judge) for judge in dict.fromkeys(single) if judge]


def facts(results: RunResults) -> dict[str, str]:
    """Model, objective, attack, data, seed, revision, hardware: as far as the run wrote them down."""
    config, environment = results.configuration, results.environment
    model = _settings(config.get("model"))
    git = environment.get("git") or {}
    found = {
        "model": _inline(model.get("base")),
        "weights": results.after.model if results.after is not None else "",
        "step": str(results.after.step) if results.after is not None else "",
        "objective": _class(model.get("objective")),
        "attack": _class(model.get("attack")),
        "data": _class(config.get("data")),
        "seed": _inline(environment.get("seed_everything", environment.get("seed"))),
        "revision": f"{git.get('revision') or ''}{' (modified)' if git.get('modified') else ''}",
        "packages": _inline(environment.get("packages")),
        "hardware": _inline(environment.get("hardware")),
        "command": " ".join(str(word) for word in environment.get("command") or ()),
    }
    return {name: text for name, text in found.items() if text}


def estimate(value: Estimate) -> Cell:
    """`12.3 % [8.1, 17.9]` of a share, `1.23 [1.10, 1.36]` of a mean."""
    if math.isnan(value.value):
        return Cell(MISSING, math.nan)
    if value.kind == "mean":
        return Cell(f"{value.value:.3g} [{value.low:.3g}, {value.high:.3g}]", value.value)
    return Cell(f"{100 * value.value:.1f} % [{100 * value.low:.1f}, {100 * value.high:.1f}]", value.value)


def p_value(value: float) -> str:
    """As a reader sees it."""
    return "p < 0.001" if value < 0.001 else f"p = {value:.3f}"


def change(value: PairedDifference | None) -> Cell:
    """`-86.8 [-94.1, -75.2], p < 0.001 (+0 -46)`, in percentage points."""
    if value is None or math.isnan(value.difference):
        return Cell(MISSING, math.nan)
    low, mid, high = (100 * part for part in (value.low, value.difference, value.high))
    return Cell(
        f"{mid:+.1f} [{low:+.1f}, {high:+.1f}], {p_value(value.p_value)} (+{value.gained} -{value.lost})",
        value.difference,
    )


def _shift(value: Estimate | None) -> Cell:
    """`+0.45 [+0.12, +0.78]`, of a difference of means."""
    if value is None:
        return Cell(MISSING, math.nan)
    return Cell(f"{value.value:+.2f} [{value.low:+.2f}, {value.high:+.2f}]", value.value)


def _beside(snapshot: Snapshot, metric: Metric) -> list[Cell]:
    """What an attack makes of benign prompts, in the row of its success; blank in others."""
    if not snapshot.benign:
        return []
    own = snapshot.benign.get(metric.attack) if metric.quantity == "success_rate" else None
    shares = (own.refused, own.utility) if own is not None else (None, None)
    return [estimate(share) if share is not None else Cell(MISSING, math.nan) for share in shares]


def _measures(snapshot: Snapshot, kind: str) -> Iterator[Measure]:
    return (measure for measure in snapshot.measures.values() if measure.estimate.kind == kind)


def _earlier(snapshot: Snapshot | None, metric: Metric) -> Cell:
    found = snapshot.measures.get(metric) if snapshot is not None else None
    return estimate(found.estimate) if found is not None else Cell(MISSING, math.nan)


def _count(n: int) -> Cell:
    return Cell(str(n), n)


def _settings(block: Any) -> Mapping[str, Any]:
    """The arguments of a `class_path` block; the block itself where it is plain."""
    if not isinstance(block, dict):
        return {}
    return block.get("init_args") or {} if "class_path" in block else block


def _class(block: Any) -> str:
    path = block.get("class_path", "") if isinstance(block, dict) else ""
    return str(path).rsplit(".", 1)[-1]


def _inline(value: Any) -> str:
    """A value on one line; what was not set is left out."""
    if isinstance(value, dict):
        parts = ((key, _inline(part)) for key, part in value.items())
        return ", ".join(f"{key} {part}" for key, part in parts if part)
    if isinstance(value, list | tuple):
        return ", ".join(_inline(part) for part in value)
    return "" if value is None else str(value)
