"""Multiple-choice questions as a user would ask a chat model: does a defence refuse them, and is its answer
right (the failure of arXiv 2405.15589's table on MMLU in chat mode)."""

from __future__ import annotations

from collections.abc import Iterator
from string import ascii_uppercase
from typing import Any

from datamodules.fields import Count, checked
from datamodules.rows import ChatRow, RowProblem
from datamodules.sources.questions import QuestionSource

INSTRUCTION = "Answer the following multiple-choice question with the letter of the right answer."


@checked
class ChatQuestions:
    """One prompt a question, with the choices below it; the letter of the right one is expected.

    Args:
        source: the questions.
        instruction: what stands before each question.
        limit: use so many evenly spaced questions; null for all.
    """

    def __init__(
        self, source: QuestionSource, instruction: str = INSTRUCTION, limit: Count | None = None
    ) -> None:
        self.source = source
        self.instruction = instruction
        self.limit = limit

    def rows(self) -> Iterator[ChatRow | RowProblem]:
        """Raises: ValueError naming file and line of what is no question."""
        questions = self.source.questions()
        count = len(questions) if self.limit is None else min(self.limit, len(questions))
        for own in (questions[i * len(questions) // count] for i in range(count)):
            asked, choices, right = choices_of(own.document)
            listed = "\n".join(
                f"{letter}. {text}" for letter, text in zip(ascii_uppercase, choices, strict=False)
            )
            yield ChatRow(
                key="/".join(part for part in ("chat", own.subject, own.key) if part),
                prompt=f"{self.instruction}\n\n{asked}\n{listed}",
                reply=ascii_uppercase[right],
                where=own.where,
                category=own.subject,
            )


def choices_of(document: dict[str, Any]) -> tuple[str, list[str], int]:
    """Question, choices and the number of the right one, of a document of ARC, PIQA or MMLU."""
    if "goal" in document:
        return document["goal"], [document["sol1"], document["sol2"]], document["label"]
    choices = document["choices"]
    if isinstance(choices, dict):
        return document["question"], choices["text"], choices["label"].index(document["answerKey"])
    return document["question"], choices, document["answer"]
