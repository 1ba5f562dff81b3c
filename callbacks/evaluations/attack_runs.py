"""One attack on one batch of behaviours: attack, generate, judge, store; finished batches are read back
instead of repeated."""

from __future__ import annotations

import math
import time
from collections.abc import Sequence
from dataclasses import dataclass, replace

import torch

from callbacks.evaluations.base import EvaluationRun
from callbacks.health import example_flags
from callbacks.judges.base import Judge, judge_all, label
from datamodules.batch import EvaluationBatch
from datamodules.results import AttackRow, ResultsStore
from lightning_modules.attacks.base import Attack, AttackedPrompt


@dataclass
class AttackRunner:
    """Runs attacks for one evaluation and keeps its rows.

    Args:
        run: the evaluation's model and data.
        store: the run folder's rows.
        judges: every judge whose verdict is wanted.
        model: fingerprint of the weights.
        seed: base of the attacks' generators; a restart adds its number.
    """

    run: EvaluationRun
    store: ResultsStore
    judges: Sequence[Judge]
    model: str
    seed: int

    def rows(
        self, name: str, attack: Attack, settings: str, batch: EvaluationBatch, restart: int
    ) -> list[AttackRow]:
        """The batch's rows with all verdicts; the attack runs only if a row is missing.

        A batch is attacked whole or not at all: with other batch-mates, rounding could send a discrete search
        another way.
        """
        stored = [self.store.get((self.model, name, settings, key, restart)) for key in batch.keys]
        rows = [row for row in stored if row is not None]
        if len(rows) < len(batch):
            rows = self._attack(name, attack, settings, batch, restart)
        judged = self._judged(rows)
        if judged != stored:
            self.store.add(judged)
        return judged

    def _attack(
        self, name: str, attack: Attack, settings: str, batch: EvaluationBatch, restart: int
    ) -> list[AttackRow]:
        assert batch.adversarial is not None
        began = time.perf_counter()
        attacked: AttackedPrompt = attack(
            self.run.model, batch.adversarial, torch.Generator().manual_seed(self.seed + restart)
        )
        seconds = (time.perf_counter() - began) / len(batch)
        with torch.no_grad(), attacked.applied(self.run.model) as embeds:
            completions = self.run.replies(embeds, attacked.prompt_mask, attacked.forced)
        flags = example_flags(attacked)
        rows = []
        for i, key in enumerate(batch.keys):
            curve = attacked.loss_curve[:, i].tolist()
            queries = 0 if attacked.queries is None else int(attacked.queries[i])
            rows.append(
                AttackRow(
                    model=self.model,
                    attack=name,
                    settings=settings,
                    example=key,
                    restart=restart,
                    step=self.run.trainer.global_step,
                    prompt=batch.prompts[i],
                    target=batch.expected[i],
                    category=batch.categories[i],
                    functional=batch.functional[i],
                    attacked=attacked.texts[i] if attacked.texts else None,
                    history=[list(turn) for turn in attacked.histories[i]] if attacked.histories else [],
                    prefill=self.run.data.chat.decode(list(attacked.forced[i])) if attacked.forced else "",
                    completion=completions[i],
                    loss_curve=[None if math.isnan(loss) else loss for loss in curve],
                    steps=sum(not math.isnan(loss) for loss in curve),
                    forward_passes=int(attacked.forward_passes[i]),
                    backward_passes=int(attacked.backward_passes[i]),
                    queries=queries,
                    seconds=seconds,
                    flags={flag: bool(raised[i]) for flag, raised in flags.items()},
                )
            )
        return rows

    def _judged(self, rows: list[AttackRow]) -> list[AttackRow]:
        """The rows with the verdicts that they lacked."""
        for judge in self.judges:
            key = label(judge)
            open_ = [i for i, row in enumerate(rows) if key not in row.verdicts]
            if not open_:
                continue
            chosen = [rows[i] for i in open_]
            verdicts = judge_all(
                judge, [r.prompt for r in chosen], [r.completion for r in chosen], [r.target for r in chosen]
            )
            rows = list(rows)
            for i, judgement in zip(open_, verdicts, strict=True):
                entry = {"verdict": judgement.verdict, "score": judgement.score}
                rows[i] = replace(rows[i], verdicts={**rows[i].verdicts, key: entry})
        return rows
