"""Every recipe and building block below configs/ is complete, documented and can be built."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import yaml

from datamodules.evaluation import SUBJECTS
from datamodules.sources.tinychat.noise import KINDS
from experiments.commands.run import instantiate
from experiments.config.check import check
from experiments.config.compose import compose
from experiments.config.defaults import with_defaults
from tests.conftest import ROOT

RECIPES = sorted(
    str(path.relative_to(ROOT))
    for path in [ROOT / "configs" / "quickstart.yaml", *(ROOT / "configs" / "experiment").glob("*.yaml")]
)
ATTACK_FILES = sorted(str(path.relative_to(ROOT)) for path in (ROOT / "configs" / "attack").glob("*.yaml"))


@pytest.mark.parametrize("file", ATTACK_FILES)
def test_every_attack_file_can_be_put_into_a_recipe(file: str, in_root: Path) -> None:
    config = compose(["configs/experiment/cat_tinychat.yaml", file], [])
    check(config, "test")


def test_every_attack_is_built_in_one_suite(in_root: Path, tmp_path: Path) -> None:
    # one_step.yaml changes the attack of the file before it.
    whole = [file for file in ATTACK_FILES if Path(file).stem != "one_step"]
    attacks = {Path(file).stem: {"include": file} for file in whole}
    suite = "callbacks.evaluations.robustness.RobustnessEvaluation"
    callbacks = [{"class_path": suite, "init_args": {"attacks": attacks}}]
    (tmp_path / "suite.yaml").write_text(yaml.safe_dump({"trainer": {"callbacks": callbacks}}))
    config = compose(["configs/experiment/cat_tinychat.yaml", str(tmp_path / "suite.yaml")], [])
    check(config, "test")
    (built,) = (
        own for own in instantiate(with_defaults(config)).trainer.callbacks if hasattr(own, "attacks")
    )
    assert built.attacks.keys() == attacks.keys()
    assert all(callable(attack) for attack in built.attacks.values())


@pytest.mark.parametrize("recipe", RECIPES)
def test_every_recipe_builds(
    recipe: str, in_root: Path, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    overrides = [("trainer.default_root_dir", str(tmp_path))]
    if "quantization: nf4" in yaml.safe_dump(compose([recipe], [])):  # bitsandbytes is an extra
        overrides += [("model.base.quantization", "null"), ("trainer.precision", "bf16-mixed")]
    # The methods' common settings want a method.
    method = ["configs/method/cat.yaml"] if "/methods_" in recipe else []
    config = compose([recipe, *method], overrides)
    check(config, "fit")
    cli = instantiate(with_defaults(config))
    # Recipes for `thundercat test` and `predict` train nothing.
    text = (ROOT / recipe).read_text()
    trains = not any(f"thundercat {name} --config" in text for name in ("test", "predict"))
    assert cli.trainer.max_steps > 0 or not trains
    assert not hasattr(cli.model, "model")  # nothing is loaded yet


@pytest.mark.parametrize("recipe", [r for r in RECIPES if "experiment" in r])
def test_every_recipe_has_a_header(recipe: str, in_root: Path) -> None:
    assert (ROOT / recipe).read_text().startswith("# ")


def test_every_field_of_the_recipes_classes_is_documented(in_root: Path) -> None:
    from experiments.config.help import classes, fields

    missing = []
    for recipe in RECIPES:
        for path, cls in classes(compose([recipe], [])):
            if not cls.__module__.startswith("lightning.pytorch"):
                missing += [
                    f"{cls.__name__}.{name} ({path})" for name, _, _, text in fields(cls) if not text.strip()
                ]
    assert not missing


TEST_SPLIT = "configs/data/tinychat_test.yaml"
BLOCKS = "configs/evaluation/tinychat_blocks.yaml"


def splits(node: Any) -> list[str]:
    """Every value of a field `split` below a node."""
    if isinstance(node, list):
        return [split for item in node for split in splits(item)]
    if not isinstance(node, dict):
        return []
    own = [node["split"]] if "split" in node else []
    return own + [split for value in node.values() for split in splits(value)]


@pytest.mark.parametrize("recipe", RECIPES)
@pytest.mark.parametrize("more", [[], [BLOCKS]], ids=["alone", "with blocks"])
def test_no_recipe_reads_the_test_split(recipe: str, more: list[str], in_root: Path) -> None:
    # What `fit` evaluates is looked at while a recipe is tuned; the test split is for finished runs.
    data = compose([recipe, *more], [])["data"]
    assert "test" not in splits(data)
    if "tinychat" in recipe and "red_team" not in recipe:
        assert "validation" in splits(data["init_args"]["evaluation"])


@pytest.mark.parametrize(
    "files",
    [
        ["configs/quickstart.yaml", TEST_SPLIT],
        ["configs/quickstart.yaml", BLOCKS, TEST_SPLIT],
        ["configs/quickstart.yaml", TEST_SPLIT, BLOCKS],
        ["configs/experiment/attack_tinychat.yaml", TEST_SPLIT],
    ],
)
def test_one_file_puts_the_test_split_in_place_of_validation(files: list[str], in_root: Path) -> None:
    config = compose(files, [])
    evaluation = config["data"]["init_args"]["evaluation"]
    assert set(splits(evaluation)) == {"test"}
    assert [evaluation["harmful"][0]["init_args"][name] for name in ("limit", "wordings")] == [200, "all"]
    check(config, "test")


@pytest.mark.parametrize("blocks", [[], [BLOCKS]], ids=["plain", "with named sets"])
def test_the_test_split_replaces_the_rows_of_a_finished_run(
    blocks: list[str], in_root: Path, tmp_path: Path
) -> None:
    """A run folder's configuration is resolved: nothing of its evaluation may stay beside the new rows."""
    resolved = tmp_path / "config.yaml"
    resolved.write_text(yaml.safe_dump(compose(["configs/quickstart.yaml", *blocks], [])))
    evaluation = compose([str(resolved), TEST_SPLIT], [])["data"]["init_args"]["evaluation"]
    assert set(splits(evaluation)) == {"test"}
    assert {subject: len(evaluation[subject]) for subject in SUBJECTS} == dict.fromkeys(SUBJECTS, 1)


