"""Per-example outcomes of attacks as a torchmetric: everything reported is derived from them, exactly, over
any number of processes."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor
from torchmetrics import Metric
from torchmetrics.utilities import dim_zero_cat

from callbacks.metrics.rates import wilson_interval

FIELDS = (
    "example",
    "success",
    "refused",
    "steps",
    "passes",
    "queries",
    "seconds",
    "loss_start",
    "loss_best",
    "category",
    "functional",
)


class Table:
    """Columns over examples, one row per example, sorted by example id.

    A plain class: torchmetrics would reach into a dict or dataclass and squeeze the columns of a single
        example.
    """

    def __init__(self, columns: dict[str, Tensor]) -> None:
        self.columns = columns

    def __getitem__(self, name: str) -> Tensor:
        return self.columns[name]

    def __len__(self) -> int:
        return len(self.columns["example"])


class Outcomes(Metric):
    """One row of FIELDS per example and attack, float64; an example that several processes report counts
    once.

    With several restarts of an attack an example is a success if one of them is; its cost is the sum, its
    losses the best run's.
    """

    rows: list[Tensor]

    def __init__(self) -> None:
        super().__init__()
        self.add_state("rows", [], dist_reduce_fx="cat")
        self.add_state("restarts", [], dist_reduce_fx="cat")

    def update(self, rows: Tensor, restarts: Tensor) -> None:
        """Add (B, len(FIELDS)) float64 rows and their (B,) restart numbers. Example ids are exact below
        2^53."""
        self.rows.append(rows.double())
        self.restarts.append(restarts.long())  # type: ignore[operator, union-attr]

    def compute(self) -> Table:
        # After adding up over processes the states are tensors, before it lists of them.
        empty = not isinstance(self.rows, Tensor) and not self.rows
        rows = torch.empty(0, len(FIELDS), dtype=torch.float64) if empty else dim_zero_cat(self.rows)
        restarts = torch.empty(0, dtype=torch.long) if empty else dim_zero_cat(self.restarts)  # type: ignore[arg-type]
        seen: dict[tuple[float, int], Tensor] = {}
        for row, restart in zip(rows.cpu(), restarts.tolist(), strict=True):
            seen.setdefault((float(row[0]), restart), row)
        by_example: dict[float, list[Tensor]] = {}
        for (example, _), row in seen.items():
            by_example.setdefault(example, []).append(row)
        merged = [_merge(torch.stack(by_example[example])) for example in sorted(by_example)]
        table = torch.stack(merged) if merged else rows.cpu()
        return Table({name: table[:, i] for i, name in enumerate(FIELDS)})


def _merge(restarts: Tensor) -> Tensor:
    """One row of an example's (R, F) restarts."""
    merged = restarts[0].clone()
    column = {name: restarts[:, i] for i, name in enumerate(FIELDS)}
    merged[FIELDS.index("success")] = column["success"].amax()
    merged[FIELDS.index("refused")] = column["refused"].amin()
    for name in ("steps", "passes", "queries", "seconds"):
        merged[FIELDS.index(name)] = column[name].sum()
    best = int(torch.nan_to_num(column["loss_best"], nan=torch.inf).argmin())
    for name in ("loss_start", "loss_best"):
        merged[FIELDS.index(name)] = column[name][best]
    return merged


def rate(outcomes: Tensor) -> dict[str, float]:
    """{"rate", "low", "high", "n"} of (n,) outcomes in {0, 1}, with the 95 % Wilson interval."""
    successes, trials = int(outcomes.sum()), len(outcomes)
    low, high = wilson_interval(successes, trials)
    return {"rate": successes / trials if trials else float("nan"), "low": low, "high": high, "n": trials}


def bootstrap_interval(values: Tensor, num_resamples: int = 2000, seed: int = 0) -> tuple[float, float]:
    """95 % percentile bootstrap interval of the mean of (n,) per-example values (Efron 1979); NaN without
    values."""
    if len(values) == 0:
        return float("nan"), float("nan")
    generator = torch.Generator().manual_seed(seed)
    index = torch.randint(0, len(values), (num_resamples, len(values)), generator=generator)
    means = values.double()[index].mean(1)
    low, high = torch.quantile(means, torch.tensor([0.025, 0.975], dtype=torch.float64)).tolist()
    return low, high


def worst_case(tables: Sequence[Table]) -> Tensor:
    """(n,) 1 where at least one attack succeeded, over the examples that every attack has tried."""
    shared = set.intersection(*(set(table["example"].tolist()) for table in tables)) if tables else set()
    order = sorted(shared)
    outcome = dict.fromkeys(order, 0.0)
    for table in tables:
        for example, success in zip(table["example"].tolist(), table["success"].tolist(), strict=True):
            if example in outcome:
                outcome[example] = max(outcome[example], success)
    return torch.tensor([outcome[example] for example in order], dtype=torch.float64)


def success_by_budget(table: Table, budget: str, points: int = 20) -> dict[str, list[float]]:
    """Share of examples that succeeded within a budget (`steps`, `passes`, `queries` or `seconds`), at up to
    `points` budgets.

    An attack that does not stop at success has spent its whole budget on every example: its curve is a single
    step.
    """
    spent = torch.where(table["success"] > 0, table[budget], torch.inf)
    finite = spent[spent.isfinite()].sort().values
    if len(finite) == 0:
        return {"budget": [], "share": []}
    grid = sorted(
        {float(finite[min(len(finite) - 1, (i + 1) * len(finite) // points)]) for i in range(points)}
        | {float(finite[0])}
    )
    return {"budget": grid, "share": [float((spent <= b).double().mean()) for b in grid]}
