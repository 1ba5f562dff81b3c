"""Projected gradient descent on prompt embeddings: the inner attack of CAT and CAPO (arXiv 2405.15589, eq. 2)
and FGSM.

    delta_0 = 0 or random;  delta_{i+1} = Pi_eps( delta_i + alpha step(grad_delta CE(y_hat | x + delta_i)) )

One step of size epsilon is FGSM. The perturbation and its update are fp32 whatever the model's dtype.
"""

from __future__ import annotations

from collections.abc import Callable
from copy import copy
from dataclasses import dataclass
from typing import Literal

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from datamodules.batch import AdversarialBatch
from datamodules.fields import Count, Positive, checked
from lightning_modules.attacks.base import AttackedPrompt, StopLoss, example_rngs, require_gradients
from lightning_modules.attacks.embedding.balls import BALLS, Ball
from lightning_modules.attacks.ledger import Ledger, PointLedger
from lightning_modules.models.embeddings import mean_embedding_norm
from lightning_modules.models.language_model import LanguageModel
from lightning_modules.models.likelihood import mean_cross_entropy
from lightning_modules.models.packed import PackedRows
from lightning_modules.models.reply import Reply

StepRule = Literal["sign", "l2", "adam"]
StepUnit = Literal["radius", "embedding_norm", "absolute"]
RadiusUnit = Literal["embedding_norm", "absolute"]

TargetLoss = Callable[[Float[Tensor, "active token dim"], Int[Tensor, " active"]], Float[Tensor, " active"]]
"""Perturbations of the examples that are still attacked, and which those are -> their attacked losses."""


@dataclass(frozen=True)
class Descent:
    """What a descent found: perturbations, their distance in units of the radius, and the account."""

    delta: Float[Tensor, "batch token dim"]
    distance: Float[Tensor, " batch"]
    ledger: Ledger


