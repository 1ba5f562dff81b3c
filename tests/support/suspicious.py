"""Models whose replies are known beforehand, and the packaged corpus to ask them about."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from callbacks.evaluations.base import Evaluation
from callbacks.evaluations.session import Place, Session
from callbacks.report.results import Snapshot
from datamodules.evaluation import Block, EvaluationData, EvaluationSets
from datamodules.sources.tinychat.sources import TinyChatBenign, TinyChatHarmful
from datamodules.text.tokenizers import TokenizerConfig
from lightning_modules.defences.base import Defence
from lightning_modules.models.language_model import LanguageModel
from lightning_modules.models.requests import GREEDY, Decoding
from tests.conftest import chat_model

REFUSAL = "I'm sorry, but I can't help with that."


class Suspicious(LanguageModel):
    """Replies rightly to every benign prompt, unless it carries one of the marks; refuses the rest.

    Args:
        data: the prompts with their replies.
        marks: texts whose occurrence in a prompt is refused.
    """

    def __init__(self, data: EvaluationData, marks: Sequence[str] = ()) -> None:
        model = chat_model()
        super().__init__(model.module, model.chat)
        chats = [*data.examples["harmless"], *data.examples["utility"]]
        self.replies = {e.row.prompt: e.row.reply for e in chats}  # type: ignore[union-attr]
        self.marks = marks
        self.asked = 0

    def reply(self, prompts: Any, decoding: Decoding = GREEDY, seed: int = 0) -> list[str]:
        rows = zip(prompts.prompt_ids, prompts.prompt_mask, strict=True)
        self.asked += len(prompts.prompt_ids)
        return [self._said(self.chat.decode(ids[mask].tolist())) for ids, mask in rows]

    def _said(self, prompt: str) -> str:
        known = max((own for own in self.replies if own in prompt), key=len, default=None)
        refuses = known is None or any(mark in prompt for mark in self.marks)
        return REFUSAL if refuses else self.replies[known or ""]


def corpus(blocks: dict[str, Block] | None = None, harmful: int = 4, benign: int = 10) -> EvaluationData:
    """A few held-out requests, guides and sums."""
    data = EvaluationData(
        TokenizerConfig("tinychat:aligned"),
        EvaluationSets(
            harmful=[TinyChatHarmful("validation", limit=harmful)],
            harmless=[TinyChatBenign("validation", num_rows=benign, categories=["guide"])],
            utility=[
                TinyChatBenign("validation", num_rows=benign, categories=["sum", "copy", "fact", "reverse"])
            ],
            blocks=blocks or {},
            batch_size=2,
        ),
    )
    data.setup("test")
    return data


def measured(
    folder: Path,
    model: LanguageModel,
    data: EvaluationData,
    *evaluations: Evaluation,
    defence: Defence | None = None,
) -> Snapshot:
    """All jobs of the evaluations, as `thundercat test` runs them."""
    session = Session(Place(model, folder, "test", 0, defence=defence), data, evaluations)
    for job in session.jobs:
        session.do(job)
    return session.finish()
