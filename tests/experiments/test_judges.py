"""`python -m experiments.judges`: labelled files to cards."""

from __future__ import annotations

from pathlib import Path

import pytest

from callbacks.judges.base import label
from callbacks.judges.card import CARDS, card_path, read_card
from callbacks.judges.keyword import KeywordRefusal
from experiments.judges import XSTEST, main

FILE = """id,request,reply,verdict
1,p,I cannot help with that.,no
2,p,"Sure, here it is.",yes
3,p,Sorry,maybe
4,p,"Yes, gladly.",no
"""
CONFIG = """labels: four replies
sets: [{{path: {path}, model: m, prompt: request, completion: reply, label: verdict, id: {id}}}]
trials:
  - judge: {{class_path: callbacks.judges.keyword.KeywordRefusal}}
    finds: refusals
    positive: ["no"]
    negative: ["yes"]
    seen: "^[12]$"
"""


def configured(folder: Path, id: str = "id") -> list[str]:
    (folder / "labels.csv").write_text(FILE, encoding="utf-8")
    text = CONFIG.format(path=folder / "labels.csv", id=id)
    (folder / "mine.yaml").write_text(text, encoding="utf-8")
    return ["--config", str(folder / "mine.yaml"), "--out", str(folder / "cards")]


def test_any_labelled_file_makes_a_card(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (card,) = main(configured(tmp_path))
    # Refuses: yes to 1 and 3, no to 2 and 4; 3 is neither positive nor negative, 1 and 2 were looked at.
    assert (card.overall.n, card.overall.positives) == (3, 2)
    assert (card.overall.recall.value, card.overall.precision.value) == (0.5, 1.0)
    assert card.unseen is not None and (card.unseen.n, card.unseen.recall.value) == (1, 0.0)
    assert (card.apart["maybe"].value, card.apart["maybe"].n) == (1.0, 1)
    stored = read_card(label(KeywordRefusal()), tmp_path / "cards")
    assert stored is not None and stored.overall.recall.value == card.overall.recall.value
    assert "Left out: `maybe`" in capsys.readouterr().out


def test_a_missing_column_is_an_error_of_one_line(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as stopped:
        main(configured(tmp_path, id="name"))
    error = capsys.readouterr().err
    assert stopped.value.code == 2 and error.count("\n") == 1
    assert "labels.csv:2: expected a column 'name', got ['id', 'reply', 'request', 'verdict']; set" in error


def test_labels_that_nobody_gave_are_an_error(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    arguments = configured(tmp_path)
    config = tmp_path / "mine.yaml"
    config.write_text(
        config.read_text(encoding="utf-8").replace('"no"', '"none"').replace('"yes"', '"x"'), "utf-8"
    )
    with pytest.raises(SystemExit):
        main(arguments)
    assert "expected replies labelled ['none', 'x'], got ['maybe', 'no', 'yes']" in capsys.readouterr().err


def test_the_packaged_cards_are_what_is_measured_today(
    public_data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Recall at least 90 % at a precision of at least 95 %, on the replies that were held out as on all."""
    monkeypatch.setenv("THUNDERCAT_DATA", str(public_data))
    measured = main(["--config", str(XSTEST), "--out", str(tmp_path)])
    for card in measured:
        assert card_path(card.judge, tmp_path).read_bytes() == card_path(card.judge, CARDS).read_bytes()
    keyword = next(card for card in measured if card.judge == label(KeywordRefusal()))
    assert keyword.unseen is not None
    for own in (keyword.overall, keyword.unseen):
        assert own.recall.value >= 0.90
        assert own.precision.value >= 0.95
