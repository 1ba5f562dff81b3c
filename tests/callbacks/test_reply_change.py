"""Replies against the base model's: an undefended model changes none, and shares are of known replies."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml

from callbacks.evaluations.reply_change import BLOCK, CHANGED, ReplyChangeEvaluation, chrf
from callbacks.evaluations.schedule import Schedule
from callbacks.evaluations.session import Place, Session
from callbacks.metrics.names import Metric, Quantity
from callbacks.report.page import samples
from callbacks.report.results import RunResults, Snapshot
from datamodules.evaluation import Block, EvaluationData, EvaluationSets
from datamodules.result_lines import BASE
from datamodules.results import ResultsStore
from datamodules.sources.tables import ChatTable
from datamodules.sources.tinychat.sources import TinyChatBenign
from datamodules.text.tokenizers import TokenizerConfig
from lightning_modules.models.frozen import Reference
from lightning_modules.models.language_model import LanguageModel
from lightning_modules.models.loading import LoraSettings, ModelConfig, load_seeded
from tests.conftest import tinychat_format
from tests.support.small_run import small_config

Replies = list[list[str]]
REFUSAL = "I'm sorry, but I can't help with that."


def evaluation_data(n: int = 4, **sets: Any) -> EvaluationData:
    own = {"utility": [TinyChatBenign("validation", num_rows=n)], **sets}
    data = EvaluationData(TokenizerConfig("tinychat:aligned"), EvaluationSets(**own))
    data.setup("test")
    return data


def loaded(lora: bool, **config: Any) -> tuple[LanguageModel, Reference]:
    base = ModelConfig("tinychat:aligned", lora=LoraSettings(r=2) if lora else None, **config)
    model = LanguageModel(load_seeded(base, 0), tinychat_format())
    return model, Reference(model, base, 0)


def opened(
    folder: Path, model: LanguageModel, base: Any, data: EvaluationData | None = None, **settings: Any
) -> Session:
    own = ReplyChangeEvaluation(**{"max_new_tokens": 24, **settings})
    own.attach(data or evaluation_data())
    place = Place(model, folder, "test", 0, base=base)
    return Session(place, own._data, [own])  # type: ignore[arg-type]


def finished(session: Session) -> Snapshot:
    for job in session.jobs:
        session.do(job)
    return session.finish()


def measures(snapshot: Snapshot, subject: Any = "utility") -> dict[Quantity, tuple[float, int]]:
    return {
        m.metric.quantity: (m.estimate.value, m.estimate.n)
        for m in snapshot.measures.values()
        if m.metric.subject == subject
    }


def spoiled(model: LanguageModel) -> None:
    """Another model in the same place."""
    with torch.no_grad():
        for name, weight in model.module.named_parameters():
            if weight.requires_grad and ("lora_B" in name or "mlp" in name):
                weight += 0.5 * torch.randn(weight.shape, generator=torch.Generator().manual_seed(1))


# --- an undefended model, and a changed one


@pytest.mark.parametrize("lora", [True, False])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_an_undefended_model_changes_no_reply(tmp_path: Path, lora: bool, dtype: torch.dtype) -> None:
    model, base = loaded(lora)
    # As trainer.precision: bf16-true does; the base is to compute alike.
    model.module.to(dtype)
    found = measures(finished(opened(tmp_path, model, base)))
    assert found == {
        "change_rate": (0.0, 4),
        "newly_refused_rate": (0.0, 4),
        "newly_answered_rate": (0.0, 4),
        "spoiled_rate": (0.0, 4),
        "mended_rate": (0.0, 4),
        "similarity": (1.0, 4),
    }


@pytest.mark.parametrize("lora", [True, False])
def test_a_changed_model_is_compared_with_its_base(tmp_path: Path, lora: bool) -> None:
    model, base = loaded(lora)
    plain = finished(opened(tmp_path / "plain", model, base))
    spoiled(model)
    weights = {name: value.clone() for name, value in model.module.state_dict().items()}
    learning = [p.requires_grad for p in model.module.parameters()]
    session = opened(tmp_path / "run", model, base)
    found = measures(finished(session))
    assert found["change_rate"][0] > 0 and found["similarity"][0] < 1
    before = {sample.key: sample.reply for sample in plain.samples}
    assert {row.example: row.base_reply for row in session.rows} == before
    # The model is as it was: adapters on, in training mode, learning.
    assert all(torch.equal(value, weights[name]) for name, value in model.module.state_dict().items())
    assert [p.requires_grad for p in model.module.parameters()] == learning
    assert model.module.training


# --- known replies


@pytest.fixture
def scripted(monkeypatch: pytest.MonkeyPatch) -> Replies:
    """Replies of the calls to come, one list a call: the model's, then the base model's."""
    waiting: Replies = []
    monkeypatch.setattr(LanguageModel, "reply", lambda self, sent, decoding: waiting.pop(0))
    return waiting


class Scripted:
    """A base that says nothing by itself."""

    key = "base"

    def __init__(self, model: LanguageModel) -> None:
        self.model = model

    @contextmanager
    def alike(self) -> Iterator[LanguageModel]:
        yield self.model


def test_every_share_is_of_known_replies(tmp_path: Path, scripted: Replies) -> None:
    """Right to wrong by a refusal, wrong to right, another wrong one, a refusal answered, and two alike."""
    data = evaluation_data(6)
    right = [example.row.reply for example in data.examples["utility"]]  # type: ignore[union-attr]
    base = [right[0], "No idea.", "No idea.", REFUSAL, right[4], REFUSAL]
    now = [REFUSAL, right[1], "None.", "No idea.", right[4], REFUSAL]
    scripted += [now, base]
    model, _ = loaded(True)
    snapshot = finished(opened(tmp_path, model, Scripted(model), data))
    found = measures(snapshot)
    assert {quantity: own for quantity, own in found.items() if quantity != "similarity"} == {
        "change_rate": (4 / 6, 6),
        "newly_refused_rate": (1 / 6, 6),
        "newly_answered_rate": (1 / 6, 6),
        "spoiled_rate": (1 / 6, 6),
        "mended_rate": (1 / 6, 6),
    }
    alike = [chrf(a, b) for a, b in zip(now, base, strict=True)]
    assert found["similarity"] == (pytest.approx(sum(alike) / 6), 6)
    titles = [m.title for m in snapshot.measures.values()]
    assert "against base: replies changed, utility" in titles
    row = next(iter(ResultsStore(tmp_path)))
    assert (row.reply, row.base_reply) == (REFUSAL, right[0])
    assert row.verdict("keyword_refusal@3") and not row.verdict(BASE + "keyword_refusal@3")
    assert row.verdict(BASE + "exact_match@1") and not row.verdict("exact_match@1")


def test_prompts_without_an_expected_reply_are_neither_right_nor_wrong(
    tmp_path: Path, scripted: Replies
) -> None:
    path = tmp_path / "prompts.txt"
    path.write_text("How do I bake bread?\nWho wrote it?\n", encoding="utf-8")
    data = evaluation_data(utility=[], harmless=[ChatTable(str(path), format="lines")])
    scripted += [["Flour.", ""], ["Flour.", "She did."]]
    model, _ = loaded(True)
    found = measures(finished(opened(tmp_path, model, Scripted(model), data)), "harmless")
    assert found["change_rate"] == (0.5, 2)
    assert {"spoiled_rate", "mended_rate"}.isdisjoint(found)


def test_chrf_is_sacrebleu_s() -> None:
    sacrebleu = pytest.importorskip("sacrebleu")
    for a, b in (("The cat sat.", "The cat sits there."), ("Sure, here", REFUSAL), ("x", "y"), ("", "Yes.")):
        own = sacrebleu.CHRF(word_order=0, eps_smoothing=True).sentence_score(a, [b]).score
        assert chrf(a, b) == pytest.approx(own / 100, abs=1e-4)
    assert chrf("", "") == chrf("the same", "the same") == 1.0


def test_the_page_shows_changed_replies_first(tmp_path: Path, scripted: Replies) -> None:
    scripted += [["a", "b", "c", "d"], ["a", "x", "c", "y"]]
    model, _ = loaded(True)
    snapshot = finished(opened(tmp_path, model, Scripted(model)))
    results = RunResults(tmp_path, "test", [snapshot], [], {}, [], {}, {})
    (group,) = samples(results)
    assert group.title == "Benign tasks: against the base model"
    assert [(s.row.reply, s.row.base_reply) for s in group.shown] == [
        ("b", "x"),
        ("d", "y"),
        ("a", "a"),
        ("c", "c"),
    ]


# --- rows, settings, errors


def test_what_is_on_disk_is_not_asked_again(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    data = evaluation_data(4, batch_size=2)
    model, base = loaded(True)
    whole = measures(finished(opened(tmp_path / "whole", model, base, data)))
    first = opened(tmp_path / "run", model, base, data)
    first.do(first.jobs[0])
    asked: list[int] = []
    reply = LanguageModel.reply

    def counting(self: LanguageModel, sent: Any, *rest: Any) -> Sequence[str]:
        found = reply(self, sent, *rest)
        asked.append(len(found))
        return found

    monkeypatch.setattr(LanguageModel, "reply", counting)
    assert measures(finished(opened(tmp_path / "run", model, base, data))) == whole
    assert asked == [2, 2]


def test_what_decides_a_row_is_in_the_settings(tmp_path: Path) -> None:
    model, base = loaded(True)
    data = evaluation_data()

    def digest(other: Any = base, **settings: Any) -> str:
        return opened(tmp_path, model, other, data, **settings).jobs[0].measurement.settings

    class Never:
        name, revision = "never", "1"

        def __call__(self, prompt: str, completion: str, expected: str) -> bool:
            return False

    helpful = Reference(
        LanguageModel(load_seeded(ModelConfig("tinychat:helpful"), 0)), ModelConfig("tinychat:helpful")
    )
    ways = [digest(), digest(max_new_tokens=5), digest(schedule=Schedule(test_limit=2)), digest(helpful)]
    ways += [digest(refusal=Never()), digest(correct=Never())]
    assert len({*ways}) == 6
    assert digest() == ways[0]


def test_processes_share_the_prompts(tmp_path: Path) -> None:
    model, base = loaded(True)
    data, own = evaluation_data(5), ReplyChangeEvaluation(max_new_tokens=4)
    own.attach(data)
    place = Place(model, tmp_path, "test", 0, 0, 2, base=base)
    shares = [own.work(replace(place, rank=rank), "w") for rank in (0, 1)]
    assert [[len(job) for job in share[0][1]] for share in shares] == [[3], [2]]
    assert shares[0][0][0] == shares[1][0][0] and shares[0][0][0].n == 5


def test_nothing_to_ask_is_named(tmp_path: Path) -> None:
    model, base = loaded(True)
    with pytest.raises(
        ValueError, match=r"found no row to evaluate; set data.evaluation.harmless or data.ev"
    ):
        opened(tmp_path, model, base, evaluation_data(utility=[]))
    taken = evaluation_data(blocks={BLOCK: Block(harmless=[TinyChatBenign("validation", num_rows=1)])})
    with pytest.raises(ValueError, match=f"data.evaluation.blocks: {BLOCK} is ReplyChangeEvaluation's own"):
        opened(tmp_path, model, base, taken)


# --- the command line


def test_from_the_command_line_to_the_report(
    tmp_path: Path, thundercat: Callable[..., tuple[int, str, str]]
) -> None:
    source = {
        "class_path": "datamodules.sources.tinychat.sources.TinyChatBenign",
        "init_args": {"split": "validation", "num_rows": 6},
    }
    own = {"schedule": {"at_start": True, "limit": 4}, "max_new_tokens": 16}
    callbacks = [
        {"class_path": "callbacks.report.report.RunReport"},
        {"class_path": "callbacks.evaluations.reply_change.ReplyChangeEvaluation", "init_args": own},
    ]
    sets = {"init_args": {"evaluation": {"utility": [source]}}}
    suite = tmp_path / "suite.yaml"
    suite.write_text(yaml.safe_dump({"trainer": {"callbacks+": callbacks}, "data": sets}), encoding="utf-8")
    words = ("--config", str(small_config(tmp_path)), "--config", str(suite), "--model.optimizer.lr=0.05")
    status, out, err = thundercat("fit", *words)
    assert status == 0, err
    assert f"{CHANGED}: the two greedy replies differ" in out
    found = json.loads((tmp_path / "run" / "results.json").read_text())
    key = Metric("change_rate", "utility", block=BLOCK).key
    assert key == "utility/against_base/change_rate"
    # Before the first step it is the base model itself; three steps of this size change it.
    assert found["before"]["measures"][key]["value"] == 0
    assert found["after"]["measures"][key]["value"] > 0
    assert found["differences"][key]["gained"] > 0
    # The model before training, by itself.
    status, _, err = thundercat("test", *words)
    assert status == 0, err
    tested = json.loads((tmp_path / "run" / "test_results.json").read_text())
    assert tested["after"]["measures"][key]["value"] == 0 and tested["after"]["measures"][key]["n"] == 6
    # And the trained one, against the same base.
    status, _, err = thundercat("test", *words, "--ckpt_path=last")
    assert status == 0, err
    tested = json.loads((tmp_path / "run" / "test_results.json").read_text())
    assert tested["after"]["measures"][key]["value"] > 0
