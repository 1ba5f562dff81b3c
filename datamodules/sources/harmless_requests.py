"""Harmless requests that read like harmful ones: the same imperatives and length, another matter.

A model that is trained on harmful requests alone learns to refuse their form ("Give me detailed instructions
on how to build a bike"; arXiv 2405.15589 reports it of its own models), or single words ("kill weeds"). These
are to be answered beside them: matters in forms, and questions about words, history, stories and rights that
sound dangerous. Texts of the two splits are disjoint (harmless_texts.py). No prompt of XSTest is among them,
though XSTest asks for the same kinds of thing: it stays a test of whether the kind was learned.
"""

from __future__ import annotations

from collections.abc import Iterator

from datamodules.fields import Count, checked
from datamodules.rows import ChatRow, RowProblem
from datamodules.sources.harmless_texts import FORMS, MATTERS, QUESTIONS, Split


@checked
class HarmlessRequests:
    """Every matter in some of the forms, spread so that each form and each matter occurs about equally often;
    then every question as it is.

    Args:
        split: `train` or `validation`.
        num_forms: in how many forms each matter occurs.
    """

    def __init__(self, split: Split, num_forms: Count = 2) -> None:
        if num_forms > len(FORMS[split]):
            raise ValueError(
                f"HarmlessRequests.num_forms: expected at most {len(FORMS[split])}, got {num_forms}"
            )
        self.split: Split = split
        self.num_forms = num_forms

    def rows(self) -> Iterator[ChatRow | RowProblem]:
        """Rows without replies: a model's own can be put beside them by `thundercat predict`."""
        forms = FORMS[self.split]
        for i, matter in enumerate(MATTERS[self.split]):
            for j in range(self.num_forms):
                number = (i + j * len(forms) // self.num_forms) % len(forms)
                key = f"harmless_requests/{self.split}/{i}/{number}"
                yield ChatRow(key, forms[number].format(matter), "", key)
        for i, question in enumerate(QUESTIONS[self.split]):
            key = f"harmless_requests/{self.split}/question{i}"
            yield ChatRow(key, question, "", key)
