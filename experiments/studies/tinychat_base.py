"""Stage 0 of the packaged chat model: its tokenizer, chat template and architecture, without weights.

python -m experiments.studies.tinychat_base    # writes lightning_modules/models/tinychat/base
thundercat fit --config configs/experiment/tinychat_helpful.yaml
thundercat fit --config configs/experiment/tinychat_aligned.yaml
"""

from __future__ import annotations

import argparse
from collections.abc import Iterable
from pathlib import Path

from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import LlamaConfig, PreTrainedTokenizerFast

from datamodules.sources.tinychat.corpus import corpus_texts
from datamodules.text.model_files import PACKAGED_ROOT

SPECIAL = ["<|pad|>", "<|bos|>", "<|system|>", "<|user|>", "<|assistant|>", "<|end|>"]
VOCABULARY = 2048
TEMPLATE = (
    "{{ bos_token }}{% for message in messages %}{{ '<|' + message['role'] + '|>' + "
    "message['content'] + '<|end|>' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|assistant|>' }}{% endif %}"
)


def build_tokenizer(texts: Iterable[str]) -> PreTrainedTokenizerFast:
    """Byte-level BPE trained on the corpus; any text has ids, so there is no unknown token."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(
        vocab_size=VOCABULARY, special_tokens=SPECIAL, initial_alphabet=alphabet, show_progress=False
    )
    tokenizer.train_from_iterator(texts, trainer)
    fast = PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        pad_token="<|pad|>",
        bos_token="<|bos|>",
        eos_token="<|end|>",
        extra_special_tokens=SPECIAL[2:5],
    )
    fast.chat_template = TEMPLATE
    return fast


def build_config() -> LlamaConfig:
    """A Llama of 1.2 M parameters: 5 layers of width 128, tied embeddings."""
    return LlamaConfig(
        vocab_size=VOCABULARY,
        hidden_size=128,
        intermediate_size=336,
        num_hidden_layers=5,
        num_attention_heads=4,
        num_key_value_heads=4,
        max_position_embeddings=256,
        tie_word_embeddings=True,
        pad_token_id=0,
        bos_token_id=1,
        eos_token_id=5,
    )


def main() -> None:
    """Write tokenizer and configuration."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--folder", type=Path, default=PACKAGED_ROOT / "base", help="where to write")
    target = parser.parse_args().folder
    target.mkdir(parents=True, exist_ok=True)
    build_tokenizer(corpus_texts()).save_pretrained(target)
    build_config().save_pretrained(target)
    print(target)


if __name__ == "__main__":
    main()
