"""`thundercat chat RUN`: talk to a run's model in the terminal.

The conversation goes on turn by turn; `/new` begins another one, an empty line or the end of input leaves.
"""

from __future__ import annotations

import io
import logging
import sys
from collections.abc import Iterator
from dataclasses import dataclass, replace

from callbacks.report.escape import printable
from callbacks.run_folder.folder import RunFolder
from datamodules.fields import Count, NonNegative, NonNegativeInt, Share, checked
from datamodules.text.chat_format import Turn
from experiments.commands.loaded import build, loaded, node_of, run_configuration
from experiments.commands.run import guarded
from lightning_modules.models.language_model import LanguageModel
from lightning_modules.models.requests import Decoding, Request
from lightning_modules.pretrained import PretrainedModel

NEW = "/new"


@checked
@dataclass(frozen=True)
class ChatSettings:
    """How the model is talked to."""

    run: str
    """A run folder."""
    ckpt_path: str | None = "last"
    """A checkpoint, or `last`; null takes the model before training."""
    system: str | None = None
    """System message of every conversation; null takes the run's own (data.encoding.system)."""
    max_new_tokens: Count = 256
    temperature: NonNegative = 0.0
    """0 replies greedily."""
    top_p: Share = 1.0
    seed: NonNegativeInt = 0


def chat(settings: ChatSettings, show_traceback: bool = False) -> int:
    """Load the model and talk. Returns the exit status. Raises: ConfigError where there is no run."""
    config = {**run_configuration(settings.run, "chat"), "ckpt_path": settings.ckpt_path}
    config["model"] = node_of(config, PretrainedModel, ("base", "seed"))
    own = RunFolder.of(settings.run)
    return guarded(lambda: _chat(config, own, settings), own, show_traceback)


def _chat(config: dict[str, object], folder: RunFolder, settings: ChatSettings) -> int:
    logging.getLogger("lightning.pytorch").setLevel(logging.ERROR)
    module, data = build(config, PretrainedModel)
    with loaded(config, "predict", module, data, folder) as (step, _):
        print(f"{folder.path}, step {step}; {NEW} begins another conversation, an empty line leaves")
        system = settings.system if settings.system is not None else data.encoding.system
        converse(module.language_model, replace(settings, system=system))
    return 0


def converse(model: LanguageModel, settings: ChatSettings) -> None:
    """Read lines, print replies; what a template cannot take is said and the conversation goes on."""
    decoding = Decoding(settings.max_new_tokens, settings.temperature, settings.top_p)
    history: tuple[Turn, ...] = ()
    for number, text in enumerate(_lines()):
        if text == NEW:
            history = ()
            continue
        try:
            text.encode()
            (reply,) = model.reply(
                [Request(text, settings.system, history)], decoding, settings.seed + number
            )
        except UnicodeEncodeError:
            print("thundercat: expected text, got bytes that are none; write it in UTF-8", file=sys.stderr)
            continue
        except ValueError as error:
            print(f"thundercat: {printable(str(error), one_line=True)}", file=sys.stderr)
            continue
        print(printable(reply), flush=True)
        history = (*history, (text, reply)) if reply.strip() else history


def _lines() -> Iterator[str]:
    prompt = "> " if sys.stdin.isatty() else ""
    if isinstance(sys.stdin, io.TextIOWrapper):
        sys.stdin.reconfigure(errors="surrogateescape")  # a wrong byte must not end the conversation
    while True:
        try:
            text = input(prompt).strip()
        except EOFError:
            return
        if not text:
            return
        yield text
