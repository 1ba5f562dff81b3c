"""MT-Bench: two-turn questions, replied to by the model and graded by another one from 1 to 10.

A conversation is two rows: repetition 0 is the reply to the first turn, repetition 1 that to the second,
whose `history` is the first exchange. Replies are on disk before anything is graded; a grading that the judge
could not be asked for is missing from the row and asked for again by the next `thundercat test`, one without
a readable grade is stored as such. Greedy replies: the authors sample some categories at 0.7.
"""

from __future__ import annotations

import logging
from collections.abc import Sequence
from dataclasses import dataclass, replace

from lightning import LightningModule, Trainer

from callbacks.evaluations.asking import Work
from callbacks.evaluations.base import Evaluation
from callbacks.evaluations.probe import Probe
from callbacks.evaluations.schedule import Schedule
from callbacks.evaluations.session import Place
from callbacks.judges.grader import Grader, grade
from callbacks.report.grades import GRADE
from datamodules.fields import Count, checked
from datamodules.result_lines import Identity, Measurement, Row
from datamodules.settings import settings_digest
from datamodules.sources.conversations import TURNS, Conversation, GradingPrompt, MTBenchFiles
from datamodules.sources.gather import evenly
from lightning_modules.models.chat import ChatModel, Unanswered
from lightning_modules.models.decoder import text_config
from lightning_modules.models.language_model import LanguageModel
from lightning_modules.models.requests import Decoding, Request
from lightning_modules.pretrained import CUT_WITHIN

log = logging.getLogger(__name__)


@checked
class MTBenchEvaluation(Evaluation):
    """Mean grade of two-turn conversations, by turn and category (arXiv 2306.05685, single-answer grading).

    Args:
        files: questions, reference answers and the judge's prompts.
        judge: the model that grades, loaded or behind an endpoint.
        schedule: when it runs and on how many conversations; null takes the defaults.
        max_new_tokens: longest generated reply.
        batch_size: conversations that are replied to at once, and between two writes.
        block: its name in tables.
    """

    name = "mt_bench"

    def __init__(
        self,
        files: MTBenchFiles,
        judge: ChatModel,
        schedule: Schedule | None = None,
        max_new_tokens: Count = 1024,
        batch_size: Count = 8,
        block: str = "mt_bench",
    ) -> None:
        super().__init__(schedule, max_new_tokens)
        self.files = files
        self.grader = Grader(judge)
        self.batch_size = batch_size
        self.block = block

    def probes(self) -> list[Probe]:
        """None: the questions are not the evaluation data's."""
        return []

    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Raises: ValueError for a file that is none of MT-Bench's, before anything is trained."""
        super().setup(trainer, pl_module, stage)
        self.files.conversations()
        self.files.grading_prompts()

    def work(self, place: Place, weights: str) -> list[tuple[Measurement, list[Work]]]:
        """One measurement; its chunks are dealt out to the processes in turn."""
        whole = self.files.conversations()
        asked = evenly(whole, self.schedule.rows(place.stage))
        prompts = self.files.grading_prompts()
        system = self._data.encoding.system if self._data is not None else None
        chunks = place.parts(asked, self.batch_size)
        judge = self.grader.label(prompts, [own.references for own in whole])
        measurement = place.measurement(
            self.name,
            weights,
            settings=settings_digest(
                self.max_new_tokens,
                place.precision,
                system,
                # As the template puts it, and with its batch-mates, on which rounding depends.
                [[place.model.chat.prompt(own.turns[0], system).ids for own in chunk] for chunk in chunks],
                [[own.turns[1] for own in chunk] for chunk in chunks],
            ),
            subject="utility",
            quantity=GRADE,
            judge=judge,
            n=len(asked),
            block=self.block,
        )
        work: list[Work] = [
            GradedChunk(measurement, chunk, system, self.max_new_tokens, self.grader, prompts)
            for chunk in chunks[place.rank :: place.world_size]
        ]
        return [(measurement, work)]


