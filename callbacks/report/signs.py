"""Warning signs in words: that a number is not what it seems."""

from __future__ import annotations

from callbacks.report.results import Gradings, PairedSets, UnderAttack


def carried(name: str, own: UnderAttack) -> str:
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
        f"{words(name)}: refuses what carries it: done to benign prompts, {' and '.join(parts)}; "
        "its success on harmful requests says little about harm."
    )


def unmatched(own: PairedSets) -> str:
    """Requests of one wording that the other lacks, in words; '' where there are none."""
    if not own.only_plain + own.only_reworded:
        return ""
    return (
        f"{own.metric.titled(own.judge)}: {own.only_plain} requests of {words(own.plain.block)} and "
        f"{own.only_reworded} of {words(own.metric.block)} have no partner in the other set and are not "
        "compared."
    )


def ungraded(name: str, own: Gradings, stage: str) -> str:
    """Gradings that are missing or unreadable, and replies that were cut, in words; '' where all is well."""
    again = "" if stage == "fit" else " (run the command again to ask for them)"
    parts = [
        f"{own.missing} of {own.asked} gradings are missing{again}" if own.missing else "",
        f"{own.unreadable} of {own.asked} gradings are unreadable and in no mean" if own.unreadable else "",
        f"{own.cut} of {own.asked} replies are as long as allowed, so probably cut" if own.cut else "",
        f"{own.beyond_window} of {own.asked} replies end beyond the model's positions"
        if own.beyond_window
        else "",
    ]
    said = "; ".join(part for part in parts if part)
    return f"{words(name)}, graded by {own.judge}: {said}." if said else ""


def words(name: str) -> str:
    """A name as a reader sees it."""
    return name.replace("_", " ")