def test_a_split_can_be_set_on_the_command_line(in_root: Path) -> None:
    config = compose(["configs/quickstart.yaml", BLOCKS], [("vars.split", "test")])
    assert set(splits(config["data"]["init_args"]["evaluation"])) == {"test"}


def test_unlike_prompts_are_at_most_a_hundred_a_set(in_root: Path) -> None:
    config = compose(["configs/quickstart.yaml", BLOCKS], [])
    sets = instantiate(with_defaults(config)).datamodule.evaluation.blocks
    count = {
        (name, subject): len([*source.rows()])
        for name, block in sets.items()
        for subject in ("harmful", "harmless")
        for source in getattr(block, subject)
    }
    assert {name for name, _ in count} >= {
        "heldout_wordings",
        "unseen_verbs",
        "unseen_objects",
        "look_alikes",
    }
    assert {*KINDS, "mixed", "salad"} <= {name for name, _ in count}
    assert count.pop(("unseen_verbs", "harmful")) == 80  # all there are
    assert set(count.values()) == {100}


@pytest.mark.parametrize(
    ("files", "command"),
    [
        (["experiment/cat_smollm2.yaml", "model/smollm2_135m.yaml"], "fit"),
        (["experiment/smollm2_aligned.yaml"], "fit"),
        (["experiment/smollm2_replies.yaml"], "predict"),
    ],
)
def test_smollm2_of_the_hub_is_one_more_file(files: list[str], command: str, in_root: Path) -> None:
    config = compose([f"configs/{file}" for file in [*files, "model/smollm2_hub.yaml"]], [])
    check(config, command)
    wanted = {"name_or_path": "HuggingFaceTB/SmolLM2-135M-Instruct", "gguf_file": None}
    model, tokenizer = config["model"]["init_args"]["base"], config["data"]["init_args"]["tokenizer"]
    assert model.items() >= wanted.items() and tokenizer.items() >= wanted.items()