@checked
class EmbeddingPGD:
    """PGD within a per-token ball around the embeddings of the attackable positions.

    Args:
        epsilon: radius of the ball in `radius_unit`; null is no ball at all (unconstrained).
        radius_unit: `embedding_norm` counts in multiples of the mean embedding norm the decoder receives,
            `absolute` does not.
        ball: `l2` (per token) or `linf` (per coordinate).
        num_steps: number of gradient steps.
        step_size: size of one step in `step_unit`.
        step_unit: `radius` (fractions of epsilon), `embedding_norm` or `absolute`.
        step_rule: `sign` moves every coordinate by the step size, so a step's l2 length is step_size *
            sqrt(D); `l2` moves each token by the step size; `adam` uses the step size as learning rate.
        random_start: start at a random point of the ball instead of at zero.
        keep: `best` returns each example's best iterate and evaluates the last one too (num_steps + 1 forward
            passes); `last` returns the last iterate (num_steps forward passes), as the authors' training
            does.
        stop_loss: an example whose loss falls below this many nats per token leaves the batch; null never.
    """

    def __init__(
        self,
        epsilon: Positive | None = 0.05,
        num_steps: Count = 10,
        step_size: Positive = 0.25,
        step_unit: StepUnit = "radius",
        step_rule: StepRule = "l2",
        radius_unit: RadiusUnit = "embedding_norm",
        ball: Literal["l2", "linf"] = "l2",
        random_start: bool = False,
        keep: Literal["best", "last"] = "best",
        stop_loss: StopLoss | None = None,
    ) -> None:
        name = type(self).__name__
        if epsilon is None and step_unit == "radius":
            raise ValueError(
                f"{name}.step_unit: expected 'embedding_norm' or 'absolute' without a radius, got "
                "'radius'; set step_unit or epsilon"
            )
        if epsilon is None and random_start:
            raise ValueError(
                f"{name}.random_start: expected false without a radius, got true; set epsilon or "
                "start at zero"
            )
        self.epsilon = epsilon
        self.num_steps = num_steps
        self.step_size = step_size
        self.step_unit = step_unit
        self.step_rule = step_rule
        self.radius_unit = radius_unit
        self.ball: Ball = BALLS[ball]
        self.random_start = random_start
        self.keep = keep
        self.stop_loss = stop_loss

    @torch.enable_grad()
    def __call__(
        self, model: LanguageModel, batch: AdversarialBatch, rng: torch.Generator | None = None
    ) -> AttackedPrompt:
        """Attack the batch towards its harmful targets. Raises: RuntimeError in inference mode."""
        return self._attack(model, batch, rng)

    @torch.enable_grad()
    def away(
        self, model: LanguageModel, batch: AdversarialBatch, rng: torch.Generator | None = None
    ) -> AttackedPrompt:
        """Attack the batch away from its targets, which are right answers here: the untargeted attack of
        Madry et al. (2018, eq. 2.1). The losses of the result are -CE, which is what is minimised; a
        `stop_loss`, which is of the other aim, does not apply.

        Raises: RuntimeError in inference mode.
        """
        own = copy(self)
        own.stop_loss = None
        return own._attack(model, batch, rng, away=True)

    def _attack(
        self,
        model: LanguageModel,
        batch: AdversarialBatch,
        rng: torch.Generator | None,
        away: bool = False,
    ) -> AttackedPrompt:
        require_gradients(self)
        radius, step = self.lengths(model)
        with model.frozen():
            lengths = batch.lengths or batch.counted()
            reply = Reply(batch.harmful_ids, batch.harmful_mask, tuple(own.harmful for own in lengths))
            prompts = [own.prompt for own in lengths]
            fixed = min(own.fixed for own in lengths)
            rows = PackedRows(model, batch.prompt_ids, batch.prompt_mask, reply, prompts, fixed)

            def loss(
                point: Float[Tensor, "active place dim"], active: Int[Tensor, " active"]
            ) -> Float[Tensor, " active"]:
                # Where nobody has left, the rows are all of them in their order.
                own = None if len(active) == len(batch) else active
                clean, mask = rows.clean, batch.harmful_mask
                if own is not None:
                    clean, mask = clean[own], mask[own]
                found = mean_cross_entropy(rows.log_probs(clean + point, own), mask)
                return -found if away else found

            delta = self._start(rows, batch, radius, rng)
            found = self.descend(loss, delta, rows.placed(batch.attackable_mask)[..., None], radius, step)
        return found.ledger.attacked(
            batch.prompt_ids, batch.prompt_mask, rows.returned(found.delta), found.distance
        )

    def descend(
        self,
        target: TargetLoss,
        delta: Float[Tensor, "batch token dim"],
        allowed: Bool[Tensor, "batch token 1"],
        radius: Float[Tensor, ""] | None,
        step: Float[Tensor, ""],
        num_replies: int = 1,
    ) -> Descent:
        """The projected descent itself, whatever delta is added to.

        Args:
            target: what is minimised.
            delta: the start, in fp32.
            allowed: where delta may differ from zero.
            radius: absolute radius per token, None for no ball.
            step: absolute step length.
            num_replies: replies that `target` scores: each counts as a pass.
        """
        ledger = PointLedger(delta)
        moments = _Adam(delta) if self.step_rule == "adam" else None
        active = torch.arange(len(delta), device=delta.device)
        for i in range(self.num_steps + (self.keep == "best")):
            differentiate = i < self.num_steps
            point = delta[active].requires_grad_(differentiate)
            with torch.set_grad_enabled(differentiate):
                loss = target(point, active)
            ledger.count_forward(active.repeat(num_replies))
            ledger.record(active, point, loss)
            if not differentiate:
                break
            if self.stop_loss is not None and not (loss >= self.stop_loss).any():
                break
            # `grad` writes to no weight: a gradient left there would train towards the target. Of the sum, so
            # that an example's gradient does not depend on how many batch-mates it has.
            (gradient,) = torch.autograd.grad(loss.sum(), point)
            if self.stop_loss is not None:
                going = loss.detach() >= self.stop_loss
                active, gradient, point = active[going], gradient[going], point[going]
            # Before anybody reads it: whether it is zero is a question about the attackable positions alone.
            gradient = gradient * allowed[active]
            ledger.count_backward(active.repeat(num_replies), gradient.repeat(num_replies, 1, 1))
            moved = point.detach() + step * self._direction(gradient, moments, active)
            delta[active] = (moved if radius is None else self.ball.project(moved, radius)) * allowed[active]
        final = ledger.best if self.keep == "best" else delta
        distance = self.ball.size(final).amax(1) / (radius if radius is not None else torch.nan)
        return Descent(final, distance, ledger)

    def lengths(self, model: LanguageModel) -> tuple[Float[Tensor, ""] | None, Float[Tensor, ""]]:
        """Absolute radius (None without a ball) and absolute step length."""
        rho = mean_embedding_norm(model)
        units = {"embedding_norm": rho, "absolute": torch.ones_like(rho)}
        radius = None if self.epsilon is None else self.epsilon * units[self.radius_unit]
        if self.step_unit == "radius":
            assert radius is not None
            return radius, self.step_size * radius
        return radius, self.step_size * units[self.step_unit]

    def _start(
        self,
        rows: PackedRows,
        batch: AdversarialBatch,
        radius: Float[Tensor, ""] | None,
        rng: torch.Generator | None,
    ) -> Float[Tensor, "batch place dim"]:
        wide = torch.promote_types(rows.clean.dtype, torch.float32)
        if not self.random_start:
            return torch.zeros_like(rows.clean, dtype=wide)
        assert radius is not None
        size = (*batch.prompt_ids.shape, rows.clean.shape[-1])
        delta = torch.zeros(size, dtype=wide, device=rows.clean.device)
        for row, own in enumerate(example_rngs(batch, rng)):
            where = batch.attackable_mask[row]
            noise = self.ball.random_point((int(where.sum()), size[-1]), radius, own)
            delta[row, where] = noise.to(delta)
        return rows.placed(delta)

    def _direction(
        self,
        gradient: Float[Tensor, "active token dim"],
        moments: _Adam | None,
        active: Int[Tensor, " active"],
    ) -> Float[Tensor, "active token dim"]:
        if moments is not None:
            return moments.direction(gradient, active)
        return -gradient.sign() if self.step_rule == "sign" else BALLS["l2"].steepest_descent(gradient)


