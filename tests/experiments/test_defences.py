"""The table of defences: its commands fit their recipes, and its cells are what the rows say."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import yaml

from callbacks.judges.keyword import KeywordRefusal
from datamodules.result_lines import Row
from datamodules.results import ResultsStore, read_rows
from experiments.config.check import check
from experiments.config.compose import ConfigError, compose
from experiments.studies.defences import MODELS, archive, measured, report, set_apart, table, words
from lightning_modules.attacks.suffix.stored import StoredSuffixes
from tests.conftest import ROOT
from tests.support.rows import measurement, row

SHOWN = MODELS["tinychat"].shown
RECORDED = ROOT / "experiments" / "results" / "defences_cpu_202611"


@pytest.mark.parametrize("defence", [*MODELS["tinychat"].settings])
def test_a_command_fits_its_recipe(defence: str, in_root: Path) -> None:
    own = words(MODELS["tinychat"], defence, Path("run"), ["--vars.defence_limit=3"])
    files = [own[i + 1] for i, word in enumerate(own) if word == "--config"]
    overrides = [(name, value) for name, _, value in (word[2:].partition("=") for word in own if "=" in word)]
    config = compose(files, overrides)
    check(config, "test")
    suite = config["trainer"]["callbacks"][-1]["init_args"]
    assert suite["schedule"]["test_limit"] == 3
    targets = [suite["attacks"][name]["init_args"]["target_tokens"] for name in ("static", "adaptive")]
    assert targets == [12, 5 if defence == "smooth_llm" else 12]  # the static search is alike for all
    known = suite["attacks"]["adaptive"]["init_args"]["defence"]
    assert (known is None) == (not defence)
    assert config["data"]["init_args"]["evaluation"]["harmful"][0]["init_args"]["split"] == "test"
    assert config["trainer"]["default_root_dir"] == "run"


@pytest.mark.parametrize("defence", [*MODELS["smollm2"].settings])
def test_a_real_model_s_defences_replay_what_was_found_without_one(defence: str, in_root: Path) -> None:
    own = words(MODELS["smollm2"], defence, Path("run"), ["--vars.defence_limit=3"], Path("run/found"))
    files = [own[i + 1] for i, word in enumerate(own) if word == "--config"]
    overrides = [(name, value) for name, _, value in (word[2:].partition("=") for word in own if "=" in word)]
    config = compose(files, overrides)
    check(config, "test")
    attacks = config["trainer"]["callbacks"][-1]["init_args"]["attacks"]
    search = attacks["adaptive" if defence else "static"]["init_args"]
    assert (search["num_steps"], search["width"], search["num_tokens"]) == (15, 8, 12)
    if not defence:
        assert [*attacks] == ["static"] and search.get("defence") is None
        return
    replayed = attacks["static"]["init_args"]
    assert (replayed["run"], replayed["attacks"], replayed["whose"]) == ("run/found", ["static"], "own")
    assert search["defence"] == config["model"]["init_args"]["defence"]
    inner = str(search["defence"])
    assert "tinychat" not in inner  # every row that it is fitted to or calibrated on is this model's


def test_a_filter_of_requests_stands_within_one_of_replies(in_root: Path) -> None:
    around = MODELS["tinychat"]
    config = compose([around.recipe, "configs/defence/both_filters.yaml", around.attacks], [])
    check(config, "test")
    defence = config["model"]["init_args"]["defence"]
    inner = defence["init_args"]["within"]
    assert inner["class_path"].endswith("filtered.Filtered")
    assert inner["init_args"]["filter"]["init_args"]["classifier"]["init_args"]["layer"] == 3
    known = config["trainer"]["callbacks"][-1]["init_args"]["attacks"]["adaptive"]["init_args"]["defence"]
    assert known == defence
    inner["class_path"] = "lightning_modules.attacks.base.NoAttack"
    inner["init_args"] = {}
    with pytest.raises(ConfigError, match="within.class_path: expected a kind of Inner, got .*NoAttack"):
        check(config, "test")


def test_a_filter_is_not_calibrated_on_the_tiny_models_requests_in_silence(in_root: Path) -> None:
    files = ["configs/experiment/defences_smollm2.yaml", "configs/defence/perplexity_filter.yaml"]
    with pytest.raises(ConfigError, match="model.defence: .* requests of the packaged tiny model"):
        check(compose(files, []), "test")
    check(compose([*files, "configs/data/smollm2_filters.yaml"], []), "test")
    check(compose([files[0], "configs/defence/smooth_llm.yaml"], []), "test")  # calibrates nothing


def test_a_run_is_archived_with_its_table_and_an_unfinished_one_has_holes(tmp_path: Path) -> None:
    run, out = tmp_path / "run", tmp_path / "out"
    store = ResultsStore(run)
    for defence in ("", "smooth_llm-1f"):
        for quantity, attack in (
            ("refusal_rate", ""),
            ("success_rate", "static"),
            ("success_rate", "adaptive"),
        ):
            settings = f"{defence}{attack}"
            of = measurement(quantity, stage="test", attack=attack, defence=defence, settings=settings, n=2)
            store.announce([of])
            store.add([row(f"e{i}", of=of, verdict=i > 0, defence=defence) for i in range(2)])
    first = table(run)
    assert [own.text for own in first.rows[1]][:4] == [SHOWN["smooth_llm"], "50.0 % [9.5, 90.5]", "-", "-"]
    assert first.rows[1][4].text == "50.0 % [9.5, 90.5] (n = 2)"  # both are attacked, one is refused as it is
    assert first.rows[1][6].text == "50.0 % [9.5, 90.5]; -"
    # What was not measured of a defence is a hole, not the cost of none.
    assert [cells[-1].text for cells in first.rows] == ["1; 1", "-"]
    archive(run, out)
    archive(run, out)
    assert [path.name for path in sorted((out / "rows").iterdir())] == [
        "measurements.jsonl.xz",
        "rows_rank0.jsonl.xz",
    ]
    assert table(out) == first


@pytest.mark.parametrize(
    ("defences", "sizes", "message"),
    [
        (["smooth_llm-1", "smooth_llm-2"], [2, 2], "'smooth_llm' measured with two settings"),
        (
            ["smooth_llm-1", "erase_and_check-1"],
            [2, 3],
            "expected defences measured on equally many requests",
        ),
    ],
)
def test_rows_of_another_call_do_not_stand_in_one_table(
    defences: list[str], sizes: list[int], message: str, tmp_path: Path
) -> None:
    store = ResultsStore(tmp_path)
    for defence, n in zip(defences, sizes, strict=True):
        for subject, quantity, attack in (
            ("harmful", "refusal_rate", ""),
            ("harmful", "success_rate", "adaptive"),
            ("harmless", "over_refusal_rate", "adaptive"),
        ):
            settings = f"{defence}{attack}{subject}"
            fields: Any = {
                "attack": attack,
                "defence": defence,
                "settings": settings,
                "subject": subject,
                "n": n,
            }
            of = measurement(quantity, stage="test", **fields)
            store.announce([of])
            store.add([row(f"e{i}", of=of, defence=defence) for i in range(n)])
    for defence in defences:
        configured(tmp_path, defence)
    with pytest.raises(ValueError, match=message):
        report(tmp_path)


@pytest.mark.parametrize(
    ("steps", "model", "n", "message"),
    [
        (60, "m", 1, "expected one model and searches of one budget"),
        (15, "other", 1, "expected one model and searches of one budget"),
        (15, "m", 2, "smooth_llm-1 is not measured whole"),
    ],
)
def test_searches_of_another_budget_or_model_do_not_stand_beside_one_another(
    steps: int, model: str, n: int, message: str, tmp_path: Path
) -> None:
    store = ResultsStore(tmp_path)
    for defence, own_model, planned in (("", "m", 1), ("smooth_llm-1", model, n)):
        fields: dict[str, Any] = {"attack": "static", "defence": defence, "model": own_model, "n": planned}
        of = measurement("success_rate", stage="test", settings=defence, **fields)
        store.announce([of])
        store.add([row("e", of=of, defence=defence)])
        configured(tmp_path, defence, steps if defence else 15)
    with pytest.raises(ValueError, match=message):
        report(tmp_path)


def configured(folder: Path, defence: str, steps: int = 15) -> None:
    stem = f"test_{defence}_" if defence else "test_"
    search = {"init_args": {"num_steps": steps, "width": 8, "num_tokens": 12}}
    suite = {"init_args": {"attacks": {"static": search, "adaptive": search}}}
    config = {"trainer": {"callbacks": [{"class_path": "x"}, suite]}}
    (folder / f"{stem}config.yaml").write_text(yaml.safe_dump(config))


def test_the_last_whole_search_without_a_defence_is_set_apart(tmp_path: Path) -> None:
    """Of a folder with an earlier, smaller one, and with what was replayed behind a defence."""
    store = ResultsStore(tmp_path)

    def searched(settings: str, found: str, defence: str = "", n: int = 2, planned: int = 2) -> None:
        fields: dict[str, Any] = {"attack": "static", "defence": defence, "settings": settings, "n": planned}
        of = measurement("success_rate", stage="test", **fields)
        store.announce([of])
        names = [f"e{i}" for i in range(n)]
        store.add(row(f"{found} {name}", of, defence=defence, attacked=f"p {found}") for name in names)

    searched("first", "bad")
    searched("second", "good")
    searched("third", "replayed", "smooth_llm-1")
    place = set_apart(tmp_path)
    assert {own.attacked for own in read_rows(place)} == {"p good"} and len(read_rows(place)) == 2
    assert set_apart(tmp_path) == place
    suffixes = StoredSuffixes(str(place), ["static"], judge=None).surroundings()
    assert [own.after for own in suffixes] == [" good"]
    searched("fourth", "begun", n=1)
    with pytest.raises(ValueError, match="expected a whole search without a defence, got 1 of its rows"):
        set_apart(tmp_path)


def percent(rows: list[Row], judge: str, negated: bool = False) -> str:
    """A share of rows, as a table begins with it."""
    found = sum(row.accepted(judge, "test") != negated for row in rows)
    return f"{100 * found / len(rows):.1f} %"


def test_the_recorded_table_of_the_real_model_is_what_its_rows_say() -> None:
    folder = RECORDED.parent / "smollm2_defences_cpu_202611"
    assert (folder / "report.md").read_text(encoding="utf-8") == report(folder, MODELS["smollm2"])


def test_every_cell_of_the_recorded_table_is_what_its_rows_say() -> None:
    """Computed again by the code that wrote it, and from the verdicts alone."""
    assert (RECORDED / "report.md").read_text(encoding="utf-8") == report(RECORDED)
    own, rows = table(RECORDED), read_rows(RECORDED)
    assert [row[0].text for row in own.rows] == [*SHOWN.values()]
    refusal = KeywordRefusal().name
    for defence, cells in zip(measured(RECORDED), own.rows, strict=True):
        found = [row for row in rows if row.defence == defence]
        clean = [row for row in found if not row.attack]
        by_subject = {
            name: [row for row in clean if row.subject == name] for name in ("harmful", "harmless", "utility")
        }
        assert cells[1].text.startswith(percent(by_subject["harmful"], refusal))
        assert cells[2].text.startswith(percent(by_subject["harmless"], refusal))
        assert cells[3].text.startswith(percent(by_subject["utility"], "exact_match"))
        names = {row.example for row in found if row.attack == "static" and row.subject == "harmful"}
        plain = [row for row in by_subject["harmful"] if row.example in names]
        assert cells[4].text.startswith(percent(plain, refusal, negated=True))
        assert cells[4].text.endswith(f"(n = {len(plain)})") and len(plain) >= 8
        for column, attack in ((5, "static"), (6, "adaptive")):
            attacked = [row for row in found if row.attack == attack and row.subject == "harmful"]
            target, refused = cells[column].text.split("; ")
            assert target.startswith(percent(attacked, "target_prefix"))
            assert refused.startswith(percent(attacked, refusal, negated=True))
            assert len(attacked) >= 24
