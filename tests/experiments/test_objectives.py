"""The comparison of training methods: what is run, how seeds become intervals, what is said of the paper's
claims."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from callbacks.metrics.estimates import wilson_interval
from callbacks.metrics.names import WORST_CASE, WORST_CASE_TEXT
from datamodules.results import ResultsStore
from experiments.config.compose import compose
from experiments.studies.methods import VARIANTS, command
from experiments.studies.methods_report import NO_DEFENCE, RATES, claims, read, write_comparison
from tests.support.rows import measurement, row


def finished(folder: Path, passes: float, **rates: float) -> Path:
    """A run folder with results at the start and the end: every rate 0 unless given, n 50."""
    store = ResultsStore(folder)
    for step in (0, 60):
        for label, metric in RATES.items():
            if metric.attack not in (WORST_CASE, WORST_CASE_TEXT):
                share = rates.get(label.replace(" ", "_").replace("-", "_").replace(".", "_"), 0.0)
                plan = measurement(
                    metric.quantity, step=step, subject=metric.subject, attack=metric.attack, n=50
                )
                typed = metric.attack in ("direct", "gcg")
                store.announce([plan])
                store.add(
                    row(str(i), plan, i < 50 * share, attacked="p" if typed else None) for i in range(50)
                )
    (folder / "cost.json").write_text(json.dumps({"passes": passes, "seconds": 2.0}))
    (folder / "environment.json").write_text(
        json.dumps({"git": {"revision": "abc", "modified": folder.name == "cat_1"}})
    )
    return folder


def runs(tmp_path: Path) -> dict[tuple[str, int], Path]:
    """CAT is robust and cheap, without an attack it is as the model was, CAPO loses its utility, R2D2 is dear
    and weak."""
    told = {
        NO_DEFENCE: (9.0, {"embedding_0_1": 1.0, "GCG": 1.0, "utility": 1.0}),
        "cat": (100.0, {"utility": 1.0}),
        "cat, no attack": (40.0, {"embedding_0_1": 1.0, "GCG": 0.9, "utility": 1.0}),
        "cat, one step": (60.0, {"utility": 1.0, "embedding_0_1": 0.02}),
        "capo": (80.0, {"utility": 0.4}),
        "r2d2": (500.0, {"embedding_0_1": 0.9, "GCG": 0.1, "utility": 1.0}),
    }
    return {
        (name, seed): finished(
            tmp_path / f"{name}_{seed}",
            passes,
            **(rates | ({"GCG": 0.4} if name == "cat" and seed == 1 else {})),
        )
        for name, (passes, rates) in told.items()
        for seed in (0, 1)
    }


def test_intervals_are_those_of_the_mean_at_one_seed_s_n(tmp_path: Path) -> None:
    cell = read(runs(tmp_path))["cat"].rates["GCG"]
    assert (cell.mean, cell.n, cell.by_seed) == (0.2, 50, {0: 0.0, 1: 0.4})
    assert (cell.low, cell.high) == wilson_interval(10, 50)
    assert read({("cat", 0): tmp_path / "cat_0"})["cat"].rates["GCG"].high == wilson_interval(0, 50)[1]


def test_claims_follow_the_figures(tmp_path: Path) -> None:
    said = claims(read(runs(tmp_path)))
    verdicts = {claim.split("**")[1]: "Does not hold" not in claim for claim in said}
    assert verdicts == {
        "CAT without the attack gives no robustness.": True,
        "CAT with one step is close to ten.": False,  # GCG 20 % against 0 % at n = 50
        "CAT beats R2D2 per compute.": False,  # GCG 20 % against 10 %
        "CAPO beats R2D2 per compute.": False,  # robust, but without its utility
        "CAPO needs no utility data.": False,
    }
    assert "utility capo 40 % [28, 54], no defence 100 % [93, 100]" in next(
        claim for claim in said if "utility data" in claim
    )


def test_report_and_figure_are_written(tmp_path: Path) -> None:
    text = write_comparison(runs(tmp_path), tmp_path / "out")
    assert "| cat | 0 [0, 7] |" in text
    assert "| no defence | " in text
    assert "| 0 | 0 |" in next(line for line in text.splitlines() if line.startswith("| no defence |"))
    assert sorted(path.name for path in (tmp_path / "out").iterdir()) == [
        "environment.json",
        "report.md",
        "results.json",
        "trade_off.png",
    ]
    assert json.loads((tmp_path / "out" / "environment.json").read_text())["revisions_of_runs"] == [
        "abc",
        "abc modified",
    ]
    with pytest.raises(ValueError, match="expected finished runs, got none"):
        write_comparison({}, tmp_path / "none")


@pytest.mark.parametrize("name", [NO_DEFENCE, *VARIANTS])
def test_every_run_is_a_command_line_that_composes(name: str, in_root: Path) -> None:
    words = command(name, 1, Path("runs/x"), Path("runs/red"), 7)[4:]
    files = [words[i + 1] for i, word in enumerate(words) if word == "--config"]
    overrides = [tuple(word[2:].split("=", 1)) for word in words if word.startswith("--") and "=" in word]
    config = compose(files, overrides)  # type: ignore[arg-type]
    assert config["trainer"]["max_steps"] == (1 if name == NO_DEFENCE else 7)
    assert config["seed_everything"] == 1
