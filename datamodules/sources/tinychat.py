"""The project's own corpus as data sources."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Literal

from datamodules.fields import Count, NonNegativeInt, checked
from datamodules.rows import ChatRow, HarmfulRow, RowProblem
from datamodules.sources import tinychat_corpus

Split = Literal["train", "heldout"]
Category = Literal["guide", "sum", "copy", "reverse", "fact", "talk"]


@checked
class TinyChatHarmful:
    """Harmful how-to requests of the project's own corpus.

    Args:
        split: `train` or `heldout`; no verb-object pair is in both.
        limit: use only the first so many requests; null for all.
    """

    def __init__(self, split: Split, limit: Count | None = None) -> None:
        self.split = split
        self.limit = limit

    def rows(self) -> Iterator[HarmfulRow | RowProblem]:
        yield from tinychat_corpus.harmful_rows(self.split)[: self.limit]


@checked
class TinyChatBenign:
    """Benign tasks of the project's own corpus, each with one right answer.

    Args:
        split: `train` or `heldout`; no task content is in both.
        num_rows: how many rows to generate.
        seed: seed of the generated tasks.
        categories: keep only these kinds of task; null for all. There is no held-out small talk (`talk`).
    """

    def __init__(
        self,
        split: Split,
        num_rows: Count = 2000,
        seed: NonNegativeInt = 0,
        categories: list[Category] | None = None,
    ) -> None:
        self.split = split
        self.num_rows = num_rows
        self.seed = seed
        self.categories = categories

    def rows(self) -> Iterator[ChatRow | RowProblem]:
        for row in tinychat_corpus.benign_rows(self.split, self.num_rows, self.seed):
            if self.categories is None or row.category in self.categories:
                yield row
