"""What a report says in tables and sentences, once: page, Markdown and terminal only lay it out."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

from callbacks.judges.card import line
from callbacks.metrics.names import WORST_CASE, WORST_CASE_TEXT, Metric
from callbacks.report.attributions import margins
from callbacks.report.cells import MISSING, Cell, Table, change, count, earlier_cell, estimate, measures
from callbacks.report.certificates import THREAT, guarantees
from callbacks.report.defended import bypassed, cost_table, erased_and_checked
from callbacks.report.directions import moved
from callbacks.report.divergences import depth
from callbacks.report.results import Estimate, RunResults, Snapshot
from callbacks.report.signs import carried, ungraded, unmatched, words
from callbacks.report.tables_beside import benchmarks, grades, paired, perplexities, replies

INTERVALS = (
    "Intervals are 95 %: Wilson's for shares, normal ones for means, of perplexities a block bootstrap over "
    "windows."
)
UNDER_ATTACK = ("benign refused under it", "utility under it")
"""Columns beside an attack's success: the same done to harmless prompts and to benign tasks, after
training."""
DIFFERENCES = (
    "Differences are after - before on the same examples, in percentage points, with a 95 % interval and the "
    "exact McNemar p; + and - behind them count the examples that gained and lost the event."
)


def tables(results: RunResults) -> list[Table]:
    """Every table that has a row: rates, pairs, grades, replies, perplexities, benchmarks, depth, the refusal
    direction, margins, guarantees, a defence's cost, means, groups, history, cost."""
    every = [rates(results), paired(results), grades(results), replies(results), perplexities(results)]
    every += [
        benchmarks(results),
        depth(results),
        moved(results),
        margins(results),
        guarantees(results),
        cost_table(results),
        means(results),
        groups(results),
        grade_groups(results),
        history(results),
        cost(results),
    ]
    return [table for table in every if table.rows]


def rates(results: RunResults) -> Table:
    """The shares before and after (where there is no before: of the one model), changes and judges."""
    if results.after is None:
        return Table("Results", (), ())
    found = measures(results.after, "rate")
    beside = UNDER_ATTACK if results.after.benign else ()
    if results.stage != "fit" and results.before is None:
        rows = [
            [
                Cell(m.title),
                estimate(m.estimate),
                *_beside(results.after, m.metric),
                count(m.estimate.n),
                Cell(m.judge or MISSING),
            ]
            for m in found
        ]
        return Table("Results", ("metric", "rate", *beside, "n", "judge"), rows)
    changes = {difference.metric: difference for difference in results.differences}
    rows = [
        [
            Cell(m.title),
            earlier_cell(results.before, m.metric),
            estimate(m.estimate),
            change(changes.get(m.metric)),
            *_beside(results.after, m.metric),
            count(m.estimate.n),
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
    for m in measures(results.after, "mean"):
        if not m.metric.attack:
            continue
        own = [estimate(m.estimate), count(m.estimate.n)]
        earlier = [earlier_cell(results.before, m.metric)] if results.before is not None else []
        rows.append([Cell(m.metric.title), *earlier, *own])
    columns = ("before", "after") if results.before is not None else ("mean",)
    return Table("Attacks: losses and effort", ("quantity", *columns, "n"), rows)


def groups(results: RunResults) -> Table:
    """Worst cases, and shares without an attack, by the examples' groups."""
    return Table("By group", ("metric", "group", "rate", "n"), _by_group(results, "rate"))


def grade_groups(results: RunResults) -> Table:
    """Mean grades by category."""
    return Table("Grades by group", ("metric", "group", "mean", "n"), _by_group(results, "mean"))


def _by_group(results: RunResults, kind: str) -> list[Sequence[Cell]]:
    rows: list[Sequence[Cell]] = []
    for measure in measures(results.after, kind) if results.after is not None else ():
        if measure.metric.attack not in ("", WORST_CASE):
            continue
        for group, by_name in measure.groups.items():
            for name, value in by_name.items():
                cells = Cell(measure.title), Cell(f"{group}: {name}"), estimate(value), count(value.n)
                rows.append(cells)
    return rows


def history(results: RunResults) -> Table:
    """Every share at every evaluated step, where there are more than two of them."""
    snapshots = results.snapshots
    if results.after is None or len(snapshots) < 3:
        return Table("Over training", (), ())
    rows = [
        [Cell(m.title), *(earlier_cell(snapshot, m.metric) for snapshot in snapshots)]
        for m in measures(results.after, "rate")
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
    found += [*bypassed(results), *erased_and_checked(results)]
    crossed = [f"{words(flag)} in {count}" for flag, count in after.cross_flags.items() if count]
    if crossed:
        found.append(f"Between the attacks: {', '.join(crossed)} of the examples.")
    if results.set_aside:
        found.append(
            "Measured in another way before (attack, length of replies, rows, batches or judge), so not "
            f"compared: {', '.join(results.set_aside)}."
        )
    return found


def notes(results: RunResults) -> list[str]:
    """How the numbers are to be read."""
    certified = results.after is not None and results.after.certified
    return [
        INTERVALS,
        *([DIFFERENCES] if results.differences else []),
        *([THREAT] if certified else []),
    ]


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
    model = arguments(config.get("model"))
    git = environment.get("git") or {}
    found = {
        "model": inline(model.get("base")),
        "weights": results.after.model if results.after is not None else "",
        "step": str(results.after.step) if results.after is not None else "",
        "objective": class_name(model.get("objective")),
        "attack": class_name(model.get("attack")),
        "defence": defence(results),
        "data": class_name(config.get("data")),
        "seed": inline(environment.get("seed_everything", environment.get("seed"))),
        "revision": f"{git.get('revision') or ''}{' (modified)' if git.get('modified') else ''}",
        "packages": inline(environment.get("packages")),
        "hardware": inline(environment.get("hardware")),
        "command": " ".join(str(word) for word in environment.get("command") or ()),
    }
    return {name: text for name, text in found.items() if text}


def defence(results: RunResults) -> str:
    """What stands around the model, with its settings; '' for none."""
    settings = inline(arguments(results.configuration.get("model")).get("defence"))
    return f"{results.defence} ({settings})" if results.defence and settings else results.defence


def _beside(snapshot: Snapshot, metric: Metric) -> list[Cell]:
    """What an attack makes of benign prompts, in the row of its success; blank in others."""
    if not snapshot.benign:
        return []
    own = snapshot.benign.get(metric.attack) if metric.quantity == "success_rate" else None
    shares = (own.refused, own.utility) if own is not None else (None, None)
    return [_of(share) if share is not None else Cell(MISSING, math.nan) for share in shares]


def _of(share: Estimate) -> Cell:
    """A share with its own n, which is not that of the row."""
    own = estimate(share)
    return Cell(f"{own.text}, n = {share.n}", own.order)


def arguments(block: Any) -> Mapping[str, Any]:
    """The arguments of a `class_path` block; the block itself where it is plain."""
    if not isinstance(block, dict):
        return {}
    return block.get("init_args") or {} if "class_path" in block else block


def class_name(block: Any) -> str:
    """The class of a `class_path` block; '' where it is none."""
    path = block.get("class_path", "") if isinstance(block, dict) else ""
    return str(path).rsplit(".", 1)[-1]


def inline(value: Any) -> str:
    """A value on one line; what was not set is left out."""
    if isinstance(value, dict):
        parts = ((key, inline(part)) for key, part in value.items())
        return ", ".join(f"{key} {part}" for key, part in parts if part)
    if isinstance(value, list | tuple):
        return ", ".join(inline(part) for part in value)
    return "" if value is None else str(value)
