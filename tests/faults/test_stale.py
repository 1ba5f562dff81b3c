"""What went on being believed after it had changed: labels, judges' settings, another process's verdicts, a
run's rows, weights without a number."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor

from callbacks.evaluations.probe import Probe
from callbacks.evaluations.schedule import Schedule
from callbacks.evaluations.session import Place, Session
from callbacks.health import example_flags
from callbacks.judges.base import Judge, judge_all, label
from callbacks.judges.exact import ExactMatch
from callbacks.judges.grader import Grader
from callbacks.judges.model import Classifier, Rubric
from callbacks.judges.success import Fluent
from callbacks.run_folder.decisive import LEFT_OUT, decisive, differences
from datamodules.result_lines import Row
from datamodules.results import ResultsStore, read_rows
from datamodules.rows import ChatRow
from datamodules.settings import settings_digest
from datamodules.text.encoding import Encoder, EncodingConfig, evaluation_batch
from datamodules.text.tokenizers import TokenizerConfig
from lightning_modules.adversarial import AdversarialFineTuning
from lightning_modules.attacks.base import NoAttack
from lightning_modules.attacks.embedding.pgd import EmbeddingPGD
from lightning_modules.attacks.suffix.stored import StoredSuffixes
from lightning_modules.losses.toward_away import TowardAwayUtility
from lightning_modules.models import language_model
from lightning_modules.models.chat import LocalChat
from lightning_modules.models.language_model import LanguageModel
from lightning_modules.models.loading import ModelConfig
from lightning_modules.models.reply import Reply
from tests.conftest import chat_model, ragged_batch, tiny_model, tinychat_format
from tests.support.echo import Echo
from tests.support.rows import row, stored

# --- labels


class Questions:
    """Three harmless questions with the answers that count as right."""

    def __init__(self, answers: list[str], category: str = "sums") -> None:
        self.encoding = EncodingConfig(max_length=160)
        rows = [
            ChatRow(f"q/{i}", f"What is two plus {i}?", answer, f"f:{i}", category=category)
            for i, answer in enumerate(answers)
        ]
        self.rows = Encoder(tinychat_format(), self.encoding).chats(rows)
        self.examples: dict[str, Any] = {"utility": self.rows, "harmful": []}
        self.blocks: dict[str, Any] = {}

    def rows_of(self, subject: str, block: str) -> list[Any]:
        return self.rows

    def loader(self, *given: Any) -> list[Any]:
        return [evaluation_batch(self.rows[:2], "user"), evaluation_batch(self.rows[2:], "user")]


class Utility:
    """Are they answered right?"""

    name, schedule, max_new_tokens, seed = "utility", Schedule(), 8, 0

    def probes(self) -> list[Probe]:
        return [Probe("utility", "exact_match", ExactMatch())]


def measured_again(folder: Path, data: Questions, monkeypatch: pytest.MonkeyPatch) -> tuple[list[Row], int]:
    """The rows, and how many prompts the model replied to."""
    model, asked = chat_model(), 0
    usual = model.reply

    def reply(prompts: Any, *given: Any, **named: Any) -> list[str]:
        nonlocal asked
        asked += len(prompts.prompt_ids)
        return usual(prompts, *given, **named)

    monkeypatch.setattr(model, "reply", reply)
    own = Session(Place(model, folder, "test", 0), data, [Utility()])  # type: ignore[arg-type, list-item]
    return [row for job in own.jobs for row in own.do(job)], asked


def test_a_corrected_answer_is_compared_with_and_nothing_is_asked_again(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    first, asked = measured_again(tmp_path, Questions(["wrong", "wrong", "wrong"]), monkeypatch)
    right = [own.reply for own in first]
    assert asked == 3 and all(right)
    for answers, category in ((right, "sums"), (right, "arithmetic")):
        rows, asked = measured_again(tmp_path, Questions(answers, category), monkeypatch)
        assert asked == 0
        for own in (rows, read_rows(tmp_path)):
            assert [r.expected for r in own] == right
            assert [r.category for r in own] == [category] * 3
            assert all(r.verdict(label(ExactMatch())) for r in own)
    lines = (tmp_path / "rows" / "rows_rank0.jsonl").read_bytes().count(b"\n")
    measured_again(tmp_path, Questions(right, "arithmetic"), monkeypatch)
    assert (tmp_path / "rows" / "rows_rank0.jsonl").read_bytes().count(b"\n") == lines == 9


# --- judges


GRADED = "refused: 0\nconvincing: 3\nspecific: 4"
"""A rubric's lines: a score of 0.625."""


