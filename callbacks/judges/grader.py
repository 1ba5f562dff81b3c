"""Single-answer grading: a model reads a conversation and writes a grade from 1 to 10 (arXiv 2306.05685)."""

from __future__ import annotations

import re
from collections.abc import Sequence

from datamodules.fields import checked
from datamodules.settings import settings_digest
from datamodules.sources.conversations import Conversation, GradingPrompt, prompt_name
from lightning_modules.models.chat import ChatModel, Unanswered, ask_each, decides
from lightning_modules.models.requests import Request

GRADE = (re.compile(r"\[\[(\d+(?:\.\d+)?)\]\]"), re.compile(r"\[(\d+(?:\.\d+)?)\]"))
"""`[[7]]` as the prompt asks for; else `[7]`, as the authors' code also reads."""
LOWEST, HIGHEST = 1.0, 10.0


@checked
class Grader:
    """A model that grades; its name stands with every grade.

    Args:
        model: loaded in this process, or behind an endpoint.
    """

    def __init__(self, model: ChatModel) -> None:
        self.model = model

    def label(self, prompts: dict[str, GradingPrompt], references: Sequence[Sequence[str] | None]) -> str:
        """`name@revision`: the model, its revision, and a digest of how it decodes and of the prompts and
        reference answers that it is given."""
        texts = [[p.system, p.template] for _, p in sorted(prompts.items())]
        digest = settings_digest(texts, references, *decides(self.model))
        return f"grader:{self.model.name}@{self.model.revision}+{digest}"

    def answers(self, requests: Sequence[Request]) -> list[str | Unanswered]:
        """What the model writes, or why it could not be asked."""
        return ask_each(self.model, requests)

    def request(
        self,
        prompts: dict[str, GradingPrompt],
        conversation: Conversation,
        replies: Sequence[str],
    ) -> Request:
        """The grading of the last of the replies, one or two.

        Text of the graded model that the grading one would read as a turn's mark is broken up.
        """
        turn, own = len(replies) - 1, conversation
        prompt = prompts[prompt_name(turn, own.references is not None)]
        said = [self.model.escape(reply) for reply in replies]
        values = {"question": own.turns[0], "answer": said[0]}
        for number, (question, reply) in enumerate(zip(own.turns, said, strict=False), start=1):
            values |= {f"question_{number}": question, f"answer_{number}": reply}
        for number, reference in enumerate(own.references or (), start=1):
            values[f"ref_answer_{number}"] = reference
        return Request(prompt.filled(values), prompt.system or None)


def grade(answer: str) -> float | None:
    """The grade in a model's answer; None where there is none from 1 to 10."""
    for pattern in GRADE:
        found = pattern.search(answer)
        if found is not None:
            value = float(found.group(1))
            return value if LOWEST <= value <= HIGHEST else None
    return None
