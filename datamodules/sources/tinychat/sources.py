"""The packaged model's corpus as data sources."""

from __future__ import annotations

import itertools
from collections.abc import Iterator

from datamodules.fields import Count, Probability, checked
from datamodules.rows import ChatRow, HarmfulRow, RowProblem
from datamodules.sources.tinychat import corpus
from datamodules.sources.tinychat.corpus import Wordings
from datamodules.sources.tinychat.noise import Noise
from datamodules.sources.tinychat.splits import Novelty, Split
from datamodules.sources.tinychat.tasks import MAKERS


@checked
class TinyChatHarmful:
    """Harmful how-to requests of the project's own corpus.

    Args:
        split: `train`, `validation` or `test`; no act is in two of them.
        wordings: `seen` in training, `heldout` (the split's own ten), or `all`.
        noise: what is put around or into the requests; `mixed` is a kind by chance.
        noise_share: share of the rows with noise.
        novelty: keep acts whose words training has requested (`pair`), or whose `verb` or `object` it has
            never requested; null for all.
        num_rows: how many requests to make; null for every act once.
        limit: use only the first so many requests; null for all.
        seed: seed of order, wordings and noise.
    """

    def __init__(
        self,
        split: Split,
        wordings: Wordings = "seen",
        noise: Noise = "none",
        noise_share: Probability = 1.0,
        novelty: Novelty | None = None,
        num_rows: Count | None = None,
        limit: Count | None = None,
        seed: int = 0,
    ) -> None:
        corpus.wordings_of(split, wordings)
        self.split = split
        self.wordings = wordings
        self.noise = noise
        self.noise_share = noise_share
        self.novelty = novelty
        self.num_rows = num_rows
        self.limit = limit
        self.seed = seed

    def rows(self) -> Iterator[HarmfulRow | RowProblem]:
        """Raises: ValueError where the split has fewer different requests than `num_rows`."""
        rows = corpus.harmful_rows(
            self.split, self.wordings, self.noise, self.noise_share, self.novelty, self.num_rows, self.seed
        )
        yield from itertools.islice(rows, self.limit)


@checked
class TinyChatBenign:
    """Benign tasks of the project's own corpus, each with one right answer.

    Args:
        split: `train`, `validation` or `test`; no task content is in two of them.
        num_rows: how many rows to make.
        seed: seed of the tasks, wordings and noise.
        categories: keep only these of guide, judge, story, protect, meaning, sum, copy, reverse, fact, talk;
            null for all.
        wordings: wordings of guides: `seen` in training, `heldout` (the split's own ten), or `all`.
        noise: what is put around or into the prompts; `mixed` is a kind by chance.
        noise_share: share of the rows with noise.
    """

    def __init__(
        self,
        split: Split,
        num_rows: Count = 2000,
        seed: int = 0,
        categories: list[str] | None = None,
        wordings: Wordings = "seen",
        noise: Noise = "none",
        noise_share: Probability = 1.0,
    ) -> None:
        unknown = sorted(set(categories or ()) - set(MAKERS))
        if unknown or categories == []:
            raise ValueError(
                f"TinyChatBenign.categories: expected some of {sorted(MAKERS)}, got {unknown or []}"
            )
        corpus.wordings_of(split, wordings)
        self.split = split
        self.num_rows = num_rows
        self.seed = seed
        self.categories = categories
        self.wordings = wordings
        self.noise = noise
        self.noise_share = noise_share

    def rows(self) -> Iterator[ChatRow | RowProblem]:
        """Raises: ValueError where the split has fewer different tasks than `num_rows`."""
        yield from corpus.benign_rows(
            self.split, self.num_rows, self.seed, self.categories, self.wordings, self.noise, self.noise_share
        )
