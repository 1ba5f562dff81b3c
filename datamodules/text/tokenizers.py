"""Loading tokenizers exactly as their tokenizer.json says, with a chat template from the tokenizer or from
YAML."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from transformers import AutoTokenizer, PreTrainedTokenizerBase, PreTrainedTokenizerFast

from datamodules.text.model_files import model_path


@dataclass
class TokenizerConfig:
    """Which tokenizer to load and how it formats a chat."""

    name_or_path: str
    """Local folder, hub id, `tinychat:<stage>` for the packaged model, or `package:NAME`."""
    revision: str | None = None
    """Hub commit or tag; pin it for a run that must be repeatable."""
    chat_template: str | None = None
    """Jinja chat template, or the path of a file that holds one; null keeps the tokenizer's own."""
    trust_remote_code: bool = False
    """Whether to run Python code that a hub repository ships."""
    gguf_file: str | None = None
    """GGUF file in the folder, repository or package that holds the tokenizer."""


def load_tokenizer(config: TokenizerConfig) -> PreTrainedTokenizerBase:
    """Load a fast tokenizer.

    A repository's tokenizer.json is loaded as it is: AutoTokenizer rebuilds some pipelines (Llama's, Phi-3's)
    and then tokenises differently. AutoTokenizer is the fallback where there is no tokenizer.json.

    Raises: ValueError where there is no tokenizer, no chat template or no fast tokenizer.
    """
    path = model_path(config.name_or_path, config.gguf_file, config.revision)
    try:
        tokenizer = PreTrainedTokenizerFast.from_pretrained(path, revision=config.revision)
    except (OSError, ValueError):
        tokenizer = _rebuilt(path, config)
    if not tokenizer.is_fast:
        raise ValueError(
            f"tokenizer.name_or_path: expected a fast tokenizer (tokenizer.json), got a slow one for {path!r}"
        )
    if config.chat_template is not None:
        tokenizer.chat_template = _template_text(config.chat_template)
    if tokenizer.chat_template is None:
        raise ValueError(
            f"tokenizer.chat_template: expected a chat template, got none in {path!r}; set "
            "chat_template to a Jinja text or a file"
        )
    return tokenizer


def _rebuilt(path: str, config: TokenizerConfig) -> PreTrainedTokenizerBase:
    try:
        found: PreTrainedTokenizerBase = AutoTokenizer.from_pretrained(
            path, revision=config.revision, trust_remote_code=config.trust_remote_code
        )
    except (OSError, ValueError) as error:
        # The library's own text speaks of the hub and names neither the field nor, without network, the path.
        words = " ".join(str(error).split())
        raise ValueError(
            f"tokenizer.name_or_path: cannot load a tokenizer from {path!r}; set an existing folder or a hub "
            f"id: {words}"
        ) from error
    return found


def _template_text(template: str) -> str:
    if "{" in template or "\n" in template:
        return template
    path = Path(template)
    if not path.is_file():
        raise ValueError(
            f"tokenizer.chat_template: expected a Jinja text or an existing file, got {template!r}"
        )
    return path.read_text(encoding="utf-8")
