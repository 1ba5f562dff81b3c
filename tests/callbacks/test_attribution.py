"""Attribution of refusals: a row a request, both models in it, its picture and its table."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import pytest
import torch

from callbacks.evaluations.attribution import AttributionEvaluation
from callbacks.evaluations.schedule import Schedule
from callbacks.evaluations.session import Place, Session
from callbacks.metrics.names import Metric
from callbacks.report.attributions import MARGIN, WITHOUT, Piece, margins, pictures
from callbacks.report.load import load
from callbacks.report.page import page
from callbacks.report.results import Snapshot
from datamodules.evaluation import EvaluationData, EvaluationSets
from datamodules.result_lines import BASE
from datamodules.results import ROWS, read_rows
from datamodules.sources.tinychat.sources import TinyChatHarmful
from datamodules.text.tokenizers import TokenizerConfig
from lightning_modules.models.frozen import Reference
from lightning_modules.models.language_model import LanguageModel
from lightning_modules.models.loading import LoraSettings, ModelConfig, load_seeded
from tests.conftest import tinychat_format

TOTAL = Metric("refusal_margin", "harmful", block="attribution")


@pytest.fixture(scope="module")
def data() -> EvaluationData:
    own = EvaluationData(
        TokenizerConfig("tinychat:aligned"),
        EvaluationSets(harmful=[TinyChatHarmful("validation", num_rows=5)], batch_size=2),
    )
    own.setup("test")
    return own


def loaded(moved: float) -> tuple[LanguageModel, Reference]:
    base = ModelConfig("tinychat:aligned", lora=LoraSettings(r=2))
    model = LanguageModel(load_seeded(base, 0), tinychat_format())
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for name, weight in model.module.named_parameters():
            if "lora_B" in name:
                weight += moved * torch.randn(weight.shape, generator=generator)
    return model, Reference(model, base, 0)


def measured(
    folder: Path, data: EvaluationData, model: LanguageModel, base: Reference, **settings: Any
) -> Snapshot:
    own = AttributionEvaluation(**{"num_points": 4, **settings})
    own.attach(data)
    session = Session(Place(model, folder, "test", 0, base=base), data, [own])
    for job in session.jobs:
        session.do(job)
    return session.finish()


def test_a_row_holds_both_models_and_the_request_token_by_token(tmp_path: Path, data: EvaluationData) -> None:
    found = measured(tmp_path, data, *loaded(0.3))
    rows = read_rows(tmp_path)
    assert len(rows) == 5 and found.complete and not found.samples
    for row in rows:
        assert "".join(row.pieces).replace(" ", "") == row.prompt.replace(" ", "")
        own, known = row.contributions[MARGIN], row.contributions[BASE + MARGIN]
        assert len(own) == len(known) == len(row.pieces)
        assert own != known
        assert row.verdicts[MARGIN]["verdict"] == ((row.verdicts[MARGIN]["score"] or 0.0) > 0)
        assert {MARGIN, WITHOUT, BASE + MARGIN, BASE + WITHOUT} == row.verdicts.keys()
    scores = [float(row.verdicts[MARGIN]["score"] or 0.0) for row in rows]
    assert found.measures[TOTAL].estimate.value == pytest.approx(math.fsum(scores) / 5)
    assert [own.side for own in found.attributions] == [BASE, ""] * 5
    table = margins(load(tmp_path, "test"))
    assert [row[1].text for row in table.rows] == ["before training", "model"] * 5
    assert [row[0].order for row in table.rows] == [1, 1, 2, 2, 3, 3, 4, 4, 5, 5]
    assert not any(row.example in cells[0].text for cells in table.rows for row in rows)
    assert float(table.rows[1][2].order or 0.0) == pytest.approx(scores[0])


def test_an_untrained_model_has_one_line_a_request(tmp_path: Path, data: EvaluationData) -> None:
    found = measured(tmp_path, data, *loaded(0.0), schedule=Schedule(test_limit=2))
    assert [own.side for own in found.attributions] == ["", ""]


def test_requests_are_chosen_by_key(tmp_path: Path, data: EvaluationData) -> None:
    keys = [key for batch in data.loader("harmful", None, 0, 1) for key in batch.keys]
    found = measured(tmp_path, data, *loaded(0.0), examples=[keys[3]], schedule=Schedule(test_limit=1))
    assert [own.key for own in found.attributions] == [keys[3]] and found.complete
    with pytest.raises(ValueError, match=r"examples: found no harmful request 'nobody'; known: "):
        measured(tmp_path, data, *loaded(0.0), examples=["nobody"])


def test_what_is_on_disk_is_not_asked_again(
    tmp_path: Path, data: EvaluationData, monkeypatch: pytest.MonkeyPatch
) -> None:
    before = measured(tmp_path, data, *loaded(0.3))

    def never(*_: object) -> None:
        raise AssertionError("asked again")

    monkeypatch.setattr("callbacks.evaluations.attribution.contributions", never)
    assert measured(tmp_path, data, *loaded(0.3)).attributions == before.attributions


def test_colours_are_deep_by_the_strongest_of_both_models_and_the_page_folds_them(
    tmp_path: Path, data: EvaluationData
) -> None:
    """Contributions put into the rows by hand: -2 and +1 before, +4, 0 and nothing known after."""
    measured(tmp_path, data, *loaded(0.3), schedule=Schedule(test_limit=1))
    path = tmp_path / ROWS / "rows_rank0.jsonl"
    line = json.loads(path.read_text())
    line["pieces"] = ["<b>kill", " a", " cat"]
    line["contributions"] = {MARGIN: [4.0, 0.01, None], BASE + MARGIN: [-2.0, 1.0, 0.0]}
    path.write_text(json.dumps(line) + "\n")
    results = load(tmp_path, "test")
    (picture,) = pictures(results)
    (_, before), (title, after) = picture.lines
    assert [(own.nats, own.toward, own.share) for own in before] == [
        ("-2.00", False, 0.5),
        ("+1.00", True, 0.25),
        ("+0.00", False, 0.0),
    ]
    assert after == [
        Piece("<b>kill", "+4.00", True, 1.0),
        Piece(" a", "+0.01", True, 0.0),
        Piece(" cat", "-", False, 0.0),
    ]
    assert title.startswith("model: margin ")
    html = page(results, {})
    shown = '<span class="piece away" style="--share: 50.0%">&lt;b&gt;kill<small>-2.00</small></span>'
    assert shown in html and "<b>kill" not in html
    assert html.index("<summary>Show harmful requests</summary>") < html.index(shown)
