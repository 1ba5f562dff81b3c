"""Randomised smoothing (Cohen et al. 2019, arXiv 1902.02918, section 3.2): for which l2 perturbations the
majority under Gaussian noise cannot change.

For a property f(x) that holds or not, and g(x) = the likelier of both under x + N(0, sigma^2 I): if the
chance of g(x) is at least p > 1/2, then g(x + delta) = g(x) for all ||delta||_2 < R = sigma Phi^-1(p). p is
a lower Clopper-Pearson bound from n draws, after n0 others have chosen which of both is meant; the statement
holds with probability at least 1 - alpha for each request by itself.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

from scipy.stats import beta, norm


@dataclass(frozen=True)
class Certificate:
    """What is certified of one request."""

    holds: bool
    """The property that the first draws chose: it holds, or it does not."""
    p_lower: float
    """Lower bound of its chance under noise."""
    radius: float | None
    """In the unit of sigma; None where nothing is certified."""


def certificate(selected: int, n0: int, hits: int, n: int, sigma: float, alpha: float) -> Certificate:
    """The certificate from two sets of draws.

    Args:
        selected: how many of the first n0 draws have the property; half of them is not enough.
        hits: how many of the n further ones have it.
        sigma: standard deviation of the noise in every coordinate.
        alpha: chance that the certificate is wrong.
    """
    holds = 2 * selected > n0
    p_lower = lower_bound(hits if holds else n - hits, n, alpha)
    return Certificate(holds, p_lower, sigma * float(norm.ppf(p_lower)) if p_lower > 0.5 else None)


def lower_bound(hits: int, n: int, alpha: float) -> float:
    """One-sided Clopper-Pearson: the share below the truth with probability at least 1 - alpha."""
    return 0.0 if hits == 0 else float(beta.ppf(alpha, hits, n - hits + 1))


def smallest_n(alpha: float) -> int:
    """The fewest draws that can certify anything: all of them alike gives alpha^(1/n) > 1/2."""
    n = max(1, math.ceil(math.log(alpha) / math.log(0.5)))
    return n if lower_bound(n, n, alpha) > 0.5 else n + 1


def check_draws(where: str, n: int, alpha: float) -> None:
    """Raises: ValueError where so few draws certify nothing, with the smallest number that can."""
    least = smallest_n(alpha)
    if n < least:
        raise ValueError(
            f"{where}: expected at least {least} for alpha {alpha:g} (fewer certify nothing even if "
            f"all agree), got {n}; raise it"
        )
