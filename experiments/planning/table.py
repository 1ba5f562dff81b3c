"""A plan's figures as text."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any


def table(found: Mapping[str, Any]) -> str:
    """The figures as text."""
    rows = [
        ("parameters", f"{found['parameters']['all']:,}, of which {found['parameters']['trained']:,} learn"),
        *((f"memory: {part}", _held(found, part)) for part in found["memory"]),
        ("memory: peak", f"{gib(found['peak'])} of {gib(found['device_memory'])}"),
        *(
            (f"operations a step: {name}", f"{number / 1e12:,.1f} TFLOP")
            for name, number in found["flops_per_step_and_device"].items()
        ),
        ("seconds a step", f"{found['seconds_per_step']:,.2f}"),
    ]
    if "steps" in found:
        rows += [("steps", f"{found['steps']:,}"), ("hours", f"{found['hours']:,.2f}")]
    asked = found["evaluations"]
    if asked["replies"]:
        number = f"{asked['replies']:,} replies, {asked['passes']:,} passes of a row"
        rows.append(
            ("evaluations", f"{number}, {asked['flops'] / 1e12:,.0f} TFLOP, {asked['hours']:,.2f} hours")
        )
    rows.append(("checkpoint", gib(found["checkpoint"])))
    if "checkpoints" in found:
        written = f"{found['checkpoints']:,}, {gib(found['checkpoint_bytes_written'])} in all"
        rows.append(("checkpoints written", written))
    for name, volume in found.get("communication", {}).items():
        rows.append((f"sent by a device a step: {name.replace('_', ' ')}", gib(volume)))
    rows.append(("rows of a micro-batch that fit", f"{found['largest_rows']:,}"))
    rows.append(("rows of an attack that fit", f"{found['largest_attack']:,}"))
    width = max(len(name) for name, _ in rows)
    lines = [f"{name:<{width}}  {value}" for name, value in rows]
    notes = [f"assumed: {text}" for text in found["assumptions"]]
    return "\n".join([*lines, *notes, *(f"warning: {text}" for text in found["warnings"])])


def _held(found: Mapping[str, Any], part: str) -> str:
    """A part's share of the peak, and what it is where another moment holds more of it."""
    size, most = found["memory"][part], found["memory_at_most"][part]
    return gib(size) + (f" at the peak, {gib(most)} at another's" if gib(most) != gib(size) else "")


def gib(size: int) -> str:
    return f"{size / 2**30:,.2f} GiB"
