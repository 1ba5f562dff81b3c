"""How far training has moved the refusal direction: turned, lengthened, spread, layer by layer
(lightning_modules/models/direction_change.py).

A row is a layer; its scores are the change there. Inside `fit` with `every_n_steps` the rows tell it along
the training's checkpoints.
"""

from __future__ import annotations

import math
from dataclasses import asdict, dataclass

from callbacks.evaluations.asking import Work
from callbacks.evaluations.base import Evaluation
from callbacks.evaluations.dealing import dealt_out
from callbacks.evaluations.probe import Probe
from callbacks.evaluations.schedule import Schedule
from callbacks.evaluations.session import Place
from callbacks.evaluations.undisturbed import undisturbed
from callbacks.report.directions import MEAN
from datamodules.batch import EvaluationBatch
from datamodules.evaluation import Subject
from datamodules.fields import checked
from datamodules.result_lines import Identity, Measurement, Row
from datamodules.settings import contents, settings_digest
from lightning_modules.defences.base import requests_of
from lightning_modules.models.direction_change import Change, changes, last_states
from lightning_modules.models.frozen import Reference
from lightning_modules.models.hidden_states import num_layers
from lightning_modules.models.language_model import LanguageModel, encoded

DIRECTION = "refusal_direction@1"
"""In a judge's place; its score is the cosine to the direction before training."""
SUBJECTS: tuple[Subject, Subject] = ("harmful", "harmless")


@checked
class DirectionEvaluation(Evaluation):
    """The run's refusal direction against that of the model before training.

    Args:
        schedule: when it runs and on how many requests of each kind; null takes the defaults.
    """

    name = "direction"

    def __init__(self, schedule: Schedule | None = None) -> None:
        super().__init__(schedule)

    def probes(self) -> list[Probe]:
        """None: nothing is replied."""
        return []

    def work(self, place: Place, weights: str) -> list[tuple[Measurement, list[Work]]]:
        """One measurement: every process reads all requests, of which a direction is, and writes some layers'
        rows. Raises: ValueError without harmful and harmless ones."""
        data, base, key = self.began(place)
        if not all(data.rows_of(subject) for subject in SUBJECTS):
            raise ValueError(
                "DirectionEvaluation: found no requests of both kinds; set data.evaluation.harmful and "
                "data.evaluation.harmless"
            )
        rows = self.schedule.rows(place.stage)
        batches = {subject: dealt_out(data, subject, rows, 1)[0] for subject in SUBJECTS}
        layers = num_layers(place.model)
        measurement = place.measurement(
            self.name,
            weights,
            settings=settings_digest(
                DIRECTION,
                key,
                place.precision,
                [contents(batch) for subject in SUBJECTS for batch in batches[subject]],
            ),
            subject="harmful",
            quantity="direction",
            judge=DIRECTION,
            n=layers + 1,
            block=self.name,
        )
        names = [*(f"layer {layer:03d}" for layer in range(layers)), MEAN][place.rank :: place.world_size]
        own = Directions(measurement, batches["harmful"], batches["harmless"], base, names)
        return [(measurement, [own])]


@dataclass(frozen=True)
class Directions:
    """All requests, read by both models."""

    measurement: Measurement
    harmful: list[EvaluationBatch]
    harmless: list[EvaluationBatch]
    base: Reference
    names: list[str]
    """Of this process's rows: layers, counted from 0, and their mean."""

    def __len__(self) -> int:
        return len(self.names)

    @property
    def title(self) -> str:
        return f"{self.measurement.evaluation}: {self.measurement.subject}"

    @property
    def identities(self) -> list[Identity]:
        return [self.measurement.identity(name) for name in self.names]

    def replied(self, model: LanguageModel) -> list[Row]:
        """A row a layer, and their mean's."""
        prompts = [
            encoded(model, [request for batch in batches for request in requests_of(batch)])
            for batches in (self.harmful, self.harmless)
        ]
        with undisturbed(model.module):
            after = last_states(model, *prompts)
            with self.base.alike() as before:
                found = changes(last_states(before, *prompts), after)
        every = {f"layer {layer:03d}": own for layer, own in enumerate(found[:-1])} | {MEAN: found[-1]}
        return [self._row(name, every[name]) for name in self.names]

    def _row(self, name: str, own: Change) -> Row:
        scores = {DIRECTION: own.cosine, **{f"{key}@1": value for key, value in asdict(own).items()}}
        verdicts: dict[str, dict[str, bool | float | None]] = {
            key: {"verdict": False, "score": value if math.isfinite(value) else None}
            for key, value in scores.items()
        }
        sizes = {
            subject: sum(map(len, batches))
            for subject, batches in zip(SUBJECTS, (self.harmful, self.harmless), strict=True)
        }
        return self.measurement.row(name, name, "", verdicts=verdicts, counts=sizes)
