"""How a hostile reader broke sweeps, each way as it was watched: trials of two sweeps in one table, draws
that a kill changes, a disk that fills, hours that a misspelt column costs."""

from __future__ import annotations

import errno
from pathlib import Path
from typing import Any

import pytest

from experiments.config.errors import ConfigError
from experiments.sweeps import disk
from experiments.sweeps.measured import Unmeasured, cells
from experiments.sweeps.search import ERROR, FOLDER, Search
from experiments.sweeps.trials import TRIALS, configuration, identity
from tests.support.sweeping import COLUMNS, Sweeping, parameters, states


@pytest.fixture
def sweeping(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Sweeping:
    monkeypatch.chdir(tmp_path)
    return Sweeping(tmp_path)


# --- what is drawn


class Killed(Exception):
    """In place of a kill."""


def killed_at(place: int) -> Any:
    """What stands in for the search's samplers: none for this draw."""
    real = Search._sampler

    def sampler(self: Search, *numbers: int) -> Any:
        if numbers[1:] == (place,):
            raise Killed
        return real(self, *numbers)

    return sampler


@pytest.mark.parametrize("method", ["random", "bayes"])
def test_a_kill_between_two_draws_changes_neither(
    method: str, sweeping: Sweeping, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It had left the rest of the trial to a sampler without a seed, of another method."""
    ranges = {name: {"min": 0.0, "max": 1.0} for name in ("vars.epsilon", "vars.b", "vars.c")}
    sweep = sweeping.engine(method=method, run_cap=20, parameters=ranges).search.sweep
    space = sweeping.engine(method=method, run_cap=20, parameters=ranges).search.space

    def search(name: str) -> Search:
        return Search(sweep, space, sweeping.place, name)

    def after(name: str, killed: int | None) -> list[dict[str, Any]]:
        """The draws of a search whose process ends behind so many draws of the last trial."""
        own = search(name)
        for _ in range(11):  # more than are drawn at random at first
            trial = own.begin()
            values = own.drawn(trial)
            own.complete(trial, values["vars.epsilon"], {}, {})
        trial = own.begin()
        if killed is not None:
            kept = space.dimensions[:killed]
            for place, dimension in enumerate(kept):
                own.study.sampler = own._sampler(trial.number, place)
                dimension.suggest(trial)
            own = search(name)
            (trial,) = own.unfinished()
        return [own.drawn(trial)]

    whole = after("whole", None)
    assert [after(f"killed {n}", n) for n in (0, 2)] == [whole] * 2
    assert len({*whole[0].values()}) == 3


def test_a_grid_beyond_all_memory_is_drawn_one_by_one(sweeping: Sweeping) -> None:
    given = {"vars.method": {"value": "works"}, "vars.epsilon": {"min": 1, "max": 10**12}}
    search = sweeping.engine(parameters=given, run_cap=2).search
    assert search.total == 2 and [search.drawn(search.begin())["vars.epsilon"] for _ in range(2)] == [1, 2]


def test_values_that_do_not_go_together_fail_by_themselves(sweeping: Sweeping) -> None:
    """Each was tried with the others' first values alone; the sweep had ended there, at every start again."""
    given = {
        "vars.epsilon": {"value": 0.5},
        "vars.method": {"values": ["works", "${vars.b.c}"]},
        "vars.b": {"values": [{"c": "works"}, 1]},
    }
    engine = sweeping.engine(parameters=given)
    engine.run()
    assert states(engine) == ["COMPLETE"] * 3 + ["FAIL"]
    assert "vars.b" in engine.search.trials()[3].user_attrs[ERROR]


# --- trials of two sweeps in one table


def test_a_file_that_is_edited_while_the_sweep_runs_ends_it(sweeping: Sweeping) -> None:
    settings = {"parameters": parameters(["works", "edits"], [0.5])}
    engine = sweeping.engine(**settings)
    with pytest.raises(ConfigError, match="the files of `config` have changed since the sweep was begun"):
        engine.run()
    assert states(engine) == ["COMPLETE", "RUNNING"] and len(sweeping.calls()) == 2


def test_content_that_the_first_trial_does_not_read_makes_another_sweep(sweeping: Sweeping) -> None:
    """`method` names files: those of the first corner alone had been looked at."""
    paths = [sweeping.place.with_name(f"{name}.jsonl") for name in "ab"]
    for path in paths:
        path.write_text("{}\n")

    def name() -> str:
        search = sweeping.engine(parameters=parameters([*map(str, paths)], [0.5])).search
        corners = [
            configuration(search.sweep, search.space.values(point))
            for own in search.space.dimensions
            for point in search.space.corners(own)
        ]
        return identity(search.sweep, corners, sweeping.place)

    before = name()
    assert name() == before
    paths[1].write_text('{"other": 1}\n')
    assert name() != before


def test_a_constraint_that_differs_in_its_last_digit_is_another_sweep(sweeping: Sweeping) -> None:
    names = set()
    for least in (0.9, 0.90000001):
        sweep = sweeping.engine(
            parameters=parameters(["works"], [0.5]), constraints=[{"column": "utility", "at_least": least}]
        ).search.sweep
        names.add(identity(sweep, [], sweeping.place))
    assert len(names) == 2


def test_a_copy_that_somebody_made_is_not_taken_for_a_trial(sweeping: Sweeping) -> None:
    folder = sweeping.job("works").folder
    copy = folder.with_name(f"copy_of_{folder.name}")
    (copy / "model").mkdir(parents=True)
    engine = sweeping.engine(parameters=parameters(["works"], [0.5, 0.6]), keep=1)
    engine.run()
    assert engine.search.trials()[0].user_attrs[FOLDER].startswith("trial_0000-")
    assert [*copy.iterdir()] == [copy / "model"]


# --- what is measured


def test_a_column_that_no_trial_measures_costs_one_training(sweeping: Sweeping) -> None:
    columns = {**COLUMNS, "gcg": {"quantity": "success_rate", "subject": "harmful", "attack": "gcg"}}
    engine = sweeping.engine(columns=columns, parameters=parameters(["works"], [0.1, 0.2, 0.3]))
    with pytest.raises(
        ConfigError, match=r"trial 0, and so any other: no 'gcg' \(harmful/gcg/success_rate\)"
    ):
        engine.run()
    assert states(engine) == ["FAIL"] and len(sweeping.calls()) == 1


def test_what_was_measured_before_training_alone_chooses_no_trial(sweeping: Sweeping) -> None:
    engine = sweeping.engine(parameters=parameters(["untrained"], [0.1, 0.2]))
    with pytest.raises(ConfigError, match="its last evaluation was before training; set schedule.at_end"):
        engine.run()
    with pytest.raises(Unmeasured, match="no results of `fit`"):
        cells(engine.search.sweep, sweeping.place)


# --- the disk


def test_a_full_disk_ends_the_sweep_and_no_trial(sweeping: Sweeping) -> None:
    settings = {"parameters": parameters(["full", "works"], [0.5])}
    engine = sweeping.engine(**settings)
    with pytest.raises(OSError, match="no space left on the disk"):
        engine.run()
    assert states(engine) == ["RUNNING"]
    Path("room").touch()
    again = sweeping.engine(**settings)
    again.run()
    assert states(again) == ["COMPLETE", "COMPLETE"]


def test_a_disk_that_takes_no_small_file_is_full(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    assert not disk.is_full(tmp_path)

    def full(descriptor: int) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr("os.fsync", full)
    assert disk.is_full(tmp_path) and [*tmp_path.iterdir()] == []


def test_models_of_failed_trials_do_not_fill_the_disk(sweeping: Sweeping) -> None:
    engine = sweeping.engine(parameters=parameters(["works", "fails"], [0.5]), keep=1)
    failing = sweeping.job("fails").folder
    (failing / "checkpoints").mkdir(parents=True)
    (failing / "model").mkdir()
    engine.run()
    assert states(engine) == ["COMPLETE", "FAIL"]
    assert not (failing / "checkpoints").exists() and not (failing / "model").exists()
    assert [path.parent.name[:10] for path in (sweeping.place / TRIALS).glob("*/model")] == ["trial_0000"]
