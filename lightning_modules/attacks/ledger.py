"""What a search over examples has found and what it has cost so far: one account for every attack.

A search says what it spends (`count_*`) and enters every iterate's losses (`enter`); the ledger keeps the
curve, the best so far and the signs of trouble, and writes them into the AttackedPrompt. Nothing here waits
for a GPU: an attack inside training enters an iterate at every step.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Generic, TypeVar

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from datamodules.text.chat_format import Turn
from lightning_modules.attacks.base import AttackedPrompt
from lightning_modules.attacks.progress import notify

T = TypeVar("T")


class Ledger:
    """The account of one search.

    Args:
        size: number of examples.
        device: where losses are entered.
        dtype: of the losses.
    """

    def __init__(
        self, size: int, device: torch.device | None = None, dtype: torch.dtype = torch.float32
    ) -> None:
        self.best_loss: Float[Tensor, " batch"] = torch.full((size,), torch.inf, device=device, dtype=dtype)
        self.forward_passes: Int[Tensor, " batch"] = torch.zeros(size, dtype=torch.long, device=device)
        self.backward_passes: Int[Tensor, " batch"] = torch.zeros_like(self.forward_passes)
        self.zero_gradient: Bool[Tensor, " batch"] = torch.zeros_like(self.forward_passes, dtype=torch.bool)
        self.queries: Int[Tensor, " batch"] | None = None
        self._curve: list[Float[Tensor, " batch"]] = []

    def count_forward(self, rows: Int[Tensor, " row"]) -> None:
        """One forward pass for every entry of `rows`; an example may stand there many times."""
        _count(self.forward_passes, rows)

    def count_backward(self, rows: Int[Tensor, " row"], gradient: Float[Tensor, "row ..."]) -> None:
        """One backward pass for every entry of `rows`, with what it gave; a zero gradient is a sign of
        trouble."""
        _count(self.backward_passes, rows)
        # Where the gradient is: a copy to the host would wait for it.
        self.zero_gradient = self.zero_gradient.to(gradient.device)
        self.zero_gradient[rows.to(gradient.device)] |= ~gradient.flatten(1).any(1)

    def count_queries(self, rows: Sequence[int]) -> None:
        """One generated reply for every entry of `rows`."""
        if self.queries is None:
            self.queries = torch.zeros_like(self.forward_passes)
        _count(self.queries, torch.tensor(rows, dtype=torch.long))

    def enter(self, rows: Int[Tensor, " row"], losses: Float[Tensor, " row"]) -> Bool[Tensor, " row"]:
        """Enter one iterate; several candidates of an example count as one, by the best of them.

        Args:
            rows: the example of each candidate.
            losses: attacked losses; inf where a candidate could not be tried.

        Returns: True for the candidates that are now their example's best (all of equal ones).
        """
        # Before the minimum is taken: it would let one NaN candidate hide an example's finite ones.
        losses = losses.detach().to(self.best_loss).nan_to_num(nan=torch.inf, posinf=torch.inf)
        rows = rows.to(losses.device)
        before = self.best_loss[rows]
        lowest = torch.full_like(self.best_loss, torch.inf).scatter_reduce(0, rows, losses, "amin")
        self.best_loss = torch.minimum(self.best_loss, lowest)
        self._curve.append(lowest.masked_fill(lowest.isinf(), torch.nan))
        return (losses < before) & (losses == self.best_loss[rows])

    def attacked(
        self,
        prompt_ids: Int[Tensor, "batch prompt"],
        prompt_mask: Bool[Tensor, "batch prompt"],
        delta: Float[Tensor, "batch prompt dim"] | None = None,
        distance: Float[Tensor, " batch"] | None = None,
        texts: Sequence[str] = (),
        histories: Sequence[tuple[Turn, ...]] = (),
        forced: Sequence[tuple[int, ...]] = (),
    ) -> AttackedPrompt:
        """The search's result with its whole account, on the prompts' device; no distance is NaN."""
        device, size = prompt_ids.device, len(self.best_loss)
        return AttackedPrompt(
            prompt_ids=prompt_ids,
            prompt_mask=prompt_mask,
            delta=delta,
            loss_curve=(torch.stack(self._curve) if self._curve else self.best_loss.new_empty(0, size)).to(
                device
            ),
            forward_passes=self.forward_passes.to(device),
            backward_passes=self.backward_passes.to(device),
            distance=torch.full((size,), torch.nan, device=device) if distance is None else distance,
            zero_gradient=self.zero_gradient.to(device),
            texts=tuple(texts),
            histories=tuple(histories),
            forced=tuple(forced),
            queries=None if self.queries is None else self.queries.to(device),
        )


class PointLedger(Ledger):
    """A search over points of a space: `best` is a tensor whose rows are the examples' best points.

    Args:
        start: where each example starts.
    """

    def __init__(self, start: Float[Tensor, "batch ..."]) -> None:
        super().__init__(len(start), start.device, start.dtype)
        # A copy: the search goes on in `start` itself.
        self.best = start.clone()

    def record(
        self, rows: Int[Tensor, " row"], points: Float[Tensor, "row ..."], losses: Float[Tensor, " row"]
    ) -> None:
        """Enter one iterate of different examples."""
        improved = self.enter(rows, losses)
        # `where` and no boolean index, which would wait for the GPU to know how many there are.
        wide = improved.view(-1, *[1] * (points.dim() - 1))
        self.best[rows] = torch.where(wide, points.detach(), self.best[rows])
        notify(self._curve[-1])


class CandidateLedger(Ledger, Generic[T]):
    """A search over discrete candidates: `best` lists the examples' best ones.

    Args:
        start: what each example starts from.
        texts: what a user would type for the best candidates; asked only where somebody watches.
    """

    def __init__(self, start: Sequence[T], texts: Callable[[Sequence[T]], list[str]]) -> None:
        # On the CPU: candidates are Python objects, so every iterate's winners are read in any case.
        super().__init__(len(start))
        self.best = list(start)
        self._texts = texts

    def record(
        self, rows: Sequence[int], candidates: Sequence[T], losses: Float[Tensor, " row"]
    ) -> list[int]:
        """Enter one iterate; returns the examples that improved, in the order of their first candidates."""
        won = self.enter(torch.tensor(rows, dtype=torch.long), losses)
        improved: dict[int, T] = {}
        for row, candidate, better in zip(rows, candidates, won.tolist(), strict=True):
            if better:
                improved.setdefault(row, candidate)
        for row, candidate in improved.items():
            self.best[row] = candidate
        notify(self._curve[-1], lambda: self._texts(self.best))
        return list(improved)

    def keep(self, row: int, candidate: T, loss: float) -> None:
        """Make a candidate the example's result, whatever was found before."""
        self.best[row], self.best_loss[row] = candidate, loss


def _count(passes: Int[Tensor, " batch"], rows: Int[Tensor, " row"]) -> None:
    own = rows.to(passes.device)
    # `passes[own] += 1` would count an example that stands there twice only once.
    passes.index_add_(0, own, torch.ones_like(own))