def test_dolly_is_utility_data_of_any_recipe(in_root: Path) -> None:
    config = compose(["configs/experiment/cat_smollm2.yaml", "configs/data/dolly.yaml"], [])
    check(config, "fit")
    (source,) = config["data"]["init_args"]["utility"]
    assert source["init_args"]["path"].endswith("databricks-dolly-15k.jsonl")


@pytest.mark.parametrize("suite", ["table", "suffixes", "adaptive", "page"])
def test_the_published_budgets_are_one_more_file(suite: str, in_root: Path) -> None:
    files = ["configs/experiment/cat_smollm2.yaml", "configs/data/smollm2_test.yaml"]
    files += [f"configs/evaluation/smollm2_{suite}.yaml"]
    budgets = {"num_steps", "width", "topk", "test_limit", "max_tokens", "limit"}

    def spent(node: Any) -> list[Any]:
        if isinstance(node, list):
            return [own for item in node for own in spent(item)]
        if not isinstance(node, dict):
            return []
        own = [(key, value) for key, value in node.items() if key in budgets and not isinstance(value, dict)]
        return own + [each for value in node.values() for each in spent(value)]

    small = compose(files, [])
    whole = compose([*files, "configs/evaluation/smollm2_full_budgets.yaml"], [])
    check(whole, "test")
    few, all_of_it = (spent(config["trainer"]["callbacks"]) for config in (small, whole))
    larger = [(a, b) for a, b in zip(few, all_of_it, strict=True) if a != b]
    assert len(larger) == {"table": 10, "suffixes": 4, "adaptive": 25, "page": 39}[suite]
    assert all(b[1] is None or b[1] > a[1] for a, b in larger)


def test_every_published_budget_is_one_that_a_suite_has(in_root: Path, tmp_path: Path) -> None:
    """A variable that none reads, or whose value it has, would be a promise without effect."""
    published = yaml.safe_load(Path("configs/evaluation/smollm2_full_budgets.yaml").read_text())["vars"]

    def composed(variables: dict[str, Any]) -> list[dict[str, Any]]:
        (tmp_path / "vars.yaml").write_text(yaml.safe_dump({"vars": variables}))
        suites = [f"configs/evaluation/smollm2_{suite}.yaml" for suite in ("table", "suffixes", "adaptive")]
        start = ["configs/experiment/cat_smollm2.yaml", "configs/data/smollm2_test.yaml"]
        return [compose([*start, suite, str(tmp_path / "vars.yaml")], []) for suite in suites]

    whole = composed(published)
    for name in published:
        assert composed({key: value for key, value in published.items() if key != name}) != whole, name


@pytest.mark.parametrize("attack", [[], ["configs/attack/none.yaml"]], ids=["as it is", "without an attack"])
@pytest.mark.parametrize("method", ["adversarial_fine_tuning", "capo", "cat", "lat", "mixat"])
def test_smollm2_is_defended_from_either_start(method: str, attack: list[str], in_root: Path) -> None:
    folders = set()
    for start in ("", "_published"):
        files = [f"configs/experiment/methods_smollm2{start}.yaml", f"configs/method/{method}.yaml", *attack]
        config = compose(files, [])
        check(config, "fit")
        base = config["model"]["init_args"]["base"]
        assert base["name_or_path"].startswith("package:" if start else "runs/smollm2_aligned")
        assert (base.get("gguf_file") is not None) == bool(start)
        assert config["data"]["init_args"]["tokenizer"]["name_or_path"] == base["name_or_path"]
        folders.add(config["trainer"]["default_root_dir"])
    assert len(folders) == 2
