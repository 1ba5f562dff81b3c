"""Perturbation balls, per token: where delta may lie, which way is steepest, and a random point to start
from."""

from __future__ import annotations

from typing import Protocol

import torch
from jaxtyping import Float
from torch import Tensor


class Ball(Protocol):
    """A set of allowed perturbations; `radius` is absolute."""

    def project(
        self, delta: Float[Tensor, "*token dim"], radius: Float[Tensor, ""]
    ) -> Float[Tensor, "*token dim"]: ...

    def steepest_descent(self, gradient: Float[Tensor, "*token dim"]) -> Float[Tensor, "*token dim"]:
        """Unit-size direction (in this ball's norm) along which the loss falls fastest."""
        ...

    def size(self, delta: Float[Tensor, "*token dim"]) -> Float[Tensor, "*token"]:
        """Norm of each token's perturbation."""
        ...

    def random_point(
        self, shape: tuple[int, ...], radius: Float[Tensor, ""], rng: torch.Generator
    ) -> Float[Tensor, "*token dim"]: ...


class L2Ball:
    """Euclidean ball around each token's embedding: ||delta_t||_2 <= radius."""

    def project(
        self, delta: Float[Tensor, "*token dim"], radius: Float[Tensor, ""]
    ) -> Float[Tensor, "*token dim"]:
        norm = self.size(delta)[..., None]
        return torch.where(norm > radius, delta * (radius / norm.clamp_min(_tiny(norm))), delta)

    def steepest_descent(self, gradient: Float[Tensor, "*token dim"]) -> Float[Tensor, "*token dim"]:
        """-g / ||g||_2; 0 where the gradient is 0."""
        return -gradient / self.size(gradient)[..., None].clamp_min(_tiny(gradient))

    def size(self, delta: Float[Tensor, "*token dim"]) -> Float[Tensor, "*token"]:
        return delta.norm(dim=-1)

    def random_point(
        self, shape: tuple[int, ...], radius: Float[Tensor, ""], rng: torch.Generator
    ) -> Float[Tensor, "*token dim"]:
        """Uniform in the ball: a Gaussian direction and a radius distributed as u^(1/D)."""
        direction = torch.randn(shape, generator=rng)
        direction /= direction.norm(dim=-1, keepdim=True)
        length = torch.rand(shape[:-1], generator=rng) ** (1.0 / shape[-1])
        # Rounding may put a point near the surface just outside.
        return self.project(direction * length[..., None] * radius.cpu(), radius.cpu())


class LinfBall:
    """Box around each token's embedding: max_d |delta_td| <= radius."""

    def project(
        self, delta: Float[Tensor, "*token dim"], radius: Float[Tensor, ""]
    ) -> Float[Tensor, "*token dim"]:
        return torch.minimum(torch.maximum(delta, -radius), radius)

    def steepest_descent(self, gradient: Float[Tensor, "*token dim"]) -> Float[Tensor, "*token dim"]:
        return -gradient.sign()

    def size(self, delta: Float[Tensor, "*token dim"]) -> Float[Tensor, "*token"]:
        return delta.abs().amax(dim=-1)

    def random_point(
        self, shape: tuple[int, ...], radius: Float[Tensor, ""], rng: torch.Generator
    ) -> Float[Tensor, "*token dim"]:
        return (2.0 * torch.rand(shape, generator=rng) - 1.0) * radius.cpu()


BALLS: dict[str, Ball] = {"l2": L2Ball(), "linf": LinfBall()}


def _tiny(x: Tensor) -> float:
    return torch.finfo(x.dtype).tiny
