"""Perplexity: windows, hand-derived values, parity with a loop, intervals, resumption, the command line."""

from __future__ import annotations

import json
import logging
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import yaml
from hypothesis import given, settings
from hypothesis import strategies as st

from callbacks.evaluations import perplexity as module
from callbacks.evaluations.perplexity import PerplexityEvaluation, windows_of
from callbacks.evaluations.schedule import Schedule
from callbacks.evaluations.session import Place, Session
from callbacks.metrics.names import Metric
from callbacks.metrics.perplexity import perplexity, perplexity_difference
from datamodules.results import ResultsStore
from lightning_modules.models.adapters import disabled_adapters
from lightning_modules.models.language_model import LanguageModel
from lightning_modules.models.loading import LoraSettings, ModelConfig, load_seeded
from tests.conftest import chat_model, tinychat_format
from tests.support.small_run import small_config

TEXT = (
    " \n = A River = \n\n The long river runs from the north to the sea .\nIts water is cold \u2014 "
    "\u00e9t\u00e9 and hiver alike \U0001f30a . Boats go up and down , bread and salt aboard .\n"
) * 3
TOKENIZER = tinychat_format().tokenizer


def text_file(folder: Path, text: str = TEXT) -> str:
    path = folder / "text.txt"
    path.write_bytes(text.encode())
    return str(path)


def evaluation(folder: Path, **settings: Any) -> PerplexityEvaluation:
    return PerplexityEvaluation({"river": text_file(folder)}, **{"context": 32, "stride": 16, **settings})


def opened(
    folder: Path, own: PerplexityEvaluation, model: LanguageModel | None = None, **place: Any
) -> Session:
    """A session of `thundercat test`; texts need no evaluation data."""
    own_place = Place(model or chat_model(), folder, "test", 0, **place)
    return Session(own_place, None, [own])  # type: ignore[arg-type]


def measured(session: Session) -> dict[str, float]:
    """The nats of every window."""
    for job in session.jobs:
        session.do(job)
    return {row.example: float(next(iter(row.verdicts.values()))["score"] or 0) for row in session.rows}


def value(session: Session, unit: str) -> float:
    metric = Metric(f"{unit}_perplexity", "utility", block="river")  # type: ignore[arg-type]
    return session.finish().measures[metric].estimate.value


# --- windows


@settings(max_examples=60, deadline=None)
@given(
    text=st.text(st.sampled_from("ab \n\té\u2014\U0001f30a."), min_size=1, max_size=80),
    stride=st.integers(1, 9),
    extra=st.integers(1, 9),
    limit=st.none() | st.integers(1, 40),
)
def test_every_token_word_and_byte_is_counted_once(
    text: str, stride: int, extra: int, limit: int | None
) -> None:
    ids = TOKENIZER(text, add_special_tokens=False)["input_ids"]
    n = len(ids) if limit is None else min(limit, len(ids))
    context = stride + extra
    windows = windows_of(text, TOKENIZER, context, stride, limit)
    scored = [token for window in windows for token in window.ids[-window.scored :]]
    assert scored == ids[:n]
    spelled = "".join(window.text for window in windows)
    assert text.startswith(spelled) and (n < len(ids) or spelled == text)
    # A word that the last token only begins counts: its beginning is scored.
    assert sum(window.words for window in windows) == len(spelled.split())
    for i, window in enumerate(windows):
        assert len(window.ids) == min(context, i * stride + window.scored + 1)
        assert len(window.ids) - window.scored >= min(extra, i * stride + 1)


def test_the_first_token_is_predicted_from_bos() -> None:
    (first, *_) = windows_of(TEXT, TOKENIZER, 32, 16)
    assert first.ids[0] == TOKENIZER.bos_token_id
    assert first.scored == len(first.ids) - 1 == 16


# --- numbers


