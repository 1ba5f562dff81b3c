"""Drawing replies against transformers' own loop: the same tokens, fewer rows, nothing copied."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from transformers import GenerationConfig

from datamodules.batch import AdversarialBatch
from lightning_modules.models.decoder import causal_lm
from lightning_modules.models.generation import _RoomyLayer, generated_ids
from lightning_modules.models.language_model import LanguageModel
from tests.conftest import FAMILIES, VOCABULARY, ragged_batch, tiny_model
from tests.support.adapters import lora

NEW = 12
SAMPLED: dict[str, Any] = {"do_sample": True, "temperature": 1.5, "top_p": 0.9}


def settings(stops: list[int], **fields: Any) -> GenerationConfig:
    given = {"max_new_tokens": NEW, "eos_token_id": stops, "pad_token_id": 0, "do_sample": False}
    return GenerationConfig(**given | fields)


def plainly(
    model: LanguageModel, batch: AdversarialBatch, stops: list[int], **fields: Any
) -> list[list[int]]:
    """What transformers' own loop draws, up to the first stop token."""
    torch.manual_seed(3)
    out = causal_lm(model.module).generate(  # type: ignore[operator]
        inputs_embeds=model.embed(batch.prompt_ids),
        attention_mask=batch.prompt_mask.long(),
        generation_config=settings(stops, **fields),
    )
    ends = [next((i + 1 for i, token in enumerate(row) if token in stops), NEW) for row in out.tolist()]
    return [row[:end] for row, end in zip(out.tolist(), ends, strict=True)]


def stops_of(model: LanguageModel, batch: AdversarialBatch, **fields: Any) -> list[int]:
    """Tokens that end replies at different times."""
    free = plainly(model, batch, [VOCABULARY], **fields)
    return sorted({row[2 * i] for i, row in enumerate(free[:5])})


def drawn(model: LanguageModel, batch: AdversarialBatch, stops: list[int], **fields: Any) -> list[list[int]]:
    """What our loop draws."""
    torch.manual_seed(3)
    embeds = model.embed(batch.prompt_ids)
    return generated_ids(model.module, embeds, batch.prompt_mask, settings(stops, **fields))


@pytest.mark.parametrize("fields", [{}, SAMPLED], ids=["greedy", "sampled"])
@pytest.mark.parametrize("family", FAMILIES)
def test_tokens_are_those_of_transformers_loop(family: str, fields: dict[str, Any]) -> None:
    model, batch = LanguageModel(tiny_model(family)), ragged_batch(size=8)
    stops = stops_of(model, batch, **fields)
    expected = plainly(model, batch, stops, **fields)
    assert drawn(model, batch, stops, **fields) == expected
    # Replies of several lengths, or no row would have left before the end.
    assert len({len(row) for row in expected}) > 1


@pytest.mark.filterwarnings("ignore:Passing .repetition_penalty. with .inputs_embeds.")
def test_the_model_s_own_settings_are_kept() -> None:
    # A checkpoint may bring a penalty on repetition, which looks at each row's own tokens.
    model, batch = LanguageModel(tiny_model()), ragged_batch(size=8)
    stops = stops_of(model, batch)
    free = plainly(model, batch, stops)
    causal_lm(model.module).generation_config.repetition_penalty = 3.0  # type: ignore[union-attr]
    assert drawn(model, batch, stops) == plainly(model, batch, stops) != free


def test_ended_rows_leave_the_batch() -> None:
    model, batch = LanguageModel(tiny_model()), ragged_batch(size=8)
    stops, sizes = stops_of(model, batch), list[int]()
    causal_lm(model.module).get_decoder().register_forward_hook(
        lambda part, given, out: sizes.append(len(out.last_hidden_state))
    )
    lengths = [len(row) for row in drawn(model, batch, stops)]
    assert len(sizes) == max(lengths)
    going = [sum(length > step for length in lengths) for step in range(max(lengths))]
    # All that go on are computed, and of the others fewer than would be worth a copy.
    assert all(own <= rows <= max(own / 0.75, 1) for own, rows in zip(going, sizes, strict=True))
    assert sizes[0] == 8 > sizes[-1]


def test_keys_and_values_stay_where_they_are() -> None:
    layer = _RoomyLayer(7)
    parts = [torch.randn(3, 2, length, 4) for length in (4, 1, 1, 1)]
    places = set()
    for number, part in enumerate(parts, start=1):
        keys, values = layer.update(part, 2 * part)
        whole = torch.cat(parts[:number], dim=2)
        assert torch.equal(keys, whole)
        assert torch.equal(values, 2 * whole)
        assert layer.get_seq_length() == whole.shape[2]
        places.add(keys.data_ptr())
    assert len(places) == 1
    layer.batch_select_indices(torch.tensor([0, 2]))
    assert torch.equal(layer.keys, whole[[0, 2]])  # type: ignore[arg-type]


def test_adapters_are_merged_while_replies_are_drawn() -> None:
    batch, stops = ragged_batch(size=8), [VOCABULARY - 1]
    model = lora(tiny_model()).eval()
    sides = [LanguageModel(model, merge_adapters=merged) for merged in (True, False)]
    used: list[int] = []
    for name, part in model.named_modules():
        if name.endswith("lora_A.default"):
            part.register_forward_hook(lambda *_: used.append(1))
    merged, apart = (
        (side.generate(side.embed(batch.prompt_ids), batch.prompt_mask, 6, stops), len(used))
        for side in sides
    )
    assert merged[0] == apart[0]
    assert merged[1] == 0 < apart[1]


def test_a_head_that_is_the_embeddings_too_is_not_merged_into_them() -> None:
    """Merged, prompts were embedded with the head's adapter in them, and most replies were others."""
    batch, stops = ragged_batch(size=8), [VOCABULARY - 1]
    with pytest.warns(UserWarning, match="a tied layer is part of the adapter"):
        model = lora(tiny_model("llama_tied"), target_modules=["q_proj", "lm_head"]).eval()
    merged, apart = (
        side.generate(side.embed(batch.prompt_ids), batch.prompt_mask, 6, stops)
        for side in (LanguageModel(model, merge_adapters=merged) for merged in (True, False))
    )
    assert merged == apart
