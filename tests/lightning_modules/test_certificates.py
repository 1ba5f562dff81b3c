"""Certificates against what is known exactly: a linear classifier's margin, the binomial's own tail, and
attacks inside the radius."""

from __future__ import annotations

import math
from itertools import product

import numpy as np
import pytest
import torch
from scipy.stats import binom, norm

from lightning_modules.defences.certificates.gaussian import (
    certificate,
    check_draws,
    lower_bound,
    smallest_n,
)
from lightning_modules.defences.certificates.k_instability import change, copy_fails, defence_success
from lightning_modules.defences.smooth_llm import ALPHABET, perturb

SIGMA, ALPHA = 0.5, 0.001


def test_a_linear_classifier_is_certified_up_to_its_margin_and_no_further() -> None:
    """f(x) = [w x + b > 0] under N(0, sigma^2 I) holds with p = Phi((w x + b) / (sigma |w|)), so that the
    exact p gives R = sigma Phi^-1(p) = (w x + b) / |w|: the distance to the boundary itself."""
    rng = np.random.default_rng(0)
    for margin in (0.1, 0.4, 0.9):
        chance = norm.cdf(margin / SIGMA)
        assert SIGMA * norm.ppf(chance) == pytest.approx(margin)
        radii = []
        for n in (100, 10_000, 1_000_000):
            found = certificate(100, 100, int(rng.binomial(n, chance)), n, SIGMA, ALPHA)
            assert found.holds and (found.radius is None or found.radius < margin)
            radii.append(found.radius or 0.0)
        assert radii == sorted(radii) and radii[-1] == pytest.approx(margin, rel=0.05)


def test_no_attack_within_the_radius_breaks_the_smoothed_decision() -> None:
    """A classifier that is not linear, PGD on its smoothed margin from several starts, 10,000 draws: the
    majority stays. Just outside the true distance of a linear one it does not."""
    torch.manual_seed(0)
    net = torch.nn.Sequential(torch.nn.Linear(8, 32), torch.nn.Tanh(), torch.nn.Linear(32, 1))
    points, broken, certified = 0, 0, 0
    for _ in range(40):
        x = torch.randn(8)
        with torch.no_grad():
            holds = (net(x + SIGMA * torch.randn(2000, 8)) > 0).squeeze(1)
        found = certificate(int(holds[:100].sum()), 100, int(holds[100:].sum()), 1900, SIGMA, ALPHA)
        if found.radius is None:
            continue
        certified, points = certified + 1, points + 1
        delta = torch.zeros(8, requires_grad=True)
        for _ in range(30):
            margin = torch.tanh(4 * net(x + delta + SIGMA * torch.randn(256, 8))).mean()
            (slope,) = torch.autograd.grad(margin if found.holds else -margin, delta)
            moved = (delta - 0.3 * found.radius * slope / slope.norm()).detach()
            delta = (moved * min(1.0, 0.999 * found.radius / float(moved.norm()))).requires_grad_()
        with torch.no_grad():
            share = float((net(x + delta + SIGMA * torch.randn(10_000, 8)) > 0).float().mean())
        broken += (share > 0.5) != found.holds
    assert certified >= 20 and broken == 0
    w, margin = torch.tensor([3.0, 4.0]), 0.5
    x = margin * w / w.norm()
    outside = x - 1.05 * margin * w / w.norm()
    assert float(((outside + SIGMA * torch.randn(10_000, 2)) @ w > 0).float().mean()) < 0.5


def test_radius_grows_with_hits_and_draws_and_falls_with_confidence() -> None:
    def radius(hits: int, n: int, alpha: float = ALPHA, sigma: float = SIGMA) -> float:
        return certificate(10, 10, hits, n, sigma, alpha).radius or 0.0

    assert [radius(h, 200) for h in range(120, 201, 10)] == sorted(
        radius(h, 200) for h in range(120, 201, 10)
    )
    assert [radius(9 * n, 10 * n) for n in (5, 20, 80)] == sorted(radius(9 * n, 10 * n) for n in (5, 20, 80))
    assert radius(190, 200, 0.1) > radius(190, 200, 0.01) > radius(190, 200, 0.0001) > 0
    assert radius(190, 200, sigma=1.0) == pytest.approx(2 * radius(190, 200))


def test_the_side_is_chosen_by_other_draws_and_what_is_uncertain_is_not_certified() -> None:
    refused = certificate(0, 10, 0, 100, SIGMA, ALPHA)
    assert not refused.holds and refused.radius == certificate(10, 10, 100, 100, SIGMA, ALPHA).radius
    assert certificate(5, 10, 50, 100, SIGMA, ALPHA).radius is None
    # The first draws were wrong about the side: nothing is certified, and never the other side.
    assert certificate(10, 10, 3, 100, SIGMA, ALPHA).radius is None


def test_the_bound_covers() -> None:
    rng = np.random.default_rng(1)
    for chance, n, alpha in product((0.5, 0.8, 0.97), (20, 100), (0.05, 0.001)):
        hits = np.arange(n + 1)
        covered = np.array([lower_bound(int(h), n, alpha) <= chance for h in hits])
        assert float(binom.pmf(hits, n, chance) @ covered) >= 1 - alpha  # exactly
        assert covered[rng.binomial(n, chance, 20_000)].mean() >= 1 - alpha - 0.005


def test_too_few_draws_are_refused_with_the_smallest_number_that_works() -> None:
    for alpha in (0.5, 0.05, 0.01, 0.001, 2**-10):
        n = smallest_n(alpha)
        assert lower_bound(n, n, alpha) > 0.5 >= (lower_bound(n - 1, n - 1, alpha) if n > 1 else 0.0)
        check_draws("n", n, alpha)
        with pytest.raises(ValueError, match=rf"n: expected at least {n} for alpha"):
            check_draws("n", n - 1, alpha)
    assert smallest_n(0.001) == 10


def test_the_chance_that_a_copy_fails_is_what_swapping_gives() -> None:
    text, suffix, share = "a" * 30 + "b" * 10, 10, 0.2
    for k in (1, 2, 3):
        hits = 0
        for seed in range(3000):
            copy = perturb(text, share, "swap", torch.Generator().manual_seed(seed))
            hits += sum(c != "b" for c in copy[30:]) >= k
        assert hits / 3000 == pytest.approx(copy_fails(k, 40, suffix, share), abs=0.03)
    votes = sum(math.comb(5, i) * 0.7**i * 0.3 ** (5 - i) for i in range(6) if i >= 2.5)
    assert defence_success(5, 0.7) == pytest.approx(votes)
    assert defence_success(4, 0.7) == pytest.approx(sum(binom.pmf(i, 4, 0.7) for i in (2, 3, 4)))


def test_exactly_k_characters_of_the_suffix_change() -> None:
    for k in (1, 3):
        changed = change("request suffix", 6, k, torch.Generator().manual_seed(k))
        differ = [i for i, (a, b) in enumerate(zip(changed, "request suffix", strict=True)) if a != b]
        assert len(differ) == k and min(differ) >= 8 and all(changed[i] in ALPHABET for i in differ)
