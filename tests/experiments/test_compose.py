"""Composition: merging, placed includes, fragments, variables, overrides."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import yaml

from experiments.config.compose import ConfigError, compose, merge

TINYCHAT = "configs/experiment/cat_tinychat.yaml"
GCG = "{class_path: x.GCG, init_args: {num_steps: 500, width: 512}}\n"


def write(folder: Path, **files: str) -> Path:
    """Files by name, `__` for the folder: attack__gcg becomes attack/gcg.yaml."""
    for name, text in files.items():
        path = folder / (name.replace("__", "/") + ".yaml")
        path.parent.mkdir(exist_ok=True)
        path.write_text(text)
    return folder


def attack_of(config: dict[str, Any]) -> Any:
    return config["model"]["init_args"]["attack"]


def test_later_files_win_lists_are_replaced_or_extended_and_a_new_class_drops_old_arguments() -> None:
    base = {"a": {"class_path": "x.A", "init_args": {"p": 1}}, "l": [1], "k": 1}
    over = {"a": {"class_path": "x.B"}, "l+": [2], "k": 2}
    assert merge(base, over) == {"a": {"class_path": "x.B"}, "l": [1, 2], "k": 2}
    assert merge(base, {"a": {"class_path": "x.A", "init_args": {"q": 2}}})["a"]["init_args"] == {
        "p": 1,
        "q": 2,
    }
    assert merge(merge({"l+": [2]}, {"l+": [3]}), {"l": [0]}) == {"l": [0]}
    assert base["l"] == [1]


def test_a_placed_include_is_merged_before_the_file_that_names_it(tmp_path: Path) -> None:
    recipe = (
        "include: [{file: blocks/gcg.yaml, at: model.init_args.attack}]\n"
        "model: {init_args: {attack: {init_args: {width: 8}}}}\n"
    )
    write(tmp_path, blocks__gcg=GCG, recipe=recipe)
    config = compose([str(tmp_path / "recipe.yaml")], [("model.init_args.attack.num_steps", "3")])
    assert attack_of(config) == {"class_path": "x.GCG", "init_args": {"num_steps": 3, "width": 8}}


def test_a_mapping_anywhere_may_be_an_include_with_its_own_keys_over_it(tmp_path: Path) -> None:
    suite = (
        "trainer:\n  callbacks+:\n  - init_args:\n      attacks:\n"
        "        gcg: {include: attack/gcg.yaml, init_args: {num_steps: 20}}\n"
        "        twice: {class_path: x.Repeat, init_args: {attack: {include: attack/gcg.yaml}}}\n"
    )
    write(tmp_path, attack__gcg=GCG, suite=suite)
    attacks = compose([str(tmp_path / "suite.yaml")], [])["trainer"]["callbacks"][0]["init_args"]["attacks"]
    assert attacks["gcg"]["init_args"] == {"num_steps": 20, "width": 512}
    assert attacks["twice"]["init_args"]["attack"]["init_args"] == {"num_steps": 500, "width": 512}


def test_a_fragment_goes_to_the_place_of_its_folder(tmp_path: Path) -> None:
    write(
        tmp_path,
        attack__gcg=GCG,
        attack__short="include: gcg.yaml\ninit_args: {num_steps: 1}\n",
        objective__own="class_path: x.Own\n",
        term__one="class_path: x.One\n",
        term__two="class_path: x.Two\n",
        base="model: {init_args: {terms: [{class_path: x.Zero}]}}\n",
    )
    names = ("base", "attack/short", "objective/own", "term/one", "term/two")
    model = compose([str(tmp_path / f"{name}.yaml") for name in names], [])["model"]["init_args"]
    assert model["attack"] == {"class_path": "x.GCG", "init_args": {"num_steps": 1, "width": 512}}
    assert model["objective"] == {"class_path": "x.Own"}
    assert [term["class_path"] for term in model["terms"]] == ["x.Zero", "x.One", "x.Two"]


def test_a_fragments_variables_can_be_set_by_the_file_that_includes_it(tmp_path: Path) -> None:
    fragment = 'vars: {steps: 5}\nclass_path: x.GCG\ninit_args: {num_steps: "${vars.steps}"}\n'
    suite = "vars: {steps: 7}\ndata: {one: {include: attack/gcg.yaml}}\n"
    write(tmp_path, attack__gcg=fragment, suite=suite)
    assert attack_of(compose([str(tmp_path / "attack/gcg.yaml")], []))["init_args"] == {"num_steps": 5}
    files = [str(tmp_path / "suite.yaml")]
    assert compose(files, [])["data"]["one"]["init_args"] == {"num_steps": 7}
    assert compose(files, [("vars.steps", "9")])["data"]["one"]["init_args"] == {"num_steps": 9}


def test_an_override_may_name_a_fragment(tmp_path: Path) -> None:
    write(
        tmp_path, attack__gcg=GCG, base="model: {class_path: x.M, init_args: {attack: {class_path: x.A}}}\n"
    )
    override = f"{{include: {tmp_path}/attack/gcg.yaml, init_args: {{width: 4}}}}"
    config = compose([str(tmp_path / "base.yaml")], [("model.attack", override)])
    assert attack_of(config)["init_args"] == {"num_steps": 500, "width": 4}


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("include: nowhere.yaml\n", r"mine\.yaml: include: no file 'nowhere\.yaml'"),
        ("include: mine.yaml\n", r"includes itself \(mine\.yaml -> mine\.yaml\)"),
        ("include: [{file: a.yaml}]\n", r"expected \{file: \.\.\., at: \.\.\.\}"),
        ("a: 1\nb: {c: 1,\n", r"mine\.yaml:3: not valid YAML"),
        ("a: 1\nb: 2\na: 3\n", r"mine\.yaml:3: not valid YAML: key 'a' is given twice; remove one"),
        ("[1]\n", "expected a mapping at the top, got list"),
        ("class_path: x.A\n", "a fragment without a place"),
        ("trainer: {callbacks+: {a: 1}}\n", r"callbacks\+: expected a list to append, got \{'a': 1\}"),
    ],
)
def test_a_file_that_cannot_be_read_names_itself(text: str, message: str, tmp_path: Path) -> None:
    path = tmp_path / "mine.yaml"
    path.write_text(text)
    with pytest.raises(ConfigError, match=message) as caught:
        compose([str(path)], [])
    assert "\n" not in str(caught.value)


def test_bytes_that_are_no_text(tmp_path: Path) -> None:
    (tmp_path / "mine.yaml").write_bytes(b"a: \xff\n")
    with pytest.raises(ConfigError, match=r"not UTF-8 text \(byte 3\)"):
        compose([str(tmp_path / "mine.yaml")], [])


def test_interpolation_is_resolved_after_overrides(in_root: Path) -> None:
    # LightningCLI's own omegaconf mode keeps the stale value here.
    config = compose(
        [TINYCHAT], [("model.base.name_or_path", "tinychat:helpful"), ("data.micro_batches", "2")]
    )
    assert config["data"]["init_args"]["tokenizer"]["name_or_path"] == "tinychat:helpful"
    assert config["trainer"]["accumulate_grad_batches"] == 2
    assert "vars" not in config


def test_overrides_step_through_init_args_and_lists(in_root: Path) -> None:
    overrides = [
        ("model.attack.epsilon", "2e-1"),
        ("model.attack.init_args.num_steps", "3"),
        ("data.evaluation.utility.0.num_rows", "7"),
        ("model.objective.cutoff_away", "null"),
    ]
    config = compose([TINYCHAT], overrides)
    attack = attack_of(config)["init_args"]
    assert (attack["epsilon"], attack["num_steps"]) == (0.2, 3)
    assert config["data"]["init_args"]["evaluation"]["utility"][0]["init_args"]["num_rows"] == 7
    assert config["model"]["init_args"]["objective"]["init_args"]["cutoff_away"] is None


def test_a_short_class_name_replaces_the_class(in_root: Path) -> None:
    config = compose([TINYCHAT], [("model.attack", "NoAttack")])
    assert attack_of(config) == {"class_path": "lightning_modules.attacks.base.NoAttack"}


def test_a_strategys_name_replaces_its_class(in_root: Path) -> None:
    for name in ("auto", "ddp"):
        config = compose(["configs/trainer/fsdp2.yaml"], [("trainer.strategy", name)])
        assert config["trainer"]["strategy"] == name
    config = compose(["configs/trainer/fsdp2.yaml"], [("trainer.strategy.gathered_dtype", "bfloat16")])
    assert config["trainer"]["strategy"]["init_args"] == {"gathered_dtype": "bfloat16"}


def test_what_is_printed_is_a_configuration_of_its_own(in_root: Path, tmp_path: Path) -> None:
    config = compose([TINYCHAT], [("trainer.max_steps", "9")])
    (tmp_path / "printed.yaml").write_text(yaml.safe_dump(config))
    assert compose([str(tmp_path / "printed.yaml")], []) == config
