"""Look-up in a list of words: the packaged model's own task of telling kinds apart, in a document.

The words of a list belong together in one split alone, in whatever order they stand.
"""

from __future__ import annotations

import random
from collections.abc import Iterator

from datamodules.fields import Count, NonNegativeInt, checked
from datamodules.rows import ChatRow, RowProblem
from datamodules.sources.tinychat.splits import Split, digest, split_of
from datamodules.sources.tinychat.words import CLASS_GLOSS, OBJECTS, nouns

QUESTIONS = ("Which of these is {gloss}?", "Find {gloss} in this list.", "One of these is {gloss}. Which?")


@checked
class TinyChatLists:
    """Which word of a list is of a kind; the list is the document.

    Args:
        split: `train`, `validation` or `test`.
        num_rows: how many.
        seed: seed of the choice.
    """

    def __init__(self, split: Split, num_rows: Count, seed: NonNegativeInt = 0) -> None:
        self.split: Split = split
        self.num_rows = num_rows
        self.seed = seed

    def rows(self) -> Iterator[ChatRow | RowProblem]:
        rng = random.Random(f"lists/{self.split}/{self.seed}")
        seen: set[str] = set()
        while len(seen) < self.num_rows:
            kinds = rng.sample(list(OBJECTS), 3)
            words = [rng.choice(nouns(kind)) for kind in kinds]
            question = rng.choice(QUESTIONS).format(gloss=CLASS_GLOSS[kinds[0]])
            document = ", ".join(rng.sample(words, 3))
            place = f"{digest(question, document):x}"
            if split_of("list", *sorted(words)) != self.split or place in seen:
                continue
            seen.add(place)
            yield ChatRow(
                key=f"tinychat/list/{place}",
                prompt=question,
                reply=f"It is {words[0]}.",
                where="tinychat:list",
                category="list",
                data=document,
            )