def test_a_uniform_model_has_the_size_of_its_vocabulary(tmp_path: Path) -> None:
    """Logits of zero give 1/V for every token: perplexity V = 2048, and V^(tokens / bytes) a byte."""
    model = chat_model()
    with torch.no_grad():
        model.module.lm_head.weight.zero_()  # type: ignore[union-attr, operator]
    session = opened(tmp_path / "run", evaluation(tmp_path), model)
    measured(session)
    tokens = len(TOKENIZER(TEXT, add_special_tokens=False)["input_ids"])
    assert value(session, "token") == pytest.approx(2048, rel=1e-5)
    assert value(session, "byte") == pytest.approx(2048 ** (tokens / len(TEXT.encode())), rel=1e-5)
    assert value(session, "word") == pytest.approx(2048 ** (tokens / len(TEXT.split())), rel=1e-5)


def test_the_nats_are_those_of_a_plain_loop(tmp_path: Path) -> None:
    """Token by token: log softmax of the logits after at most `context` - 1 tokens of the window."""
    model, context, stride, limit = chat_model(), 32, 12, 50
    session = opened(
        tmp_path / "run", evaluation(tmp_path, context=context, stride=stride, max_tokens=limit), model
    )
    found = measured(session)
    ids = [TOKENIZER.bos_token_id, *TOKENIZER(TEXT, add_special_tokens=False)["input_ids"]]
    expected: dict[str, float] = {}
    for t in range(1, limit + 1):
        window = (t - 1) // stride
        start = max(0, min((window + 1) * stride, limit) + 1 - context)
        with torch.no_grad():
            logits = model.module(input_ids=torch.tensor([ids[start:t]])).logits[0, -1]
        key = f"river/{window:06d}"
        expected[key] = expected.get(key, 0.0) - float(logits.log_softmax(-1)[ids[t]])
    assert list(found) == list(expected)
    assert [*found.values()] == pytest.approx([*expected.values()], rel=1e-5)
    assert value(session, "token") == pytest.approx(math.exp(sum(expected.values()) / limit), rel=1e-5)


def test_adapters_count(tmp_path: Path) -> None:
    weights = load_seeded(ModelConfig("tinychat:aligned", lora=LoraSettings(r=2)), 0)
    model = LanguageModel(weights, tinychat_format())
    plain = measured(opened(tmp_path / "plain", evaluation(tmp_path), model))
    with torch.no_grad():
        for name, weight in weights.named_parameters():
            if "lora_B" in name:
                weight.fill_(0.02)
    trained = measured(opened(tmp_path / "trained", evaluation(tmp_path), model))
    assert trained != plain
    with disabled_adapters(weights):
        assert measured(opened(tmp_path / "off", evaluation(tmp_path), model)) == plain
    assert weights.training


def test_the_interval_is_that_of_a_plain_block_bootstrap() -> None:
    """8 windows: blocks of ceil(8^(1/3)) = 2 consecutive ones, around the end too."""
    nats, units = np.arange(1.0, 9.0), np.array([2, 1, 3, 2, 2, 4, 1, 2])
    starts = np.random.default_rng(0).integers(8, size=(4999, 4))
    values = []
    for draw in starts:
        chosen = [(start + step) % 8 for start in draw for step in (0, 1)]
        values.append(math.exp(nats[chosen].sum() / units[chosen].sum()))
    own = perplexity(list(nats), list(units))
    assert own.value == pytest.approx(math.exp(36 / 17))
    # Quantiles commute with exp up to the interpolation between two neighbours.
    assert (own.low, own.high) == pytest.approx(tuple(np.quantile(values, (0.025, 0.975))), rel=1e-2)
    assert (own.n, own.kind) == (8, "perplexity")