@dataclass(frozen=True)
class GradedChunk:
    """Some conversations of one measurement."""

    measurement: Measurement
    conversations: Sequence[Conversation]
    system: str | None
    max_new_tokens: int
    grader: Grader
    prompts: dict[str, GradingPrompt]

    def __len__(self) -> int:
        return len(self.conversations)

    @property
    def title(self) -> str:
        return f"{self.measurement.evaluation}: {self.grader.model.name} grades"

    @property
    def identities(self) -> list[Identity]:
        """By conversation and then by turn."""
        own = self.measurement
        return [own.identity(c.key, turn) for c in self.conversations for turn in range(TURNS)]

    def replied(self, model: LanguageModel) -> list[Row]:
        """Rows without grades: the first turns' replies, and the second turns', which read them.

        Raises: ValueError where a reply does not fit the chat template as an earlier turn.
        """
        decoding = Decoding(self.max_new_tokens, max_rows=len(self))
        first = model.reply([Request(own.turns[0], self.system) for own in self.conversations], decoding)
        histories = [
            ((own.turns[0], model.chat.neutralised(reply)),)
            for own, reply in zip(self.conversations, first, strict=True)
        ]
        second = model.reply(
            [
                Request(own.turns[1], self.system, history)
                for own, history in zip(self.conversations, histories, strict=True)
            ],
            decoding,
        )
        rows = []
        for i, own in enumerate(self.conversations):
            rows.append(self._row(model, own, 0, first[i], ()))
            rows.append(self._row(model, own, 1, second[i], histories[i]))
        return rows

    def judged(self, rows: Sequence[Row]) -> list[Row]:
        """The rows with grades, where the judge could be asked.

        Raises: ConnectionError outside `fit` where it could be asked for none of them: the replies are on
            disk, and the same command goes on there.
        """
        own = self.measurement
        found = list(rows)
        lacking = [i for i, row in enumerate(found) if own.judge not in row.verdicts]
        said = {c.key: [row.reply for row in rows if row.example == c.key] for c in self.conversations}
        by_key = {c.key: c for c in self.conversations}
        asked = [
            self.grader.request(self.prompts, by_key[row.example], said[row.example][: row.repetition + 1])
            for row in (found[i] for i in lacking)
        ]
        answers = self.grader.answers(asked) if asked else []
        failed = [answer for answer in answers if isinstance(answer, Unanswered)]
        # Training goes on without its grades; whoever tests wants them, and can ask again.
        if failed and len(failed) == len(answers) and own.stage != "fit":
            raise ConnectionError(
                f"{own.judge}: none of {len(answers)} gradings; {failed[0].reason}; the replies are on disk, "
                "the same command grades them"
            )
        if failed:
            log.warning(
                "%s: %d of %d gradings failed: %s", own.judge, len(failed), len(answers), failed[0].reason
            )
        for i, answer in zip(lacking, answers, strict=True):
            if isinstance(answer, str):
                score = grade(answer)
                entry: dict[str, bool | float | None] = {"verdict": score is not None, "score": score}
                found[i] = replace(found[i], verdicts={**found[i].verdicts, own.judge: entry})
        return found

    def _row(
        self,
        model: LanguageModel,
        conversation: Conversation,
        turn: int,
        reply: str,
        history: Sequence[tuple[str, str]],
    ) -> Row:
        row = self.measurement.row(
            conversation.key,
            conversation.turns[turn],
            conversation.references[turn] if conversation.references is not None else "",
            system=self.system,
            category=conversation.category,
            history=[list(exchange) for exchange in history],
            reply=reply,
            flags=_signs(
                model,
                Request(conversation.turns[turn], self.system, tuple(history)),
                reply,
                self.max_new_tokens,
            ),
        )
        return replace(row, repetition=turn)


def _signs(model: LanguageModel, asked: Request, reply: str, max_new_tokens: int) -> dict[str, bool]:
    """Whether the reply is as long as allowed, and whether it goes beyond what the model was made to read."""
    # No tokenizer takes half a surrogate pair.
    (ids,) = model.chat.encode_batch([reply.encode(errors="replace").decode()])
    before = len(model.chat.prompt(asked.text, asked.system, asked.history).ids)
    window = text_config(model.module).max_position_embeddings
    return {"cut": len(ids) > max_new_tokens - CUT_WITHIN, "beyond_window": before + len(ids) > window}
