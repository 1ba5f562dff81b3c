"""The project's own corpus as data sources."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Literal

from datamodules.rows import ChatRow, HarmfulRow, RowProblem
from datamodules.sources import tinychat_corpus


class TinyChatHarmful:
    """Harmful how-to requests of the project's own corpus.

    Args:
        split: `train` or `heldout`; no verb-object pair is in both.
        limit: use only the first so many requests; null for all.
    """

    def __init__(self, split: Literal["train", "heldout"], limit: int | None = None) -> None:
        self.split = split
        self.limit = limit

    def rows(self) -> Iterator[HarmfulRow | RowProblem]:
        yield from tinychat_corpus.harmful_rows(self.split)[: self.limit]


class TinyChatBenign:
    """Benign tasks of the project's own corpus, each with one right answer.

    Args:
        split: `train` or `heldout`; no task content is in both.
        num_rows: how many rows to generate.
        seed: seed of the generated tasks.
        categories: keep only these of guide, sum, copy, reverse, fact, talk; null for all.
    """

    def __init__(
        self,
        split: Literal["train", "heldout"],
        num_rows: int = 2000,
        seed: int = 0,
        categories: list[str] | None = None,
    ) -> None:
        self.split = split
        self.num_rows = num_rows
        self.seed = seed
        self.categories = categories

    def rows(self) -> Iterator[ChatRow | RowProblem]:
        for row in tinychat_corpus.benign_rows(self.split, self.num_rows, self.seed):
            if self.categories is None or row.category in self.categories:
                yield row
