"""Sweeps: what their YAML may say, and what is drawn from it."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from callbacks.metrics.pareto import front
from callbacks.run_folder.provenance import dumped
from experiments.config.compose import compose
from experiments.config.defaults import CSV
from experiments.config.errors import ConfigError
from experiments.sweeps.best import copy_resolved, remove_best, write_best
from experiments.sweeps.definition import Constraint, Sweep, is_broken
from experiments.sweeps.search import Search
from experiments.sweeps.space import Space, space_of
from experiments.sweeps.trials import check_all, configuration, identity, job_of
from tests.support.sweep_files import CAT, EMBEDDING, METRIC, read


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"metod": "grid"}, "metod: unknown field, did you mean 'method'"),
        ({"method": "genetic"}, "method: expected .*'grid'.* got 'genetic'"),
        ({"config": []}, "config: expected at least one file, got none"),
        ({"parameters": {}}, "parameters: expected at least one, got none"),
        ({"parameters": {"ckpt_path": {"value": "x"}}}, "parameters.ckpt_path: the sweep sets it itself"),
        (
            {"parameters": {"trainer.default_root_dir": {"value": "x"}}},
            "parameters.trainer.default_root_dir: .* use --runs",
        ),
        ({"run_cap": None}, "run_cap: expected a number of trials with method random, it is missing"),
        ({"run_cap": 0}, "run_cap: expected an integer >= 1 or null, got 0"),
        ({"metric": {"name": "loss"}}, "metric.name: expected one of eval/harmful/embedding/success_rate"),
        ({"metric": {"name": METRIC["name"], "goal": "lower"}}, "metric.goal: expected .*got 'lower'"),
        (
            {"metric": {"name": "eval/utility/exact_match"}},
            "metric.goal: left out it means minimize, and here more is better",
        ),
        ({"columns": {"e": {**EMBEDDING, "optional": True}}}, "columns.e.optional: it is the metric"),
        ({"columns": {"u": {**EMBEDDING, "quantity": "sucess"}}}, "columns.u.quantity: expected one of"),
        ({"constraints": [{"column": "utilty", "at_least": 0.9}]}, "constraints.0.column: .*'utility'"),
        ({"constraints": [{"column": "utility"}]}, "constraints.0: expected one of at_least, .* got none"),
        (
            {"constraints": [{"column": "utility", "falls_at_most": -1}]},
            "constraints.0.falls_at_most: expected a number >= 0 or null, got -1",
        ),
        (
            {"constraints": [{"column": "utility", "at_least": 90}]},
            r"constraints.0.at_least: .*got 90; 0.9 is",
        ),
        (
            {"constraints": [{"column": "utility", "at_least": 0.9, "at_most": 0.1}]},
            "constraints.0: expected at_least below at_most, got 0.9 and 0.1",
        ),
        ({"parameters": [1]}, r"parameters: expected names with fields, got \[1\]"),
        ({"parameters": {3: {"values": [1, 2]}}}, "parameters: expected a name, got 3"),
        ({"slurm": [1]}, r"slurm: expected names with fields, got \[1\]"),
        (
            {"conditions": {"vars.epsilon": {"vars.x": 1}}, "command": ["--config=" + own for own in CAT]},
            "command: it is for `wandb sweep`, whose format has no conditions",
        ),
        ({"figures": [{"x": "utility", "y": "loss"}]}, "figures.0.y: expected one of embedding, utility"),
        ({"keep": 0}, "keep: expected an integer >= 1 or null, got 0"),
        ({"early_terminate": {"type": "median"}}, "early_terminate.type: expected 'hyperband'"),
        ({"early_terminate": {"type": "hyperband"}}, "early_terminate: expected min_iter, or max_iter and s"),
        ({"command": ["${env}", "thundercat", "fit", "${args}"]}, "command: expected --config=configs/exp"),
    ],
)
def test_what_a_sweep_may_not_say_is_told_in_one_line(
    changes: dict[str, Any], said: str, tmp_path: Path
) -> None:
    with pytest.raises(ConfigError, match=said) as caught:
        read(tmp_path, **changes)
    assert "sweep.yaml: " in str(caught.value) and "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("parameter", "said"),
    [
        ({"mn": 1, "max": 2}, "k.mn: unknown field, did you mean 'min'"),
        ({"min": 1}, "k: expected min and max, or value, or values"),
        ({"min": 2, "max": 1}, "k: expected min below max, got 2 and 1"),
        ({"min": 1, "max": 2, "distribution": "unifrom"}, "k.distribution: .* did you mean 'uniform'"),
        ({"min": 0.5, "max": 2, "distribution": "int_uniform"}, "k: expected integers as min and max"),
        ({"min": 0, "max": 2, "distribution": "log_uniform_values"}, "k: expected min above 0"),
        ({"min": 0.1, "max": 1, "q": 0.25, "distribution": "q_uniform"}, "k: expected multiples of q"),
        ({"min": 0.1, "max": 1, "q": 0.1}, "k.q: does not go with max, min"),
        ({"min": 0.1, "max": 1, "q": 0, "distribution": "q_uniform"}, "k.q: expected a number > 0 or null"),
        ({"values": []}, "k.values: expected different values"),
        ({"values": 3}, "k.values: expected a list, got 3"),
        ({"min": 0, "max": 10**30}, "k: expected at most .* steps between min and max, got 1e\\+30"),
        ({"values": [1, 1]}, "k.values: expected different values"),
        ({"values": [1], "min": 0}, "k.min: does not go with values"),
        ({"value": 1, "max": 0}, "k.max: does not go with value"),
        ({"value": 1}, "parameters: expected one that varies, got constants alone"),
        ({"parameters": {"a": {"value": 1}}}, "k.parameters: nested .* write dotted keys"),
        ("0.1", "k: expected values, value, min and max or a distribution, got '0.1'"),
        (None, "k: expected values, .* got None"),
        (3, "k: expected values, .* got 3"),
    ],
)
def test_what_a_parameter_may_not_be_is_told_in_one_line(parameter: Any, said: str, tmp_path: Path) -> None:
    sweep = read(tmp_path, parameters={"k": parameter})
    with pytest.raises(ConfigError, match=said) as caught:
        space_of(sweep)
    assert "\n" not in str(caught.value)


def test_a_grid_needs_values_that_can_be_counted(tmp_path: Path) -> None:
    sweep = read(tmp_path, method="grid", parameters={"k": {"min": 0.1, "max": 1.0}})
    with pytest.raises(ConfigError, match="parameters.k: expected values, or integers .* for a grid"):
        space_of(sweep)


def drawn(space: Space, sweep: Sweep, folder: Path, count: int = 40) -> list[Any]:
    search = Search(sweep, space, folder, "study")
    return [search.drawn(search.begin())["k"] for _ in range(count)]


@pytest.mark.parametrize(
    ("parameter", "low", "high", "kind"),
    [
        ({"min": 1, "max": 4}, 1, 4, int),
        ({"min": 1, "max": 4.0}, 1, 4, float),
        ({"min": 1e-4, "max": 1e-2, "distribution": "log_uniform_values"}, 1e-4, 1e-2, float),
        ({"min": -2, "max": 0, "distribution": "log_uniform"}, 0.1353, 1, float),
        ({"min": 0.1, "max": 0.5, "q": 0.1, "distribution": "q_uniform"}, 0.1, 0.5, float),
        ({"min": 10, "max": 50, "q": 10, "distribution": "q_uniform"}, 10, 50, int),
        ({"min": 1, "max": 100, "distribution": "q_log_uniform_values"}, 1, 100, int),
        ({"mu": 5, "sigma": 1, "distribution": "normal"}, 1.9, 8.1, float),
        ({"mu": 0, "sigma": 1, "q": 2, "distribution": "q_log_normal"}, 0, 22, int),
    ],
)
def test_what_is_drawn_is_of_the_distribution(
    parameter: dict[str, Any], low: float, high: float, kind: type, tmp_path: Path
) -> None:
    sweep = read(tmp_path, parameters={"k": parameter})
    space = space_of(sweep)
    values = drawn(space, sweep, tmp_path)
    assert {type(value) for value in values} == {kind}
    assert all(low <= value <= high for value in values)
    (dimension,) = space.dimensions
    ends = [dimension.value(raw) for raw in dimension.extremes()]
    assert ends == pytest.approx([low, high], rel=0.02)
    if "q" in parameter:
        assert all(value / parameter["q"] == pytest.approx(round(value / parameter["q"])) for value in values)
    assert sum(value < (low + high) / 2 for value in values) > (25 if "log" in str(parameter) else 5)


def test_values_may_be_lists_and_a_grid_is_drawn_once_each(tmp_path: Path) -> None:
    parameters = {"k": {"values": [[1, 3], None, "x", True]}, "l": {"min": 1, "max": 2}, "m": {"value": 7}}
    sweep = read(tmp_path, method="grid", run_cap=None, parameters=parameters)
    search = Search(sweep, space_of(sweep), tmp_path, "study")
    assert search.total == 8
    found = [search.drawn(search.begin()) for _ in range(8)]
    assert found == [{"m": 7, "k": k, "l": n} for k in ([1, 3], None, "x", True) for n in (1, 2)]


@pytest.mark.parametrize("method", ["random", "bayes"])
def test_what_a_trial_draws_does_not_depend_on_how_often_the_sweep_was_started(
    method: str, tmp_path: Path
) -> None:
    def search(name: str) -> Search:
        return Search(sweep, space, tmp_path, name)

    sweep = read(tmp_path, method=method, parameters={"k": {"min": 0.0, "max": 1.0}})
    space = space_of(sweep)
    once, values = search("once"), []
    for _ in range(13):
        trial = once.begin()
        values.append(once.drawn(trial)["k"])
        once.complete(trial, values[-1], {}, {})
    again = []
    for _ in range(13):
        trial = search("again").begin()
        again.append(search("again").drawn(trial)["k"])
        search("again").complete(trial, again[-1], {}, {})
    assert again == values and len({*values}) == 13


def test_an_impossible_value_fails_before_the_first_trial(in_root: Path, tmp_path: Path) -> None:
    def refused(said: str, **changes: Any) -> None:
        sweep = read(tmp_path, **changes)
        with pytest.raises(ConfigError, match=said) as caught:
            check_all(sweep, space_of(sweep))
        assert "\n" not in str(caught.value)

    sweep = read(tmp_path, test=["configs/data/tinychat_test.yaml"])
    check_all(sweep, space_of(sweep))
    refused(
        r"at model.attack.epslion = 0.1\): model.attack.epslion: unknown field",
        parameters={"model.attack.epslion": {"values": [0.1]}},
    )
    refused(
        r"at model.attack.num_steps = 0\): .*num_steps: expected an integer >= 1, got 0",
        parameters={"vars.epsilon": {"values": [0.1]}, "model.attack.num_steps": {"values": [3, 0]}},
    )
    refused("vars.epslion: unknown variable", parameters={"vars.epslion": {"min": 0.1, "max": 0.2}})
    # A constant is set behind the class that it is a field of, wherever the file has it.
    refused(
        r"at model.attack = .*NoAttack'\): model.attack.epsilon: unknown field",
        parameters={
            "model.attack": {"values": ["EmbeddingPGD", "lightning_modules.attacks.base.NoAttack"]},
            "model.attack.epsilon": {"value": 0.1},
        },
    )
    refused(
        r"parameters.vars.layers: \[1\] and \[2\] are the same training: nothing reads it",
        parameters={"vars.layers": {"values": [[1], [2]]}},
    )
    refused(
        "parameters.vars.epsilon: 0.1 and 0.2 are the same training: .* or another parameter sets it",
        parameters={"vars.epsilon": {"values": [0.1, 0.2]}, "model.attack.epsilon": {"values": [0.3, 0.4]}},
    )
    # Possible one by one; which rows a step is divided into is known before a model is loaded.
    refused(
        r"at data.attack_batch = 5\): data.attack_batch: expected a multiple of the 8 harmful rows",
        parameters={"data.attack_batch": {"values": [8, 5]}},
    )
    # Neither extreme is wrong beside the others' first values; a grid meets every pair.
    together = {"data.attack_batch": {"values": [8, 4]}, "data.outer_batch": {"values": [4, 8]}}
    together |= {"data.micro_batches": {"value": 2}}
    refused(
        r"at .*'data.attack_batch': 4, 'data.outer_batch': 8.*: data.attack_batch: expected a multiple",
        method="grid",
        parameters=together,
    )
    refused("no file 'none.yaml'", test=["none.yaml"])
    refused(
        "columns.e.attack: 'embeding' is in none of its evaluations",
        columns={"e": {**EMBEDDING, "attack": "embeding"}, "embedding": EMBEDDING},
    )
    refused(
        "constraints.0: compares with the start, and no evaluation has schedule.at_start",
        constraints=[{"column": "utility", "falls_at_most": 0.03}],
    )
    refused(
        "early_terminate: .* schedule.every_n_steps", early_terminate={"type": "hyperband", "min_iter": 1}
    )


def test_a_trial_is_named_by_all_of_its_configuration(in_root: Path, tmp_path: Path) -> None:
    sweep = read(tmp_path, test=["configs/data/tinychat_test.yaml"])
    first = job_of(sweep, {"vars.epsilon": 0.1, "seed_everything": 1}, 0, tmp_path)
    assert first.folder.name.startswith("trial_0000-") and first.seed == 1
    assert first.fit == (
        "fit",
        *(f"--config={file}" for file in CAT),
        "--vars.epsilon=0.1",
        "--seed_everything=1",
        f"--trainer.default_root_dir={first.folder}",
        "--ckpt_path=last",
    )
    assert first.test[3] == "--config=configs/data/tinychat_test.yaml"
    first.folder.mkdir(parents=True)
    assert job_of(sweep, {"vars.epsilon": 0.1, "seed_everything": 1}, 5, tmp_path).folder == first.folder
    assert job_of(sweep, {"vars.epsilon": 0.1, "seed_everything": 2}, 5, tmp_path).folder != first.folder


def test_a_sweep_that_searches_something_else_is_another(in_root: Path, tmp_path: Path) -> None:
    def name(**changes: Any) -> str:
        sweep = read(tmp_path, **changes)
        return identity(sweep, check_all(sweep, space_of(sweep)), tmp_path)

    assert name() == name(run_cap=9, keep=2, test=["configs/data/tinychat_test.yaml"], name="x")
    others = [
        name(seed=1),
        name(method="bayes"),
        name(parameters={"vars.epsilon": {"min": 0.05, "max": 0.3}}),
        name(config=[*CAT, "configs/attack/one_step.yaml"]),
        name(constraints=[{"column": "utility", "at_least": 0.9}]),
    ]
    assert len({name(), *others}) == 6


def test_constraints_say_how_far_they_are_broken() -> None:
    assert Constraint("u", falls_at_most=0.03).excess(0.97, 0.95) == pytest.approx(-0.01)
    assert Constraint("u", falls_at_most=0.03).excess(0.97, 0.9) == pytest.approx(0.04)
    assert Constraint("u", at_least=0.9, at_most=0.95).excess(None, 0.97) == pytest.approx(0.02)
    assert Constraint("u", rises_at_most=0.02).excess(0.01, 0.05) == pytest.approx(0.02)
    # As far as is allowed is kept, whatever the last bit of the difference says.
    assert 0.97 - 0.94 - 0.03 > 0 and Constraint("u", falls_at_most=0.03).excess(0.97, 0.94) == 0
    assert not is_broken(0.97 - 0.94 - 0.03) and is_broken(0.001)


def test_the_front_holds_what_nothing_beats() -> None:
    points = {0: (90.0, 5.0), 1: (95.0, 8.0), 2: (94.0, 9.0), 3: (80.0, 5.0), 4: (99.0, 30.0), 5: (90.0, 5.0)}
    assert front(points, (1, -1)) == [0, 5, 1, 4]
    assert front(points, (1, 1)) == [4]
    assert front({}, (1, 1)) == []


@pytest.mark.parametrize(
    ("values", "on_top"),
    [
        ({"vars.epsilon": 0.07, "model.optimizer.lr": 0.001, "seed_everything": 4}, True),
        ({"model.attack": "lightning_modules.attacks.base.NoAttack", "trainer.max_steps": 3}, True),
        ({"model.attack": "EmbeddingPGD"}, False),
    ],
)
def test_the_best_trials_file_repeats_it(
    values: dict[str, Any], on_top: bool, in_root: Path, tmp_path: Path
) -> None:
    """An argument that is taken away no file on top can say: then the file is the whole configuration."""
    sweep = read(tmp_path)
    path = tmp_path / "best.yaml"
    write_best(sweep, values, "Trial 3", path)
    *files, last = path.read_text().splitlines()[0].partition("fit --config ")[2].split(" --config ")
    assert last == "best.yaml" and files == (CAT if on_top else [])
    again = compose([*files, str(path)], [])
    own = configuration(sweep, values)
    for config in (again, own):
        config["trainer"].pop("default_root_dir", None)
    assert again == own


def test_the_best_trials_configuration_is_another_runs_too(tmp_path: Path) -> None:
    """All of it but where the trial lies: a run by it neither moves the trial nor writes into it."""
    folder = tmp_path / "trial"
    folder.mkdir()
    base = {"name_or_path": "x", "revision": "12e4567"}
    logs = [{"class_path": CSV, "init_args": {"save_dir": where}} for where in (str(folder), "elsewhere")]
    trainer = {"max_steps": 3, "default_root_dir": str(folder), "logger": logs}
    model = {"class_path": "lightning_modules.adversarial.AdversarialFineTuning", "init_args": {"base": base}}
    (folder / "config.yaml").write_text(dumped({"trainer": trainer, "model": model}))
    copy_resolved(folder, tmp_path)
    again = compose([str(tmp_path / "best_config.yaml")], [])
    assert again["trainer"] == {"max_steps": 3, "logger": logs[1:]}
    assert again["model"]["init_args"]["base"] == base
    remove_best(tmp_path)
    assert [own.name for own in tmp_path.iterdir()] == ["trial"]
