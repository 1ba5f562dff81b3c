"""What a report says in tables and sentences, once: page, Markdown and terminal only lay it out."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from callbacks.judges.card import line
from callbacks.metrics.names import WORST_CASE, WORST_CASE_TEXT, Metric
from callbacks.report.results import (
    Estimate,
    Gradings,
    Measure,
    PairedDifference,
    PairedSets,
    RunResults,
    Snapshot,
    UnderAttack,
)

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
        assert results.after is not None
        found = own.difference
        rows.append(
            [
                Cell(own.metric.titled(own.judge)),
                _earlier(results.after, own.plain),
                _earlier(results.after, own.metric),
                change(None if found is None else PairedDifference(own.metric, **vars(found))),
                _count(0 if found is None else found.n),
                _count(own.only_plain + own.only_reworded),
                Cell(own.judge),
            ]
        )
    columns = ("metric", "plain", "reworded", "reworded - plain", "pairs", "without a partner", "judge")
    return Table("The same requests in other words", columns, rows)


def grades(results: RunResults) -> Table:
    """Mean grades of conversations, and who graded."""
    rows = []
    for m in _measures(results.after, "mean") if results.after is not None else ():
        if m.metric.quantity not in GRADES:
            continue
        earlier = [_earlier(results.before, m.metric)] if results.before is not None else []
        rows.append([Cell(m.title), *earlier, estimate(m.estimate), _count(m.estimate.n), Cell(m.judge)])
    columns = ("before", "after") if results.before is not None else ("mean",)
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
        raised = [f"{_words(flag)} in {count}" for flag, count in attack.flags.items() if count]
        if raised:
            found.append(f"{_words(attack.name)}: {', '.join(raised)} of the examples.")
    found += [carried for name, own in after.benign.items() if (carried := _carried(name, own))]
    found += [said for own in after.paired if (said := _unmatched(own))]
    found += [said for name, own in after.gradings.items() if (said := _ungraded(name, own))]
    crossed = [f"{_words(flag)} in {count}" for flag, count in after.cross_flags.items() if count]
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


def _beside(snapshot: Snapshot, metric: Metric) -> list[Cell]:
    """What an attack makes of benign prompts, in the row of its success; blank in others."""
    if not snapshot.benign:
        return []
    own = snapshot.benign.get(metric.attack) if metric.quantity == "success_rate" else None
    shares = (own.refused, own.utility) if own is not None else (None, None)
    return [estimate(share) if share is not None else Cell(MISSING, math.nan) for share in shares]


def _carried(name: str, own: UnderAttack) -> str:
    """The sign that a model refuses whatever carries an attack, in words; '' where it is not raised."""
    if not own.refuses_what_carries_it:
        return ""
    parts = []
    if own.refused is not None:
        parts.append(f"{100 * own.refused.value:.0f} % of {own.refused.n} harmless prompts are refused")
    if own.fall is not None:
        parts.append(
            f"utility is {100 * own.fall.difference:+.0f} points against no attack (n = {own.fall.n})"
        )
    return (
        f"{_words(name)}: refuses what carries it: done to benign prompts, {' and '.join(parts)}; "
        "its success on harmful requests says little about harm."
    )


def _unmatched(own: PairedSets) -> str:
    """Requests of one wording that the other lacks, in words; '' where there are none."""
    if not own.only_plain + own.only_reworded:
        return ""
    return (
        f"{own.metric.titled(own.judge)}: {own.only_plain} requests of {_words(own.plain.block)} and "
        f"{own.only_reworded} of {_words(own.metric.block)} have no partner in the other set and are not "
        "compared."
    )


def _ungraded(name: str, own: Gradings) -> str:
    """Gradings that are missing or unreadable, and replies that were cut, in words; '' where all is well."""
    parts = [
        f"{own.missing} of {own.asked} gradings are missing (run the command again to ask for them)"
        if own.missing
        else "",
        f"{own.unreadable} of {own.asked} gradings are unreadable and in no mean" if own.unreadable else "",
        f"{own.cut} of {own.asked} replies are as long as allowed, so probably cut" if own.cut else "",
        f"{own.beyond_window} of {own.asked} replies end beyond the model's positions"
        if own.beyond_window
        else "",
    ]
    said = "; ".join(part for part in parts if part)
    return f"{_words(name)}, graded by {own.judge}: {said}." if said else ""


def _measures(snapshot: Snapshot, kind: str) -> Iterator[Measure]:
    return (measure for measure in snapshot.measures.values() if measure.estimate.kind == kind)


def _earlier(snapshot: Snapshot | None, metric: Metric) -> Cell:
    found = snapshot.measures.get(metric) if snapshot is not None else None
    return estimate(found.estimate) if found is not None else Cell(MISSING, math.nan)


def _count(n: int) -> Cell:
    return Cell(str(n), n)


def _words(name: str) -> str:
    return name.replace("_", " ")


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
