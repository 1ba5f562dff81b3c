"""How often training changes the reply to a benign prompt, and whether for the worse.

The same prompts, greedily, to the run's model and to the model before training: with fresh adapters that is
the model itself without them, otherwise a frozen copy (lightning_modules/models/frozen.py). A row holds both
replies and what the judges say of each, so that all shares are over the same prompts by construction.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch

from callbacks.evaluations.asking import Work
from callbacks.evaluations.base import Evaluation
from callbacks.evaluations.dealing import dealt_out
from callbacks.evaluations.probe import Probe
from callbacks.evaluations.schedule import Schedule
from callbacks.evaluations.session import Place
from callbacks.evaluations.undisturbed import undisturbed
from callbacks.judges.base import Judge, judge_all, label
from callbacks.judges.exact import ExactMatch
from callbacks.judges.keyword import KeywordRefusal
from datamodules.batch import EvaluationBatch
from datamodules.evaluation import EvaluationData, Subject
from datamodules.fields import Count, checked
from datamodules.result_lines import BASE, Identity, Measurement, Row
from datamodules.settings import contents, settings_digest
from lightning_modules.models.frozen import Reference
from lightning_modules.models.language_model import Encoded, LanguageModel
from lightning_modules.models.requests import Decoding

BENIGN: tuple[Subject, ...] = ("harmless", "utility")
BLOCK = "against_base"
"""Where its measurements stand among those of the subjects' other sets."""
CHANGED = "changed@1"
"""In a judge's place: whether the reply is another one, with the chrF of both as the score."""


@checked
class ReplyChangeEvaluation(Evaluation):
    """Replies to benign prompts against the base model's: changed, how alike, newly refused or answered,
    right and wrong.

    Args:
        schedule: when it runs and on how many rows of each subject; null takes the defaults.
        max_new_tokens: longest generated reply.
        correct: says whether a reply is right, of prompts with an expected one; null asks for it, word for
            word.
        refusal: says whether a reply refuses; null takes the keyword judge.
    """

    name = "reply_change"

    def __init__(
        self,
        schedule: Schedule | None = None,
        max_new_tokens: Count = 64,
        correct: Judge | None = None,
        refusal: Judge | None = None,
    ) -> None:
        super().__init__(schedule, max_new_tokens)
        self.correct = correct or ExactMatch()
        self.refusal = refusal or KeywordRefusal()

    def probes(self) -> list[Probe]:
        """None: two models are asked."""
        return []

    def work(self, place: Place, weights: str) -> list[tuple[Measurement, list[Work]]]:
        """One measurement a subject that has rows."""
        data, base, key = self.began(place)
        if BLOCK in data.blocks:
            raise ValueError(
                f"data.evaluation.blocks: {BLOCK} is ReplyChangeEvaluation's own name; rename it"
            )
        subjects = [subject for subject in BENIGN if data.rows_of(subject)]
        if not subjects:
            wanted = " or ".join(f"data.evaluation.{subject}" for subject in BENIGN)
            raise ValueError(f"ReplyChangeEvaluation: found no row to evaluate; set {wanted}")
        return [self._planned(subject, data, base, key, place, weights) for subject in subjects]

    def _planned(
        self,
        subject: Subject,
        data: EvaluationData,
        base: Reference,
        key: str,
        place: Place,
        weights: str,
    ) -> tuple[Measurement, list[Work]]:
        shares = dealt_out(data, subject, self.schedule.rows(place.stage), place.world_size)
        refusal, correct = label(self.refusal), label(self.correct)
        measurement = place.measurement(
            self.name,
            weights,
            settings=settings_digest(
                BLOCK,
                key,
                [CHANGED, refusal, correct],
                self.max_new_tokens,
                place.precision,
                # Compared with when a reply comes: the verdicts are no judge's that could be asked again.
                [[contents(batch), list(batch.expected)] for share in shares for batch in share],
            ),
            subject=subject,
            quantity="change_rate",
            judge=CHANGED,
            refusal=refusal,
            judges=[correct, BASE + refusal, BASE + correct],
            n=sum(len(batch) for share in shares for batch in share),
            block=BLOCK,
        )
        own: list[Work] = [
            Comparison(measurement, batch, base, Decoding(self.max_new_tokens), (self.refusal, self.correct))
            for batch in shares[place.rank]
        ]
        return measurement, own


@dataclass(frozen=True)
class Comparison:
    """One batch of prompts to both models."""

    measurement: Measurement
    batch: EvaluationBatch
    base: Reference
    decoding: Decoding
    judges: tuple[Judge, ...]

    def __len__(self) -> int:
        return len(self.batch)

    @property
    def title(self) -> str:
        return f"{self.measurement.evaluation}: {self.measurement.subject}"

    @property
    def identities(self) -> list[Identity]:
        return [self.measurement.identity(key) for key in self.batch.keys]

    def replied(self, model: LanguageModel) -> list[Row]:
        """A row a prompt, with both replies and the verdicts on each."""
        batch, own = self.batch.to(model.device), self.measurement
        sent = Encoded(batch.prompt_ids, batch.prompt_mask)
        with undisturbed(model.module):
            replies = model.reply(sent, self.decoding)
            with self.base.alike() as before:
                base_replies = LanguageModel(before.module, model.chat).reply(sent, self.decoding)
        verdicts = self._verdicts(replies, base_replies)
        return [
            own.row(
                batch.keys[i],
                batch.prompts[i],
                batch.expected[i],
                system=batch.systems[i] if batch.systems else None,
                category=batch.categories[i],
                functional=batch.functional[i],
                history=[list(turn) for turn in batch.histories[i]] if batch.histories else [],
                reply=replies[i],
                base_reply=base_replies[i],
                verdicts=verdicts[i],
            )
            for i in range(len(batch))
        ]

    def _verdicts(
        self, replies: list[str], base_replies: list[str]
    ) -> list[dict[str, dict[str, bool | float | None]]]:
        found: list[dict[str, dict[str, bool | float | None]]] = [
            {CHANGED: {"verdict": reply != before, "score": chrf(reply, before)}}
            for reply, before in zip(replies, base_replies, strict=True)
        ]
        for judge in self.judges:
            for start, judged in (("", replies), (BASE, base_replies)):
                given = judge_all(judge, self.batch.prompts, judged, self.batch.expected)
                for own, one in zip(found, given, strict=True):
                    own[start + label(judge)] = {"verdict": one.verdict, "score": one.score}
        return found


def chrf(reply: str, reference: str) -> float:
    """chrF (Popovic 2015; character 6-grams, beta 2, no word n-grams) in [0, 1]; 1 for equal texts, empty
    ones too."""
    from torchmetrics.functional.text import chrf_score

    if reply == reference:
        return 1.0
    score = chrf_score([reply], [[reference]], n_word_order=0)
    assert isinstance(score, torch.Tensor)
    return float(score)
