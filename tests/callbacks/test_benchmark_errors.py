"""Standard errors of benchmarks are those that the harness prints."""

from __future__ import annotations

import math

import pytest
from hypothesis import given
from hypothesis import strategies as st

from callbacks.metrics.estimates import pooled_standard_error

metrics = pytest.importorskip("lm_eval.api.metrics")

TASK = st.lists(st.booleans(), min_size=2, max_size=20)


def share(outcomes: list[bool]) -> float:
    return sum(outcomes) / len(outcomes)


@given(TASK)
def test_of_one_task_it_is_the_samples_own(outcomes: list[bool]) -> None:
    expected = metrics.mean_stderr([float(own) for own in outcomes])
    assert pooled_standard_error([share(outcomes)], [len(outcomes)]) == pytest.approx(expected)


@given(st.lists(TASK, min_size=1, max_size=8))
def test_of_a_group_it_is_the_harnesss_pooled_one(tasks: list[list[bool]]) -> None:
    sizes = [len(own) for own in tasks]
    errors = [metrics.mean_stderr([float(own) for own in task]) for task in tasks]
    expected = metrics.pooled_sample_stderr(errors, sizes)
    assert pooled_standard_error([share(own) for own in tasks], sizes) == pytest.approx(expected)


def test_by_hand() -> None:
    # 3 of 4 right: s^2 = (3 x 1/16 + 9/16) / 3 = 1/4, its root over the root of 4.
    assert pooled_standard_error([0.75], [4]) == pytest.approx(0.25)
    # A task of one example adds to N alone.
    assert pooled_standard_error([0.75, 1.0], [4, 1]) == pytest.approx(math.sqrt(0.25 / 5))


def test_without_two_examples_of_a_task_there_is_none() -> None:
    assert math.isnan(pooled_standard_error([1.0, 0.0], [1, 1]))
