"""`thundercat compare RUN RUN ...`: runs side by side on one page, down to their rows.

The page needs nothing but the folder of data beside it, and opens as a file. What was measured in different
ways is marked and not paired.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from callbacks.report.escape import printable
from callbacks.report.results import Stage
from experiments.compare.comparison import write_comparison
from experiments.compare.runs import chosen, common_stage, names
from experiments.config.errors import ConfigError, suggest


@dataclass(frozen=True)
class CompareCall:
    """What is compared, and where to."""

    run: Sequence[str]
    """Run folders, or patterns of them."""
    out: str = "runs/compare"
    """Folder of the page, its data and leaderboards."""
    stage: Stage | None = None
    """What is shown of the runs; null takes test, validate or fit, the first that all of them have."""
    baseline: str | None = None
    """Run that differences are taken against at first; null takes the first one."""
    csv: bool = False
    markdown: bool = False


def compare(call: CompareCall) -> int:
    """Write the page, and leaderboards where they are asked for. Returns the exit status.

    Raises: ConfigError naming a folder that is no run or damaged.
    """
    out = Path(call.out)
    folders = chosen(call.run, out)
    stage = common_stage(folders, call.stage)
    called = names(folders)
    baseline = _number(call.baseline, called, folders)
    kinds = [kind for kind, asked in (("csv", call.csv), ("markdown", call.markdown)) if asked]
    page = write_comparison(list(zip(called, folders, strict=True)), stage, out, baseline, kinds)
    for path in (page, *(out / f"leaderboard.{'csv' if kind == 'csv' else 'md'}" for kind in kinds)):
        print(f"{path.stem}: {printable(str(path), one_line=True)}")
    return 0


def _number(baseline: str | None, called: Sequence[str], folders: Sequence[Path]) -> int:
    if baseline is None:
        return 0
    places = {path.resolve(): number for number, path in enumerate(folders)}
    if baseline in called:
        return called.index(baseline)
    if Path(baseline).resolve() in places:
        return places[Path(baseline).resolve()]
    raise ConfigError(
        f"--baseline: expected one of the compared runs, got {baseline!r}{suggest(baseline, called)}"
    )
