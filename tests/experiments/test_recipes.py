"""Every recipe and building block below configs/ is complete, documented and can be built."""

from __future__ import annotations

from pathlib import Path

import pytest

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
    attack = instantiate(with_defaults(config)).model.attack
    assert callable(attack)


@pytest.mark.parametrize("recipe", RECIPES)
def test_every_recipe_builds(
    recipe: str, in_root: Path, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    overrides = [("trainer.default_root_dir", str(tmp_path))]
    if "zephyr" in recipe:  # bitsandbytes is an extra
        overrides += [("model.base.quantization", "null"), ("trainer.precision", "bf16-mixed")]
    # The methods' common settings want a method.
    method = ["configs/method/cat.yaml"] if "/methods_" in recipe else []
    config = compose([recipe, *method], overrides)
    check(config, "fit")
    cli = instantiate(with_defaults(config))
    # Recipes for `thundercat test` train nothing.
    assert cli.trainer.max_steps > 0 or "thundercat test --config" in (ROOT / recipe).read_text()
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
