"""Sources made of other sources."""

from __future__ import annotations

from collections.abc import Iterator

import pytest

from datamodules.rows import ChatRow, HarmfulRow, RowProblem
from datamodules.sources.combinators import RefusalsAsHarm


class Three:
    """Two conversations, one of them with an earlier turn, and a bad row."""

    def rows(self) -> Iterator[ChatRow | RowProblem]:
        yield ChatRow("a", "Add 1 and 2.", "3", "f:1", category="sum", system="Be brief.")
        yield ChatRow("b", "And 4?", "7", "f:2", history=(("Add 1 and 2.", "3"),))
        yield RowProblem("f:3", "empty")
        yield ChatRow("c", "Add 2 and 2.", "4", "f:4")


def test_the_refusal_is_the_target_and_the_right_answer_is_safe() -> None:
    rows = list(RefusalsAsHarm(Three(), ["I cannot.", "No."]).rows())
    assert rows[0] == HarmfulRow(
        "a/refused", "Add 1 and 2.", "I cannot.", "3", "f:1", category="sum", system="Be brief."
    )
    assert rows[1] == RowProblem("f:2", "has earlier turns")
    assert rows[2] == RowProblem("f:3", "empty")
    assert isinstance(rows[3], HarmfulRow)
    assert (rows[3].target, rows[3].safe_reply) == ("No.", "4")


@pytest.mark.parametrize("refusals", [[], ["No.", " "]])
def test_an_empty_refusal_is_refused(refusals: list[str]) -> None:
    with pytest.raises(ValueError, match=r"RefusalsAsHarm.refusals: expected at least one text, none empty"):
        RefusalsAsHarm(Three(), refusals)
