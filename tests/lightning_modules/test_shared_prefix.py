"""Candidates that read their prompts' beginnings where they lie, and the last layer at what is read, against
copies of the beginnings and whole rows."""

from __future__ import annotations

from concurrent.futures import ThreadPoolExecutor
from typing import Any

import pytest
import torch

from experiments.benchmarks.counters import Launches
from lightning_modules.attacks.suffix.search import SuffixSearch
from lightning_modules.models import cached_scoring, shared_prefix, tail
from lightning_modules.models.language_model import LanguageModel
from tests.conftest import FAMILIES, text_batch, tiny_model, tinychat_format

SHARED = ["llama", "llama_tied", "gemma", "phi3", "qwen2", "mistral"]
SETTINGS = {"vocab_size": 2048, "max_position_embeddings": 256}


def model_of(family: str, window: int | None = None) -> LanguageModel:
    far = {"sliding_window": window} if window else {}
    module = tiny_model(family, torch.float64, **SETTINGS, **far)
    return LanguageModel(module, chat=tinychat_format())


def candidates(search: SuffixSearch, each: int = 4) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Rows of all behaviours in turn, each with one token of its base changed."""
    base = search.start
    rows = torch.arange(len(base)).repeat(each)
    suffixes, rng = base[rows].clone(), torch.Generator().manual_seed(0)
    where = torch.randint(0, base.shape[1], (len(rows),), generator=rng)
    suffixes[torch.arange(len(rows)), where] = torch.randint(5, 900, (len(rows),), generator=rng)
    return rows, suffixes, base


def read(model: LanguageModel) -> tuple[list[torch.Tensor], Launches]:
    with model.frozen():
        search = SuffixSearch(model, text_batch(3), 5, " x", 7)
        rows, suffixes, base = candidates(search)
        with Launches() as launches:
            changed = search.scores_of_changes(rows, suffixes, list(range(3)), base)
        whole = search.losses(rows, suffixes)
        losses, gradient = search.gradient(torch.arange(3), base, lambda loss, mask: (loss * mask).sum(1))
    return [*changed, whole, losses, gradient], launches


def copied(monkeypatch: pytest.MonkeyPatch) -> None:
    """As before: a beginning is copied for each row, and every layer works on whole rows."""
    monkeypatch.setattr(cached_scoring, "can_share", lambda *_: False)
    monkeypatch.setattr(tail, "is_copy_of", lambda *_: False)


@pytest.mark.parametrize("family", SHARED)
def test_losses_and_gradients_are_those_of_copies(family: str, monkeypatch: pytest.MonkeyPatch) -> None:
    window = 256 if family in ("mistral", "phi3") else None
    found, cheap = read(model_of(family, window))
    copied(monkeypatch)
    plain, dear = read(model_of(family, window))
    for own, other in zip(found, plain, strict=True):
        torch.testing.assert_close(own, other, rtol=1e-9, atol=1e-9)
    assert cheap.flops <= dear.flops
    if family == "llama":
        assert cheap.written < dear.written
        assert cheap.flops < dear.flops


@pytest.mark.parametrize("family", ["gemma2", "mistral"])
def test_a_window_or_a_cap_keeps_the_copies(family: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Mistral's window is 6 tokens here."""
    asked: list[int] = []
    monkeypatch.setattr(cached_scoring, "decode_shared", lambda *_: asked.append(1))
    read(model_of(family))
    assert not asked


def test_every_shared_family_is_known() -> None:
    assert {*SHARED, "gemma2"} == set(FAMILIES)


@pytest.mark.parametrize("causal", [False, True])
def test_attention_and_its_mass(causal: bool) -> None:
    rng = torch.Generator().manual_seed(0)
    query, key, value = torch.randn(3, 2, 4, 5, 8, dtype=torch.float64, generator=rng).unbind(0)
    own, mass = shared_prefix.attended(query, key, value, 0.3, causal)
    other, other_mass = shared_prefix.attended_plainly(query, key, value, 0.3, causal)
    torch.testing.assert_close(own, other)
    torch.testing.assert_close(mass, other_mass)


def test_torch_s_attention_is_put_back() -> None:
    usual = shared_prefix.ALL_ATTENTION_FUNCTIONS["sdpa"]
    read(model_of("llama"))
    assert shared_prefix.ALL_ATTENTION_FUNCTIONS["sdpa"] is usual


def test_another_thread_s_model_keeps_its_attention(monkeypatch: pytest.MonkeyPatch) -> None:
    """The table of attentions is the process's: what runs beside must not read this search's beginnings."""
    model, ids = tiny_model("llama", torch.float64, **SETTINGS), torch.arange(5, 12)[None]
    with torch.no_grad():
        alone = model(ids).logits
    beside: list[torch.Tensor] = []
    decode = shared_prefix.decode

    def with_a_neighbour(*args: Any, **kwargs: Any) -> torch.Tensor:
        with ThreadPoolExecutor(1) as other:
            beside.append(other.submit(torch.no_grad()(lambda: model(ids).logits)).result())
        return decode(*args, **kwargs)

    monkeypatch.setattr(shared_prefix, "decode", with_a_neighbour)
    read(model_of("llama"))
    assert beside
    assert all(torch.equal(found, alone) for found in beside)


def test_a_decoder_that_does_not_ask_is_noticed(monkeypatch: pytest.MonkeyPatch) -> None:
    """Its rows would be read without their beginnings."""
    monkeypatch.setattr(shared_prefix, "KERNEL", "flex_attention")
    monkeypatch.setattr(shared_prefix, "can_share", lambda *_: True)
    monkeypatch.setattr(cached_scoring, "can_share", lambda *_: True)
    with pytest.raises(RuntimeError, match="0 of 2 layers asked for their beginnings"):
        read(model_of("llama"))


@pytest.mark.parametrize("family", FAMILIES)
def test_which_last_layers_are_cut(family: str) -> None:
    """Gemma-2's has two more norms and Phi-3's a dropout: they are none of the known kind."""
    with tail.last_positions(tiny_model(family), 3) as cut:
        assert cut == (family not in ("gemma2", "phi3"))


def test_a_last_layer_that_is_listened_to_is_left_alone() -> None:
    model = tiny_model()
    model.model.layers[-1].register_forward_hook(lambda *_: None)
    with tail.last_positions(model, 3) as cut:
        assert not cut
