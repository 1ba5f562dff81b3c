"""The reference that objectives read: the starting point, whatever is trained, and its table on disk."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from torch.nn.functional import cross_entropy

from datamodules.batch import AdversarialBatch
from lightning_modules.models.decoder import causal_lm
from lightning_modules.models.frozen import Reference
from lightning_modules.models.language_model import LanguageModel
from lightning_modules.models.loading import LoraSettings, ModelConfig, load_seeded
from lightning_modules.reference_scores import ReferenceTable, row_digests
from tests.conftest import text_batch

LORA = LoraSettings(r=4, dropout=0.0)
TINYCHAT = ModelConfig("tinychat:aligned")


def loaded(config: ModelConfig) -> LanguageModel:
    return LanguageModel(load_seeded(config, 0))


def disturb(language_model: LanguageModel) -> None:
    with torch.no_grad():
        for p in language_model.module.parameters():
            if p.requires_grad:
                p.add_(0.01)


@pytest.mark.parametrize("lora", [None, LORA])
def test_the_reference_stays_the_starting_point(lora: LoraSettings | None) -> None:
    config = ModelConfig("tinychat:aligned", lora=lora)
    language_model, base = loaded(config), loaded(TINYCHAT)
    reference, batch = Reference(language_model, config), text_batch()
    key = reference.key
    disturb(language_model)
    flags = [(p.requires_grad, p.grad) for p in language_model.module.parameters()]
    with reference.active() as start:
        seen = start.embed(batch.prompt_ids)
        logits = causal_lm(start.module)(inputs_embeds=seen).logits
        assert not start.module.training
    base.module.eval()
    assert torch.equal(logits, causal_lm(base.module)(input_ids=batch.prompt_ids).logits)
    assert [(p.requires_grad, p.grad) for p in language_model.module.parameters()] == flags
    assert language_model.module.training
    assert reference.key == key
    assert not torch.equal(causal_lm(language_model.module)(input_ids=batch.prompt_ids).logits, logits)


def test_adapters_loaded_with_trained_weights_belong_to_the_starting_point(tmp_path: Path) -> None:
    first = loaded(ModelConfig("tinychat:aligned", lora=LORA))
    disturb(first)
    first.module.save_pretrained(tmp_path)
    config = ModelConfig(str(tmp_path))
    language_model, ids = loaded(config), text_batch().prompt_ids
    language_model.module.eval()
    start = causal_lm(language_model.module)(input_ids=ids).logits
    disturb(language_model)
    with Reference(language_model, config).active() as reference:
        torch.testing.assert_close(causal_lm(reference.module)(input_ids=ids).logits, start)


def table(
    folder: Path, language_model: LanguageModel, *batches: AdversarialBatch
) -> tuple[ReferenceTable, int]:
    found = ReferenceTable(folder, Reference(language_model, TINYCHAT))
    return found, found.fill(batches, torch.device("cpu"))


def test_table_is_filled_once_and_handed_out_by_example_id(tmp_path: Path) -> None:
    language_model, batch = loaded(TINYCHAT), text_batch(4)
    first, computed = table(tmp_path, language_model, batch.select([0, 1]), batch.select([2, 3]))
    again, repeated = table(tmp_path, language_model, batch)
    assert (computed, repeated) == (4, 0)
    ordered = first(batch)
    # Trap: reference log-probabilities handed out in reversed order.
    torch.testing.assert_close(
        again(batch.select([3, 2, 1, 0])).harmful, ordered.harmful.flip(0), atol=0, rtol=0
    )
    for i in range(4):
        ids = torch.cat([batch.prompt_ids[i][batch.prompt_mask[i]], batch.safe_ids[i][batch.safe_mask[i]]])
        length = int(batch.safe_mask[i].sum())
        logits = causal_lm(language_model.module)(input_ids=ids[None]).logits[0, -length - 1 : -1]
        assert ordered.safe[i].item() == pytest.approx(-cross_entropy(logits, ids[-length:]).item(), abs=1e-5)
    again.check_start(language_model, batch)


def test_a_cache_that_cannot_be_written_is_named_before_the_work(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(
        OSError, match=r"model\.reference_cache: cannot make the folder '.*/file/cache': Not a directory"
    ):
        table(tmp_path / "file" / "cache", loaded(TINYCHAT), text_batch(2))


def test_table_meets_no_old_numbers(tmp_path: Path) -> None:
    language_model, batch = loaded(TINYCHAT), text_batch(2)
    table(tmp_path, language_model, batch)
    other = batch.select([0, 1])
    other.safe_ids[0, 0] += 1
    assert table(tmp_path, language_model, other)[1] == 1  # the row that changed
    assert (
        ReferenceTable(
            tmp_path, Reference(loaded(ModelConfig("tinychat:helpful")), ModelConfig("tinychat:helpful"))
        ).path.exists()
        is False
    )
    with pytest.raises(ValueError, match="two different rows have the example id"):
        table(tmp_path, language_model, batch, other)
    with pytest.raises(ValueError, match="no reference log-probability for example"):
        table(tmp_path, language_model, batch.select([0]))[0](batch)


def test_mixed_up_references_are_refused_at_initialisation(tmp_path: Path) -> None:
    language_model, batch = loaded(TINYCHAT), text_batch(3)
    filled, _ = table(tmp_path, language_model, batch)
    rows, stored = row_digests(batch), json.loads(filled.path.read_text())
    filled.path.write_text(json.dumps(stored | {rows[0]: stored[rows[1]], rows[1]: stored[rows[0]]}))
    with pytest.raises(ValueError, match="the margin at initialisation is .*, expected 0; delete the file"):
        table(tmp_path, language_model, batch)[0].check_start(language_model, batch)