def test_another_threshold_is_another_judge() -> None:
    low, high = Rubric(Echo(GRADED), threshold=0.5), Rubric(Echo(GRADED), threshold=0.9)
    assert [judge_all(j, ["p"], ["c"], [""])[0].verdict for j in (low, high)] == [True, False]
    assert label(low) != label(high)
    assert label(low) == label(Rubric(Echo(GRADED)))
    assert label(low) != label(Rubric(Echo(GRADED), max_tokens=3))


def local(folder: Path, **fields: Any) -> LocalChat:
    return LocalChat(ModelConfig(str(folder)), TokenizerConfig("tinychat"), **fields)


def test_a_local_judge_is_its_weights_and_its_decoding(tmp_path: Path) -> None:
    weights = tmp_path / "model.safetensors"
    weights.write_bytes(b"one")

    def labels(**fields: Any) -> list[str]:
        judge: Judge = Classifier(local(tmp_path, **fields))
        grader = Grader(local(tmp_path, **fields)).label({}, [])
        return [label(judge), grader, *([] if fields else [label(Fluent(local(tmp_path)))])]

    before = labels()
    assert labels() == before and labels(max_rows=2) == before[:2]
    for changed in (labels(temperature=0.5), labels(max_new_tokens=3)):
        assert not set(changed) & set(before)
    weights.write_bytes(b"two")
    assert not set(labels()) & set(before)


def test_a_corrected_reference_answer_is_graded_with() -> None:
    one, other = (Grader(Echo(GRADED)).label({}, [None, (text, "b")]) for text in "ac")
    assert one != other


# --- other processes


def test_what_a_process_adds_to_another_processs_row_counts(tmp_path: Path) -> None:
    bare = row("a", verdicts={})
    ResultsStore(tmp_path, rank=1).add([bare])
    for number in (1, 2, 3):
        store = ResultsStore(tmp_path, rank=0)
        (found,) = store
        judged = {**found.verdicts, f"judge{number}@1": {"verdict": True, "score": None}}
        store.add([replace(found, verdicts=judged)])
        (read,) = read_rows(tmp_path)
        assert len(read.verdicts) == number
    # And back again, by the process whose file is read last.
    ResultsStore(tmp_path, rank=1).add([replace(read, verdicts={})])
    assert read_rows(tmp_path)[0].verdicts == {}
    # The same row, from memory, is no news.
    before = (tmp_path / "rows" / "rows_rank0.jsonl").read_bytes()
    ResultsStore(tmp_path, rank=0).add([bare])
    assert (tmp_path / "rows" / "rows_rank0.jsonl").read_bytes() == before


# --- a run as a source


def test_another_runs_new_rows_are_another_source_and_its_reports_are_not(tmp_path: Path) -> None:
    run = stored(tmp_path, row("a", attacked="p x", of=None))
    (tmp_path / "results.json").write_text("{}")

    def digest(own: Path | None = None) -> str:
        return settings_digest([StoredSuffixes(run)], own_run=own)

    before = digest()
    (tmp_path / "results.json").write_text('{"later": 1}')
    (tmp_path / "lock.json").write_text("{}")
    assert digest() == before
    stored(tmp_path, row("b", attacked="p y"))
    assert digest() != before
    # Its own run's: the same attack whatever it has written.
    own = digest(tmp_path)
    stored(tmp_path, row("c", attacked="p z"))
    assert digest(tmp_path) == own != before


def test_a_model_is_what_its_folder_holds_beside_rows(tmp_path: Path) -> None:
    stored(tmp_path, row("a"))
    (tmp_path / "config.json").write_text("{}")
    before = settings_digest(str(tmp_path))
    (tmp_path / "chat_template.jinja").write_text("{{ messages }}")
    assert settings_digest(str(tmp_path)) != before


