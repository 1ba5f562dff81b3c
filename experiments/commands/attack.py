"""`thundercat attack`: one attack on one request, live on the terminal, saved to the run folder."""

from __future__ import annotations

import json
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import torch
from tqdm.auto import tqdm

from callbacks.health import example_flags
from callbacks.judges.base import label
from callbacks.judges.exact import TargetPrefix
from callbacks.judges.keyword import KeywordRefusal
from callbacks.run_folder.provenance import environment_facts
from datamodules.adversarial import AdversarialData
from datamodules.batch import EvaluationBatch
from datamodules.results import describe
from datamodules.rows import HarmfulRow
from datamodules.sources.base import DEFAULT_SAFE_REPLY
from datamodules.text.encoding import Encoder, evaluation_batch
from experiments.config.check import check
from experiments.config.compose import ConfigError, compose
from experiments.config.defaults import with_defaults
from lightning_modules.adversarial import AdversarialFineTuning
from lightning_modules.attacks.progress import observed
from lightning_modules.models.language_model import LanguageModel

MAX_NEW_TOKENS = 128


def attack(files: Sequence[str], overrides: Sequence[tuple[str, str]], flags: Sequence[str]) -> int:
    """Compose, load the model, attack, show, save. Returns the exit status. Raises: ConfigError for a wrong
    call."""
    from experiments.commands.run import instantiate

    texts = {key: value for key, value in overrides if key in ("prompt", "target")}
    rest = [(key, value) for key, value in overrides if key not in texts]
    for name in ("prompt", "target"):
        if not texts.get(name, "").strip():
            raise ConfigError(f'--{name}: expected a text, got none; write --{name} "..."')
    config = compose(files, rest)
    check(config, "attack")
    config = with_defaults(config)
    cli = instantiate(config)
    module, data = cli.model, cli.datamodule
    if not isinstance(module, AdversarialFineTuning) or not isinstance(data, AdversarialData):
        raise ConfigError(
            "attack: expected model: AdversarialFineTuning with an attack, and data: AdversarialData"
        )
    module.configure_model()
    if config.get("ckpt_path"):
        module.load_state_dict(torch.load(_checkpoint(config), weights_only=True)["state_dict"], strict=False)
    module.model.eval()
    model = LanguageModel(module.model, chat=data.chat)
    encoder = Encoder(data.chat, replace(data.encoding, on_bad_row="error"))
    row = HarmfulRow("command line", texts["prompt"], texts["target"], DEFAULT_SAFE_REPLY, "--prompt")
    record = show(
        model,
        module,
        evaluation_batch(encoder.harmful([row]), data.encoding.attackable),
        int(config["seed_everything"]),
    )
    folder = Path(config["trainer"]["default_root_dir"]) / "attacks"
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / f"single_{time.strftime('%Y%m%d_%H%M%S')}.json"
    path.write_text(
        json.dumps(record | {"environment": environment_facts()}, indent=2, ensure_ascii=False) + "\n",
        encoding="utf-8",
    )
    print(f"saved: {path}")
    return 0


def show(
    model: LanguageModel, module: AdversarialFineTuning, batch: EvaluationBatch, seed: int
) -> dict[str, Any]:
    """Attack one behaviour, writing every improvement as it is found; returns what is saved."""
    (prompt,), (target,) = batch.prompts, batch.expected
    chat, found = model.chat, [torch.inf]
    with tqdm(desc=type(module.attack).__name__, unit=" iterates", leave=False) as bar:

        def watch(losses: torch.Tensor, texts: Callable[[], list[str]]) -> None:
            bar.update()
            loss = losses[0].item()
            if loss < found[0]:
                found[0] = loss
                own = texts()
                tqdm.write(f"{bar.n:5d}  loss {loss:7.4f}" + (f"  {own[0]!r}" if own else ""))

        began = time.perf_counter()
        with observed(watch):
            assert batch.adversarial is not None
            attacked = module.attack(model, batch.adversarial, torch.Generator().manual_seed(seed))
        seconds = time.perf_counter() - began
    with torch.no_grad(), attacked.applied(model) as embeds:
        (ids,) = model.generate(embeds, attacked.prompt_mask, MAX_NEW_TOKENS, chat.stop_ids)
        (plain,) = model.generate(
            model.embed(batch.prompt_ids), batch.prompt_mask, MAX_NEW_TOKENS, chat.stop_ids
        )
    reply = chat.decode([*(attacked.forced[0] if attacked.forced else ()), *ids])
    judges = TargetPrefix(), KeywordRefusal()
    verdicts = {label(judge): judge(prompt, reply, target) for judge in judges}
    typed = attacked.texts[0] if attacked.texts else None
    shown = typed or "(embeddings, nobody can type them)"
    tqdm.write(f"\nrequest   {prompt}\nreply     {chat.decode(plain)}\nattacked  {shown}\nreply     {reply}")
    tqdm.write(
        f"success   {verdicts[label(judges[0])]} ({label(judges[0])}), {int(attacked.forward_passes)} "
        "forward and "
        f"{int(attacked.backward_passes)} backward passes, {seconds:.1f} s"
    )
    return {
        "attack": describe(module.attack),
        "model": asdict(module.base),
        "prompt": prompt,
        "target": target,
        "attacked": typed,
        "completion": reply,
        "plain_completion": chat.decode(plain),
        "verdicts": verdicts,
        "seconds": seconds,
        "loss_curve": attacked.loss_curve[:, 0].tolist(),
        "forward_passes": int(attacked.forward_passes),
        "backward_passes": int(attacked.backward_passes),
        "flags": {k: bool(v[0]) for k, v in example_flags(attacked).items()},
    }


def _checkpoint(config: dict[str, Any]) -> Path:
    path = config["ckpt_path"]
    found = (
        Path(config["trainer"]["default_root_dir"]) / "checkpoints" / "last.ckpt"
        if path == "last"
        else Path(path)
    )
    if not found.is_file():
        raise ConfigError(
            f"ckpt_path: no file {str(found)!r}; give a checkpoint of this run, or leave it out"
        )
    return found