def test_equal_windows_leave_no_doubt_and_pairs_cancel_what_both_share() -> None:
    same = perplexity([4.0] * 9, [2] * 9)
    assert (same.low, same.value, same.high) == pytest.approx((math.exp(2),) * 3)
    draw = np.random.default_rng(1)
    before = draw.uniform(10, 60, 40)
    apart = perplexity(list(before), [10] * 40)
    change, low, high = perplexity_difference(list(before), list(before + 1), [10] * 40)
    # Every window is 0.1 nats per token worse: the ratio is exp(0.1) in every resample.
    assert change == pytest.approx(apart.value * (math.exp(0.1) - 1))
    assert (low, high) == pytest.approx((apart.low * math.expm1(0.1), apart.high * math.expm1(0.1)))
    assert perplexity_difference(list(before), list(before), [10] * 40) == (0.0, 0.0, 0.0)


def test_a_window_without_a_number_makes_no_perplexity() -> None:
    assert math.isnan(perplexity([1.0, math.nan], [1, 1]).value)
    assert math.isnan(perplexity_difference([1.0, 1.0], [1.0, math.nan], [1, 1])[0])


def test_a_damaged_model_is_said(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    model = chat_model()
    with torch.no_grad():
        model.module.lm_head.weight.fill_(math.nan)  # type: ignore[union-attr, operator]
    session = opened(tmp_path / "run", evaluation(tmp_path), model)
    with caplog.at_level(logging.WARNING):
        measured(session)
    assert "river/000000: the model's log-likelihood is no number" in caplog.text
    assert math.isnan(value(session, "token"))
    # What is on disk can be read again.
    assert math.isnan(value(opened(tmp_path / "run", evaluation(tmp_path), model), "token"))


# --- rows


def test_what_is_on_disk_is_not_scored_again(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    own = evaluation(tmp_path, batch_size=2)
    whole = measured(opened(tmp_path / "whole", own))
    first = opened(tmp_path / "run", own)
    for job in first.jobs[:2]:
        first.do(job)
    scored: list[int] = []
    nats = module.window_nats
    monkeypatch.setattr(module, "window_nats", lambda m, w: scored.append(len(w)) or nats(m, w))
    again = opened(tmp_path / "run", own)
    assert measured(again) == whole
    assert sum(scored) == len(whole) - 4


def test_processes_share_the_windows(tmp_path: Path) -> None:
    own = evaluation(tmp_path, batch_size=2)
    whole = measured(opened(tmp_path / "whole", own))
    shares = [measured(opened(tmp_path / "run", own, rank=rank, world_size=2)) for rank in (0, 1)]
    assert all(shares) and shares[0].keys().isdisjoint(shares[1])
    assert shares[0] | shares[1] == whole
    (measurement,) = ResultsStore(tmp_path / "run").measurements
    assert (measurement.n, measurement.block) == (len(whole), "river")


def test_what_decides_a_number_is_in_the_settings(tmp_path: Path) -> None:
    def digest(own: PerplexityEvaluation, **place: Any) -> str:
        return opened(tmp_path / "run", own, **place).jobs[0].measurement.settings

    ways = [
        evaluation(tmp_path),
        evaluation(tmp_path, context=40),
        evaluation(tmp_path, stride=8),
        evaluation(tmp_path, max_tokens=40),
        evaluation(tmp_path, schedule=Schedule(test_limit=3)),
    ]
    digests = {digest(own) for own in ways} | {digest(ways[0], precision="bf16-mixed")}
    assert len(digests) == 6
    assert digest(evaluation(tmp_path, batch_size=3)) in digests
    text_file(tmp_path, TEXT + "More .")
    assert digest(PerplexityEvaluation({"river": str(tmp_path / "text.txt")}, 32, 16)) not in digests


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"stride": 32}, r"PerplexityEvaluation.stride: expected less than context \(32\), got 32"),
        (
            {"context": 300},
            r"PerplexityEvaluation.context: expected at most the model's 256 positions, got 300",
        ),
        ({"max_tokens": 9}, r"texts.river: expected a text of two windows or more, got 1; lower stride"),
    ],
)
def test_windows_that_cannot_be_are_named(tmp_path: Path, change: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        opened(tmp_path / "run", evaluation(tmp_path, **change))


def test_texts_that_cannot_be_are_named(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="texts: expected one or several, got none"):
        PerplexityEvaluation({})
    for content, message in ((b"\xff\xfe", "not UTF-8"), (b" \n", "expected a text, got an empty one")):
        (tmp_path / "bad.txt").write_bytes(content)
        own = PerplexityEvaluation({"bad": str(tmp_path / "bad.txt")}, 32, 16)
        with pytest.raises(ValueError, match=f"PerplexityEvaluation.texts.bad: .*{message}"):
            opened(tmp_path / "run", own)


# --- the command line


def suite(folder: Path) -> Path:
    own = {"texts": {"river": text_file(folder)}, "context": 32, "stride": 16, "schedule": {"at_start": True}}
    callbacks = [
        {"class_path": "callbacks.report.report.RunReport"},
        {"class_path": "callbacks.evaluations.perplexity.PerplexityEvaluation", "init_args": own},
    ]
    path = folder / "suite.yaml"
    path.write_text(yaml.safe_dump({"trainer": {"callbacks+": callbacks}}), encoding="utf-8")
    return path


def test_from_the_command_line_to_the_report(
    tmp_path: Path, thundercat: Callable[..., tuple[int, str, str]]
) -> None:
    words = ("--config", str(small_config(tmp_path)), "--config", str(suite(tmp_path)))
    status, out, err = thundercat("fit", *words)
    assert status == 0, err
    assert "river: perplexity per word" in out and "sliding_window@context=32,stride=16: every token" in out
    report = (tmp_path / "run" / "report.md").read_text(encoding="utf-8")
    row = next(line for line in report.splitlines() if line.startswith("| river: perplexity per token |"))
    cells = [cell.strip() for cell in row.strip("|").split("|")]
    before, after, difference = (float(cell.split()[0]) for cell in cells[1:4])
    assert difference == pytest.approx(after - before, abs=0.006 * before) and difference != 0
    tokens = len(TOKENIZER(TEXT, add_special_tokens=False)["input_ids"])
    assert cells[4:] == [str(tokens), str(math.ceil(tokens / 16)), "sliding_window@context=32,stride=16"]
    exported = json.loads((tmp_path / "run" / "results.json").read_text())
    own = exported["after"]["measures"]["utility/river/token_perplexity"]
    assert (own["units"], own["n"], own["kind"]) == (tokens, math.ceil(tokens / 16), "perplexity")
    assert exported["differences"]["utility/river/token_perplexity"]["n"] == math.ceil(tokens / 16)
    # A trained model tested by itself says what it said at the end of training.
    status, out, err = thundercat("test", *words, "--ckpt_path", "last")
    assert status == 0, out + err
    tested = json.loads((tmp_path / "run" / "test_results.json").read_text())
    assert tested["after"]["measures"]["utility/river/token_perplexity"]["value"] == pytest.approx(
        own["value"]
    )


def test_a_text_that_is_missing_ends_before_training(
    tmp_path: Path, thundercat: Callable[..., tuple[int, str, str]]
) -> None:
    path = suite(tmp_path)
    (tmp_path / "text.txt").unlink()
    status, _, err = thundercat("fit", "--config", str(small_config(tmp_path)), "--config", str(path))
    assert status == 1
    assert "PerplexityEvaluation.texts.river: cannot read" in err.splitlines()[-1]
    assert not (tmp_path / "run" / "checkpoints").exists()


def test_wikitext_is_read(public_data: Path) -> None:
    text = module.read_text("texts", str(public_data / "data" / "wikitext2" / "test.txt"))
    windows = windows_of(text, TOKENIZER, 256, 128, 50_000)
    assert sum(window.scored for window in windows) == 50_000
    assert sum(window.words for window in windows) == len("".join(window.text for window in windows).split())
