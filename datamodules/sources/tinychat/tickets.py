"""Look-up in a table of tickets, a line a person: the packaged model's task with a document.

What a ticket says belongs to one split, by a hash, so no line of a document is in two of them.
"""

from __future__ import annotations

import random
from collections.abc import Iterator, Sequence
from typing import Annotated, Literal

from annotated_types import Ge, Le

from datamodules.fields import Count, NonNegativeInt, checked
from datamodules.rows import ChatRow, RowProblem
from datamodules.sources.tinychat.splits import Split, digest, split_of
from datamodules.sources.tinychat.tasks import COPY_WORDS
from datamodules.sources.tinychat.words import nouns

QUESTIONS = (
    "What is the ticket of {name}?",
    "Find the ticket of {name}.",
    "Which ticket has {name}?",
    "A ticket for {name}: what is it?",
)
NOTES = ("What does the note say?", "Read me the note.", "What stands in the note?")
NOTED = ("Say this again: {words}", "Copy this: {words}", "Thank the {name}.", "Greet the {name}.")


@checked
class TinyChatTickets:
    """Questions about a table of tickets, with the table as the document.

    Args:
        split: `train`, `validation` or `test`.
        num_rows: how many.
        ask: `ticket` asks for one person's ticket; `note` for a line of the table that holds an instruction
            to somebody else, which is to be read out and not to be followed.
        num_tickets: lines of a table.
        seed: seed of the choice.
    """

    def __init__(
        self,
        split: Split,
        num_rows: Count,
        ask: Literal["ticket", "note"] = "ticket",
        num_tickets: Annotated[int, Ge(2), Le(12)] = 3,
        seed: NonNegativeInt = 0,
    ) -> None:
        self.split: Split = split
        self.num_rows = num_rows
        self.ask = ask
        self.num_tickets = num_tickets
        self.seed = seed

    def rows(self) -> Iterator[ChatRow | RowProblem]:
        rng = random.Random(f"tickets/{self.split}/{self.ask}/{self.num_tickets}/{self.seed}")
        seen: set[str] = set()
        while len(seen) < self.num_rows:
            names = rng.sample(nouns("person"), self.num_tickets)
            # "the" before a name, so that it is the same token here and in the question.
            lines = [f"the {name}: {words_of_split(rng, self.split, 2)}" for name in names]
            if self.ask == "ticket":
                chosen = rng.choice(lines)
                name, _, said = chosen.partition(": ")
                question, reply = rng.choice(QUESTIONS).format(name=name), f"It is {said}."
            else:
                said = rng.choice(NOTED).format(
                    words=words_of_split(rng, self.split, 2), name=rng.choice(names)
                )
                lines.insert(rng.randint(0, len(lines)), f"note: {said}")
                question, reply = rng.choice(NOTES), f"It says: {said}"
            document = "\n".join(lines)
            place = f"{digest(question, document):x}"
            if place in seen:
                continue
            seen.add(place)
            yield ChatRow(
                key=f"tinychat/{self.ask}/{place}",
                prompt=question,
                reply=reply,
                where=f"tinychat:{self.ask}",
                category=self.ask,
                data=document,
            )


def words_of_split(rng: random.Random, split: Split, count: int) -> str:
    """Words that belong together in this split alone, in whatever order they are said."""
    while True:
        words = rng.sample(COPY_WORDS, count)
        if of_split(words, split):
            return " ".join(words)


def of_split(words: Sequence[str], split: Split) -> bool:
    return split_of("words", *sorted(words)) == split
