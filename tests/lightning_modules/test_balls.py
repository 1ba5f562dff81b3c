"""Projections and steps by property tests."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from lightning_modules.attacks.embedding.balls import BALLS

points = st.lists(st.floats(-1e3, 1e3, width=32), min_size=12, max_size=12).map(
    lambda v: torch.tensor(v).view(3, 4)
)
radii = st.floats(1e-3, 1e2).map(torch.tensor)
names = st.sampled_from(sorted(BALLS))


@given(names, points, radii)
@settings(deadline=None)
def test_projection_lands_inside_and_keeps_what_is_inside(
    name: str, point: torch.Tensor, radius: torch.Tensor
) -> None:
    ball = BALLS[name]
    projected = ball.project(point, radius)
    assert (ball.size(projected) <= radius * (1 + 1e-6)).all()
    inside = ball.size(point) <= radius
    assert torch.equal(projected[inside], point[inside])
    torch.testing.assert_close(ball.project(projected, radius), projected)


@given(names, points, points, radii)
@settings(deadline=None)
def test_projection_is_the_nearest_point(
    name: str, point: torch.Tensor, other: torch.Tensor, radius: torch.Tensor
) -> None:
    # For a convex set, <x - Px, y - Px> <= 0 for every y inside (per token for l2, over all coordinates for
    # the box).
    ball = BALLS[name]
    projected, inside = ball.project(point, radius).double(), ball.project(other, radius).double()
    product = ((point.double() - projected) * (inside - projected)).sum(-1)
    assert (product <= 1e-4 * (1 + point.double().norm(dim=-1) ** 2)).all()


@given(names, points)
@settings(deadline=None)
def test_steepest_descent_has_unit_size_and_descends(name: str, gradient: torch.Tensor) -> None:
    ball = BALLS[name]
    step = ball.steepest_descent(gradient)
    moved = gradient.abs().sum(-1) > 1e-3
    torch.testing.assert_close(ball.size(step)[moved], torch.ones(int(moved.sum())), atol=1e-5, rtol=0)
    assert ((step * gradient).sum(-1)[moved] < 0).all()
    assert (step[gradient.abs().sum(-1) == 0] == 0).all()


@pytest.mark.parametrize("name", sorted(BALLS))
def test_random_points_fill_the_ball(name: str) -> None:
    ball = BALLS[name]
    sizes = ball.size(ball.random_point((4000, 3), torch.tensor(2.0), torch.Generator().manual_seed(0)))
    assert sizes.max() <= 2.0 + 1e-6
    # The size of a uniform point in three dimensions is distributed as 2 u^(1/3) in both balls, with mean
    # 1.5.
    assert sizes.mean().item() == pytest.approx(1.5, abs=0.03)


def test_l2_projection_by_hand() -> None:
    projected = BALLS["l2"].project(torch.tensor([[3.0, 4.0], [0.3, 0.4]]), torch.tensor(1.0))
    torch.testing.assert_close(projected, torch.tensor([[0.6, 0.8], [0.3, 0.4]]))
