"""Continuous adversarial training: the inner attack runs inside `training_step` (arXiv 2405.15589, eq. 1).

min_theta  E[ objective( safe reply, harmful reply | x + delta* ) ] + E[ utility ] + further terms,   delta* =
attack(x, harmful reply)

A method is attack x objective x terms x data: nothing here knows any by name.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from tqdm.auto import tqdm

from datamodules.batch import AdversarialBatch, TrainingBatch
from datamodules.fields import NonNegativeInt, checked
from lightning_modules.attacks.base import Attack, AttackedPrompt, load_attack_state, share, state_of
from lightning_modules.base import FineTuning, OptimizerConfig
from lightning_modules.defences.base import Defence
from lightning_modules.losses.base import LossTerms, Objective, ReferenceScores, Step, Term
from lightning_modules.models.agreement import Agreement
from lightning_modules.models.frozen import Reference
from lightning_modules.models.loading import ModelConfig
from lightning_modules.models.passes import PassCounter
from lightning_modules.pretrained import step_seed
from lightning_modules.reference_scores import ReferenceTable
from lightning_modules.scoring import score_replies, score_utility


@checked
class AdversarialFineTuning(FineTuning):
    """Fine-tuning under attack: any attack, any objective, any further terms.

    Args:
        base: the model to fine-tune.
        attack: the inner attack; NoAttack for the no-attack ablation.
        objective: the outer loss on the replies' likelihoods; null where the terms say it all.
        terms: further terms of the loss: regularisers, retain terms, distillation, losses on hidden states.
        optimizer: learning rate and schedule.
        seed: base of every step's own seed; null takes seed_everything's.
        reference_cache: folder of the reference log-probabilities that preference objectives need; runs may
            share one. Null keeps them in the run folder.
        defence: what stands around the model in `validate`, `test` and `predict`; training knows none.
    """

    reference: Reference
    _agree: Agreement

    def __init__(
        self,
        base: ModelConfig,
        attack: Attack,
        objective: Objective | None,
        terms: list[Term] | None = None,
        optimizer: OptimizerConfig | None = None,
        seed: NonNegativeInt | None = None,
        reference_cache: str | None = None,
        defence: Defence | None = None,
    ) -> None:
        super().__init__(base, optimizer, seed, defence)
        if objective is None and not terms:
            raise ValueError(
                "model.objective: expected an objective or at least one of model.terms, got neither; "
                "there is nothing to learn"
            )
        self.attack = attack
        self.objective = objective
        self.terms = terms or []
        self.reference_cache = reference_cache
        self._reference_scores: Callable[[AdversarialBatch], ReferenceScores] | None = None
        self._passes = PassCounter()
        self._attacked: AttackedPrompt | None = None
        """Of several micro-batches, those that have had their turn left out."""
        self._told = _Told()
        self._finite: tuple[Tensor, Tensor] | None = None
        """Whether all losses so far were, and the step up to which they were."""

    def configure_model(self) -> None:
        super().configure_model()
        self.reference = Reference(self.language_model, self.base, self.load_seed)

    def on_train_start(self) -> None:
        """Compute or look up the reference log-probabilities. Raises: ValueError where a cached one is not
        this model's."""
        self._attacked, self._told, self._finite = None, _Told(), None
        self._agree = Agreement()
        if self.objective is not None and self.objective.needs_reference:
            self._reference_scores = self._scored_by_reference()

    def _scored_by_reference(self) -> Callable[[AdversarialBatch], ReferenceScores]:
        """What the objective compares with, of every training row."""
        assert self._harmful_batches is not None, "attach() has not been called"
        folder = Path(self.reference_cache or Path(self.trainer.default_root_dir) / "reference")
        table = ReferenceTable(folder, self.reference)
        silent = not self.trainer.is_global_zero or self.trainer.progress_bar_callback is None
        batches = tqdm(
            self._harmful_batches(),
            desc="reference log-probabilities",
            unit=" batches",
            leave=False,
            disable=True if silent else None,
        )
        with self._passes, self.language_model.gathered():
            table.fill(batches, self.device, write=self.trainer.is_global_zero)
            if self.global_step == 0:
                table.check_start(self.language_model, next(self._harmful_batches()).to(self.device))
        return table

    def training_step(self, batch: TrainingBatch, batch_idx: int) -> dict[str, Any]:
        """One micro-batch: attack the harmful prompts, those of the whole step at once, then all losses under
        that perturbation. Raises: ValueError where another process attacks, or logs, something else."""
        # What an attack has found, and its health, is exchanged after it.
        self._agree(self._attacking(batch))
        with self.language_model.gathered():
            attacked = None if batch.adversarial is None else self._perturbed(batch, batch.adversarial)
        # The first step's counter holds what was scored before training began.
        passes, self._passes = self._passes, PassCounter()
        with passes:
            loss, terms = self.language_model.outer_pass(lambda: self._outer_loss(batch, attacked))
        self._note_finite(loss)
        parts = {f"train/{name}": value.mean() for _, term in terms for name, value in term.parts.items()}
        parts = self._told.so_far(self.global_step, {**parts, "train/loss": loss.detach()})
        # Of all processes: one process's mean is another number. Each name is a sum over all of them.
        self._agree(f"losses {', '.join(parts)}")
        self.log(
            "train/loss", parts.pop("train/loss"), on_step=True, prog_bar=True, batch_size=1, sync_dist=True
        )
        self.log_dict(parts, on_step=True, batch_size=1, sync_dist=True)
        return {"loss": loss, "attacked": attacked, "passes": passes}

    def _attacking(self, batch: TrainingBatch) -> str:
        if batch.adversarial is None:
            return "a micro-batch without an attack"
        if batch.attack is None and self._attacked is not None:
            return "a micro-batch attacked before"
        return "an attack"

    def _perturbed(self, batch: TrainingBatch, rows: AdversarialBatch) -> AttackedPrompt:
        """The micro-batch's rows under attack: attacked now, or with an earlier micro-batch of the step."""
        if batch.attack is not None:
            self._attacked = self._attack(batch.attack)
        elif self._attacked is None:
            return self._attack(rows)
        assert self._attacked is not None
        own, size = self._attacked, len(self._attacked.prompt_ids)
        self._attacked = own.select(len(rows), size) if size > len(rows) else None
        return own.select(0, len(rows))

    def _attack(self, rows: AdversarialBatch) -> AttackedPrompt:
        attacked = self.attack(self.language_model, rows, self._rng())
        share(self.attack, self.language_model)
        return attacked

    def _outer_loss(
        self, batch: TrainingBatch, attacked: AttackedPrompt | None
    ) -> tuple[Tensor, list[tuple[float, LossTerms]]]:
        terms = self._losses(batch, attacked)
        return torch.stack([weight * term.loss.mean() for weight, term in terms]).sum(), terms

    def _losses(self, batch: TrainingBatch, attacked: AttackedPrompt | None) -> list[tuple[float, LossTerms]]:
        """The objective on both replies and on the utility rows, then the further terms, each with its
        weight. Raises: ValueError where none is left."""
        terms: list[tuple[float, LossTerms]] = []
        objective, rows, utility = self.objective, batch.adversarial, batch.utility
        if objective is not None and rows is not None and attacked is not None:
            reference = self._reference_scores(rows) if self._reference_scores is not None else None
            scores = score_replies(self.language_model, rows, attacked, reference)
            terms.append((batch.weights[0], objective.adversarial(scores)))
        if objective is not None and utility is not None and objective.weight_utility > 0:
            terms.append((batch.weights[1], objective.utility(*score_utility(self.language_model, utility))))
        step = Step(
            self.language_model,
            self.reference,
            batch,
            attacked,
            self.global_step,
            int(self.trainer.estimated_stepping_batches),
        )
        terms += [(1.0, term(step)) for term in self.terms]
        if not terms:
            raise ValueError(
                "model.objective: no term of the loss uses the data's rows; set "
                "objective.weight_utility or harmful_per_step"
            )
        return terms

    def _note_finite(self, loss: Tensor) -> None:
        """Remember the first step whose loss was not finite; it is read where the logs are. Raises:
        FloatingPointError."""
        finite = torch.isfinite(loss.detach())
        if self._finite is None:
            self._finite = finite, torch.full_like(finite, self.global_step, dtype=torch.float32)
        else:
            before, step = self._finite
            self._finite = before & finite, torch.where(before, float(self.global_step), step)
        if self.trainer._logger_connector.should_update_logs:
            self._require_finite()

    def _require_finite(self) -> None:
        """Raises: FloatingPointError where a loss since training began was not finite; the host waits."""
        if self._finite is not None and not self._finite[0]:
            raise FloatingPointError(
                f"the loss is not finite at step {int(self._finite[1])}; lower optimizer.lr, or set a "
                "cutoff_away"
            )

    def on_train_end(self) -> None:
        self._require_finite()

    def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Beside the weights: what the attack has learned or collected. Raises: FloatingPointError on every
        process rather than save after a loss without a number on any."""
        if not self._all_processes(self._finite is None or bool(self._finite[0])):
            self._require_finite()
            raise FloatingPointError(
                f"the loss of another process is not finite by step {self.global_step}: no checkpoint is "
                "written; lower optimizer.lr, or set a cutoff_away"
            )
        super().on_save_checkpoint(checkpoint)
        checkpoint["attack"] = state_of(self.attack)

    def on_load_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        super().on_load_checkpoint(checkpoint)
        load_attack_state(self.attack, checkpoint.get("attack"))

    def _rng(self) -> torch.Generator:
        """Of the optimiser step, however it is divided, on all processes alike: an example's noise depends on
        nothing else, and what is drawn once for a batch (Mixture's attack) is the same for all of it."""
        return torch.Generator().manual_seed(step_seed(self.seed, self.global_step, 0))


class _Told:
    """Means over a step's micro-batches so far, of those that had the number: some may lack a stream."""

    def __init__(self) -> None:
        self._step = -1
        self._seen: dict[str, list[Tensor]] = {}

    def so_far(self, step: int, values: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """Enter a micro-batch of this step."""
        if step != self._step:
            self._step, self._seen = step, {}
        for name, value in values.items():
            self._seen.setdefault(name, []).append(value)
        return {name: torch.stack(seen).mean() for name, seen in self._seen.items()}
