"""Progress of long work: what a terminal and a log file get."""

from __future__ import annotations

import pytest

from experiments import counting
from experiments.counting import counter


def test_a_log_gets_a_line_per_item_with_the_time_left(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    clock = iter([100.0, 160.0, 220.0, 280.0])  # an item a minute
    monkeypatch.setattr(counting.time, "monotonic", lambda: next(clock))
    with counter(4, "sweep", "trial", done=1) as bar:
        bar.update()
        bar.set_postfix_str("trial 3")
        bar.update()
        bar.update()
    assert capsys.readouterr().err.splitlines() == [
        "sweep: 2 of 4 trials, 02:00 left",
        "sweep: trial 3",
        "sweep: 3 of 4 trials, 01:00 left",
        "sweep: 4 of 4 trials",
    ]


def test_a_terminal_gets_a_bar(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(counting, "on_terminal", lambda: True)
    with counter(2, "study", "run", done=1) as bar:
        assert not isinstance(bar, counting.Lines)
        bar.update()
    assert "2/2" in capsys.readouterr().err
