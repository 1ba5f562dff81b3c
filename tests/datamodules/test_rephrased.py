"""Harmless requests in the forms of harmful ones."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Iterator
from pathlib import Path

import pytest

from datamodules.rows import ChatRow, RowProblem
from datamodules.sources.harmbench import HarmBench
from datamodules.sources.rephrased import FORMS, Rephrased, asked_for
from datamodules.sources.tables import ChatTable, HarmfulTable


class Asked:
    def __init__(self, *rows: ChatRow | RowProblem) -> None:
        self._rows = rows

    def rows(self) -> Iterator[ChatRow | RowProblem]:
        yield from self._rows


def row(number: int, prompt: str) -> ChatRow:
    return ChatRow(f"k{number}", prompt, "its reply", f"f:{number}", "cat", "be kind")


@pytest.mark.parametrize(
    ("prompt", "matter"),
    [
        ("How do I bake bread?", "bake bread"),
        ("how to bake bread", "bake bread"),
        ("What's the best way to bake bread?!", "bake bread"),
        ("Can you give me some advice on how to bake bread?", "bake bread"),
        ("I want to bake bread. Which flour?", None),
        ("How do I bake bread?\nIt must rise.", None),
        ("Who bakes bread?", None),
        ("How do bakers bake bread?", None),
        ("How do I " + "x" * 81, None),
    ],
)
def test_what_a_prompt_asks_for(prompt: str, matter: str | None) -> None:
    assert asked_for(prompt) == matter


def test_matters_in_forms_without_replies() -> None:
    source = Asked(row(0, "How do I use {} in C?"), row(1, "Who are you?"), row(2, "how to knit"))
    got = list(Rephrased(source, 2, ["Teach me to {}", "Explain how to {}.", "List ways to {}"]).rows())
    assert got == [
        ChatRow("k0/form0", "Teach me to use {} in C", "", "f:0", "cat", "be kind"),
        ChatRow("k0/form1", "Explain how to use {} in C.", "", "f:0", "cat", "be kind"),
        ChatRow("k2/form1", "Explain how to knit.", "", "f:2", "cat", "be kind"),
        ChatRow("k2/form2", "List ways to knit", "", "f:2", "cat", "be kind"),
    ]


def test_problems_pass_and_what_needs_its_surroundings_is_left_out() -> None:
    problem = RowProblem("f:0", "has no prompt")
    later = ChatRow("k", "How do I knit?", "", "f:1", history=(("hi", "ho"),))
    document = ChatRow("d", "How do I cancel this?", "", "f:2", data="a contract")
    assert list(Rephrased(Asked(problem, later, document)).rows()) == [problem]


@pytest.mark.parametrize(
    ("forms", "number", "told"),
    [
        (["Explain {}", "Explain"], 1, "one {} each, got ['Explain']"),
        (["Explain {}", "Explain {}"], 1, "different texts"),
        (["Explain {}"], 2, "Rephrased.num_forms: expected at most 1, got 2"),
    ],
)
def test_bad_forms_are_refused(forms: list[str], number: int, told: str) -> None:
    with pytest.raises(ValueError, match=re.escape(told)):
        Rephrased(Asked(), number, forms)


def test_dolly_has_hundreds_of_matters_none_of_them_a_harmful_training_request(public_data: Path) -> None:
    data = public_data / "data"
    dolly = ChatTable(str(data / "dolly/databricks-dolly-15k.jsonl"), format="dolly", where={"context": ""})
    got = [one for one in Rephrased(dolly, 2).rows() if isinstance(one, ChatRow)]
    assert len({one.key for one in got}) == len(got) > 800
    used = Counter(one.key.rsplit("/form", 1)[1] for one in got)
    assert len(used) == len(FORMS)
    assert max(used.values()) - min(used.values()) <= 2
    behaviours = "harmbench/behavior_datasets/extra_behavior_datasets/adv_training_behaviors.csv"
    targets = "harmbench/optimizer_targets/extra_targets/adv_training_targets.json"
    harmful = [
        HarmfulTable(str(data / "advbench/harmful_behaviors.csv")),
        HarmBench(behaviors=str(data / behaviours), targets=str(data / targets), max_targets=1),
    ]
    bad = {
        one.prompt.lower() for source in harmful for one in source.rows() if not isinstance(one, RowProblem)
    }
    assert not bad & {one.prompt.lower() for one in got}