class _Adam:
    """Adam's direction per coordinate (Kingma and Ba 2015, algorithm 1), with the step size left to the
    caller."""

    def __init__(
        self,
        like: Float[Tensor, "batch token dim"],
        beta1: float = 0.9,
        beta2: float = 0.999,
        eps: float = 1e-12,
    ) -> None:
        # eps is far below the usual 1e-8: gradients shrink with the loss, the steps are not to.
        self.beta1, self.beta2, self.eps = beta1, beta2, eps
        self.first, self.second, self.count = torch.zeros_like(like), torch.zeros_like(like), 0

    def direction(
        self, gradient: Float[Tensor, "active token dim"], active: Int[Tensor, " active"]
    ) -> Float[Tensor, "active token dim"]:
        # One count for all: an example that has left never comes back.
        self.count += 1
        self.first[active] = self.beta1 * self.first[active] + (1 - self.beta1) * gradient
        self.second[active] = self.beta2 * self.second[active] + (1 - self.beta2) * gradient**2
        mean = self.first[active] / (1 - self.beta1**self.count)
        scale = (self.second[active] / (1 - self.beta2**self.count)).sqrt()
        return -mean / (scale + self.eps)


def target_loss(
    model: LanguageModel,
    batch: AdversarialBatch,
    embeds: Float[Tensor, "active prompt dim"],
    active: Int[Tensor, " active"] | None,
) -> Float[Tensor, " active"]:
    """CE of the harmful target for the active examples (None: all), whose prompts are given as embeddings."""
    lengths = tuple(own.harmful for own in batch.lengths)
    reply, prompts = Reply(batch.harmful_ids, batch.harmful_mask, lengths), batch.prompt_mask
    # Where nobody has left, the rows are all of them in their order.
    if active is not None and len(active) < len(batch):
        reply, prompts = Reply(reply.ids[active], reply.mask[active]), prompts[active]
    (log_probs,) = model.reply_log_probs(embeds, prompts, reply)
    return mean_cross_entropy(log_probs, reply.mask)
