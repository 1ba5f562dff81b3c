"""Sampling: every order is a pure function, and a divided step holds the same rows."""

from __future__ import annotations

from collections import Counter

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from datamodules.division import Division
from datamodules.streams import ATTACKED, StepSampler, Stream

streams = st.tuples(st.integers(1, 40), st.integers(1, 5), st.integers(0, 9), st.integers(1, 6))


@given(streams, st.integers(0, 30))
@settings(deadline=None)
def test_stream_is_a_pure_function_of_its_position(
    parameters: tuple[int, int, int, int], position: int
) -> None:
    rows, size, seed, window = parameters
    lengths = [(7 * i) % 13 for i in range(rows)]
    one, other = Stream(lengths, size, seed, window), Stream(lengths, size, seed, window)
    for number in range(position):
        one.batch(number)
    assert one.batch(position) == other.batch(position)


@given(streams)
@settings(deadline=None)
def test_every_row_occurs_equally_often(parameters: tuple[int, int, int, int]) -> None:
    rows, size, seed, window = parameters
    stream = Stream([1] * rows, size, seed, window)
    # After `rows` windows an integer number of passes is complete.
    counts = Counter(row for number in range(rows * window) for row in stream.batch(number))
    assert set(counts.values()) == {size * window}


def test_buckets_join_rows_of_like_length() -> None:
    lengths = [i % 50 for i in range(400)]
    spread = []
    for window in (1, 16):
        stream = Stream(lengths, 4, 0, window)
        batches = [[lengths[row] for row in stream.batch(number)] for number in range(64)]
        spread.append(sum(max(batch) - min(batch) for batch in batches))
    assert spread[1] < 0.3 * spread[0]


def test_ranks_share_a_micro_batch_and_iteration_starts_where_training_stands() -> None:
    # Trap: a random interleave leaves micro-batches without adversarial rows; here the counts are fixed.
    position = 0
    both = {"harmful": Stream([1] * 10, 2, 0), "utility": Stream([1] * 30, 4, 1)}
    division = Division(2, 4)
    samplers = [StepSampler(both, division, 5, lambda: position, rank, 2) for rank in range(2)]
    whole = list(StepSampler(both, division, 5, lambda: position))
    parts = [list(s) for s in samplers]
    for i in range(5):
        assert sorted(parts[0][i] + parts[1][i]) == sorted(whole[i])
        assert Counter(name for name, _ in parts[0][i]) == {"harmful": 1, "utility": 2}
    position = 3
    assert list(samplers[0]) == parts[0][3:]
    position = 5
    assert len(list(samplers[0])) == 5


@pytest.mark.parametrize("world", [1, 2])
def test_a_divided_step_holds_the_same_rows_and_attacks_each_once(world: int) -> None:
    streams = {"harmful": Stream(list(range(40)), 8, 0), "utility": Stream([1] * 30, 8, 1)}
    plain, divided = Division(8, 8), Division(8, 8, 4, outer_batch=4, utility_batch=4)
    for rank in range(world):
        whole = list(StepSampler(streams, plain, 5, lambda: 0, rank, world))
        parts = list(StepSampler(streams, divided, 20, lambda: 0, rank, world))
        for step in range(5):
            own = [item for place in range(4) for item in parts[4 * step + place]]
            attacked = [row for name, row in own if name == ATTACKED]
            assert attacked == [row for name, row in own if name == "harmful"]
            assert sorted(item for item in own if item[0] != ATTACKED) == sorted(whole[step])
        counts = [Counter(name for name, _ in part) for part in parts[:4]]
        some = 4 // world
        assert counts == [
            {"utility": some},
            {"utility": some},
            {ATTACKED: 2 * some, "harmful": some},
            {"harmful": some},
        ]
    assert (divided.weight("harmful"), divided.weight("utility"), divided.even) == (2.0, 2.0, False)
    assert Division(8, 8, 4).even
    assert Division(0, 8, 4).even


@pytest.mark.parametrize(
    ("counts", "fields", "message"),
    [
        (
            (8, 8, 3),
            {},
            "data.harmful_per_step: expected a multiple of micro_batches 3, got 8; or set data.o",
        ),
        ((8, 8, 2), {"outer_batch": 3}, "data.outer_batch: expected a divisor of harmful_per_step 8, got 3"),
        ((0, 8, 2), {"outer_batch": 3}, "data.outer_batch: expected a divisor of harmful_per_step 0, got 3"),
        (
            (8, 8, 2),
            {"utility_batch": 2},
            "data.utility_batch: 8 rows by 2 are 4 passes, expected at most da",
        ),
        (
            (8, 8, 2),
            {"attack_batch": 3},
            "data.attack_batch: expected a multiple of the 4 harmful rows of a ",
        ),
        ((8, 8, 2), {"attack_batch": 2}, "that divides harmful_per_step 8, got 2"),
        ((8, 8, 4), {"outer_batch": 8, "utility_batch": 8}, "data.micro_batches: expected at most 2, the pa"),
    ],
)
def test_what_does_not_divide(counts: tuple[int, int, int], fields: dict[str, int], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        Division(*counts, **fields)


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({}, "data.harmful_per_step: expected a multiple of micro_batches x devices = 4 x 4, got 8"),
        (
            {"outer_batch": 2, "utility_batch": 2},
            "data.outer_batch: expected a multiple of the 4 devices, got",
        ),
    ],
)
def test_what_devices_cannot_share(fields: dict[str, int], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        Division(8, 8, 4, **fields).check_devices(4)


def test_devices_that_share_a_step_need_fewer_micro_batches() -> None:
    shared = Division(8, 56, 8).shared_by(8)
    assert shared is not None and (shared.micro_batches, shared.rows("utility")) == (1, 56)
    half = Division(8, 56, 8).shared_by(2)
    assert half is not None and half.micro_batches == 4
    assert Division(8, 56, 8).shared_by(1) == Division(8, 56, 8)
    assert Division(8, 56, 8).shared_by(3) is None
    with pytest.raises(ValueError, match=r"8 x 8, got 8; set data.micro_batches: 1"):
        Division(8, 56, 8).check_devices(8)
    with pytest.raises(ValueError, match=r"8 x 3, got 8$"):
        Division(8, 56, 8).check_devices(3)