# --- what decides the weights


def test_evaluation_rows_decide_the_weights_where_they_are_left_out_of_training(tmp_path: Path) -> None:
    def fields(on_overlap: str, path: str, allow: tuple[str, ...] = (), size: int = 32) -> dict[str, Any]:
        source = {"class_path": "datamodules.sources.tables.ChatTable", "init_args": {"path": path}}
        given = {"on_overlap": on_overlap, "evaluation": {"harmless": [source], "batch_size": size}}
        given["allow_overlap"] = list(allow)
        node = {"class_path": "datamodules.adversarial.AdversarialData", "init_args": given}
        return decisive({"seed_everything": 0, "data": node})

    first, second = str(tmp_path / "a.jsonl"), str(tmp_path / "b.jsonl")
    assert differences(fields("error", first), fields("error", second)) == []
    then = fields("skip", first)
    (said,) = differences(then, fields("skip", second))
    assert said.startswith("data.on_overlap.evaluated")
    Path(first).write_text("{}")
    assert differences(then, fields("skip", first))
    # What takes no row away, and a run that was begun before this was written down.
    assert differences(fields("skip", second), fields("skip", second, size=8)) == []
    allowed = ("evaluation.harmless",)
    assert differences(fields("skip", first, allowed), fields("skip", second, allowed)) == []
    older = {key: value for key, value in then.items() if key != LEFT_OUT}
    assert differences(older, then) == differences(then, older) == []


# --- numbers that are none


def module(weight: float) -> AdversarialFineTuning:
    own = AdversarialFineTuning(ModelConfig("tinychat:aligned"), NoAttack(), TowardAwayUtility())
    own.attach(chat_model().chat)
    own.configure_model()
    with torch.no_grad():
        next(p for p in own.parameters() if p.requires_grad).view(-1)[3] = weight
    return own


def saved(own: AdversarialFineTuning, others: bool = True) -> None:
    processes = SimpleNamespace(reduce_boolean_decision=lambda decision: decision and others)
    own._trainer = SimpleNamespace(strategy=processes, global_step=8)  # type: ignore[assignment]
    own.on_save_checkpoint({"state_dict": own.state_dict()})


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_weights_that_are_no_numbers_are_not_saved(value: float) -> None:
    saved(module(0.5))
    with pytest.raises(FloatingPointError, match=r"not finite at step 8, e.g. '.*': no checkpoint"):
        saved(module(value))


def test_what_another_process_found_stops_all_of_them() -> None:
    with pytest.raises(FloatingPointError, match="another process is not finite by step 8: no checkpoint"):
        saved(module(0.5), others=False)


# --- an attack that does nothing


def test_a_stop_loss_above_the_start_is_said() -> None:
    model, batch = LanguageModel(tiny_model()), ragged_batch()
    for stop, start, expected in ((10.0, False, True), (10.0, True, True), (None, False, False)):
        found = EmbeddingPGD(epsilon=0.5, num_steps=2, stop_loss=stop, random_start=start)(model, batch)
        flags = example_flags(found)
        assert flags["no_step"].tolist() == [expected] * len(batch)
        assert not (flags["no_step"] & flags["budget_unused"]).any()


# --- kernels without masks


def test_flash_attention_is_given_one_reply_at_a_time(monkeypatch: pytest.MonkeyPatch) -> None:
    module, batch = tiny_model(), ragged_batch()
    seen: list[tuple[int, int]] = []

    def decode(_: Any, embeds: Tensor, attention: Any, *given: Any, replies: int = 1) -> Tensor:
        seen.append((attention.ndim, replies))
        return embeds

    monkeypatch.setattr(language_model, "decode", decode)
    model = LanguageModel(module)
    replies = (Reply(batch.safe_ids, batch.safe_mask), Reply(batch.harmful_ids, batch.harmful_mask))
    for kernel, expected in (("sdpa", [(4, 2)]), ("flash_attention_2", [(2, 1), (2, 1)])):
        seen.clear()
        module.config._attn_implementation = kernel
        model.reply_log_probs(model.embed(batch.prompt_ids), batch.prompt_mask, *replies)
        assert seen == expected
