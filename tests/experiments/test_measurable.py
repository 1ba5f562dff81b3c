"""What no evaluation would measure is refused before the first training, and nothing else is."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest

from experiments.config.compose import compose
from experiments.config.errors import ConfigError
from experiments.studies.definition import Column
from experiments.studies.measurable import attacks_of, check_columns_measured, check_curves

EVALUATIONS = "callbacks.evaluations"


def config(*suites: tuple[str, dict[str, Any]], data: str = "datamodules.data.DataModule") -> dict[str, Any]:
    return {
        "trainer": {
            "callbacks": [
                {"class_path": f"{EVALUATIONS}.{path}", "init_args": arguments} for path, arguments in suites
            ]
        },
        "data": {
            "class_path": data,
            "init_args": {"evaluation": {"blocks": {"typing": {}, "polite": {}, "plain": {}}}},
        },
    }


def robustness(**arguments: Any) -> tuple[str, dict[str, Any]]:
    return "robustness.RobustnessEvaluation", {"attacks": {"pgd": {}, "gcg": {}}, **arguments}


def blocks(*sets: str) -> tuple[str, dict[str, Any]]:
    return "blocks.BlockEvaluation", {"sets": [*sets] or None}


REFUSALS, UTILITY = ("refusal.RefusalEvaluation", {}), ("utility.UtilityEvaluation", {})
WORDINGS = "wordings.WordingEvaluation", {"plain": "plain", "reworded": "polite"}
ARC = {"task": "arc_easy", "metric": "acc_norm", "num_fewshot": 5, "docs": {"class_path": "x.Y"}}
BENCHMARKS = "benchmark.BenchmarkEvaluation", {"benchmarks": [ARC]}
TEXTS = "perplexity.PerplexityEvaluation", {"texts": {"wiki": "wiki.txt"}}
CERTIFICATION: tuple[str, dict[str, Any]] = ("certification.CertificationEvaluation", {})
SUCCESS = Column("success_rate", "harmful", "pgd")
TYPING = Column("refusal_rate", "harmful", block="typing")
AWAY = Column("robust_accuracy", "utility", "pgd_away_from_answer")
TOWARDS = Column("forced_refusal_rate", "harmless", "pgd_towards_refusal")
BENIGN = Column("over_refusal_rate", "harmless", "pgd")
JUDGED = Column("judged_rate", "harmful", "pgd", judge="target_prefix@1")
PREFIX = {"class_path": "callbacks.judges.exact.TargetPrefix"}


@pytest.mark.parametrize(
    ("column", "suite"),
    [
        (SUCCESS, robustness()),
        (Column("success_rate", "harmful", "worst_case"), robustness()),
        (Column("not_refused_rate", "harmful", "worst_case_text"), robustness()),
        (Column("success_rate", "harmful", "initial_suffix"), ("robustness.GCGEvaluation", {})),
        (BENIGN, robustness(benign={"limit": 3})),
        (Column("passes_per_example", "harmful", "pgd"), robustness()),
        (Column("loss_best", "harmless", "pgd"), robustness()),
        (TOWARDS, robustness(benign={})),
        (AWAY, robustness(benign={"away_from_answer": ["pgd"]})),
        (JUDGED, robustness(judges=[PREFIX])),
        (JUDGED, robustness(judges=[{"class_path": "somebody.Own", "init_args": {"name": "x"}}])),
        (TYPING, blocks()),
        (TYPING, blocks("typing")),
        (Column("refusal_rate", "harmful", block="polite"), WORDINGS),
        (Column("full_refusal_rate", "harmless", block="xstest"), ("xstest.XSTestEvaluation", {})),
        (Column("accuracy", "utility", block="arc_easy_acc_norm_5shot"), BENCHMARKS),
        (Column("word_perplexity", "utility", block="wiki"), TEXTS),
        (Column("certified_rate", "harmful", block="certified"), CERTIFICATION),
        (Column("refusal_rate", "harmful"), REFUSALS),
        (Column("exact_match", "utility"), UTILITY),
    ],
)
def test_what_is_measured_passes(column: Column, suite: tuple[str, dict[str, Any]]) -> None:
    check_columns_measured({"x": column}, config(suite))


@pytest.mark.parametrize(
    ("column", "suite", "field"),
    [
        (Column("success_rate", "harmful", "pdg"), robustness(), "attack"),
        (Column("success_rate", "harmful", "worst_case"), robustness(attacks={"pgd": {}}), "attack"),
        (BENIGN, robustness(), "attack"),
        (TOWARDS, robustness(benign={"towards_refusal": False}), "attack"),
        (AWAY, robustness(benign={"away_from_answer": ["gcg"]}), "attack"),
        (JUDGED, robustness(judges=[{"class_path": "callbacks.judges.keyword.KeywordRefusal"}]), "judge"),
        (TYPING, robustness(), "block"),
        (TYPING, blocks("polite"), "block"),
        (Column("refusal_rate", "harmful", block="robustness"), robustness(), "block"),
        (Column("exact_match", "utility"), REFUSALS, "quantity"),
        (Column("over_refusal_rate", "harmless"), UTILITY, "quantity"),
        (Column("served_rate", "harmful", block="xstest"), ("xstest.XSTestEvaluation", {}), "quantity"),
        (Column("loss_best", "harmful", "worst_case"), robustness(), "attack"),
    ],
)
def test_what_would_be_missed_is_refused(
    column: Column, suite: tuple[str, dict[str, Any]], field: str
) -> None:
    # A callback of Lightning's beside it measures nothing.
    asked = config(suite)
    asked["trainer"]["callbacks"].append({"class_path": "lightning.pytorch.callbacks.EarlyStopping"})
    with pytest.raises(ConfigError, match=f"columns.x.{field}: .* is in none of its evaluations"):
        check_columns_measured({"x": column}, asked)
    optional = Column(
        column.quantity, column.subject, column.attack, column.block, column.judge, optional=True
    )
    check_columns_measured({"x": optional}, asked)


@pytest.mark.parametrize("optional", [False, True])
@pytest.mark.parametrize(
    ("column", "said"),
    [
        (Column("exact_match", "harmful"), "subject: 'exact_match' is of utility prompts, got 'harmful'"),
        (Column("success_rate", "utility", "pgd"), "subject: 'success_rate' is of harmful prompts"),
        (Column("robust_accuracy", "harmful", "pgd"), "subject: 'robust_accuracy' is of utility prompts"),
        (Column("loss_best", "harmful"), "attack: 'loss_best' is measured under an attack; name one"),
        (Column("refusal_rate", "harmful", "pgd"), "attack: 'refusal_rate' is not measured under an attack"),
        (Column("served_rate", "harmless"), "block: 'served_rate' is measured of a named set; name it"),
    ],
)
def test_what_nobody_could_measure_is_refused(column: Column, said: str, optional: bool) -> None:
    with pytest.raises(ConfigError, match=f"columns.x.{said}"):
        check_columns_measured({"x": replace(column, optional=optional)}, config(robustness(), blocks()))


def test_what_somebody_else_measures_is_not_judged() -> None:
    own = config(robustness())
    own["trainer"]["callbacks"].append({"class_path": "somebody.Evaluation"})
    check_columns_measured({"x": Column("success_rate", "harmful", "theirs")}, own)
    assert attacks_of(own) is None
    check_columns_measured({"x": TYPING}, config(data="somebody.Data"))
    alone = config()
    alone["trainer"]["callbacks"] = {"class_path": f"{EVALUATIONS}.utility.UtilityEvaluation"}
    check_columns_measured({"x": Column("exact_match", "utility")}, alone)


def test_a_curve_is_of_an_attack_that_some_run_meets() -> None:
    met = [attacks_of(config(robustness())), attacks_of(config(REFUSALS))]
    check_curves(["pgd"], met)
    check_curves(["nonsense"], [*met, None])
    with pytest.raises(ConfigError, match="curves.1: 'soft' is in none of its evaluations"):
        check_curves(["gcg", "soft"], met)


def test_the_evaluations_of_the_real_model_s_failure_modes_are_all_there() -> None:
    """A file that sets `callbacks` had dropped those that it included."""
    own = compose(
        [
            "configs/experiment/ablation_smollm2.yaml",
            "configs/data/smollm2_test.yaml",
            "configs/evaluation/failure_modes_smollm2.yaml",
        ],
        [],
    )
    names = [str(node["class_path"]).rpartition(".")[2] for node in own["trainer"]["callbacks"]]
    assert {"RefusalEvaluation", "RobustnessEvaluation", "WordingEvaluation", "BlockEvaluation"} <= {*names}
