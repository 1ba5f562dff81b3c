"""`thundercat attack`: one attack on one request, live on the terminal, kept as rows of the run folder.

Of the configuration it needs a model, its chat format and an attack: what a training recipe says of
objectives and training data is left aside, and a recipe without training takes one from configs/attack.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
import yaml
from tqdm.auto import tqdm

from callbacks.evaluations.asking import Job, judged, measure
from callbacks.evaluations.probe import Probe
from callbacks.judges.base import Judge, label
from callbacks.judges.exact import TargetPrefix
from callbacks.judges.injection import InjectedText
from callbacks.judges.keyword import KeywordRefusal
from callbacks.report.escape import printable
from callbacks.run_folder.folder import RunFolder
from callbacks.run_folder.lock import RunLock
from callbacks.run_folder.provenance import Provenance
from datamodules.batch import EvaluationBatch
from datamodules.fields import NonNegativeInt, checked
from datamodules.result_lines import Measurement, Row
from datamodules.results import ResultsStore
from datamodules.rows import HarmfulRow
from datamodules.settings import contents, settings_digest
from datamodules.sources.base import DEFAULT_SAFE_REPLY
from datamodules.text.encoding import Encoder, evaluation_batch
from datamodules.text.spans import Attackable
from experiments.commands.loaded import build, loaded, node_of
from experiments.commands.run import guarded
from experiments.config.check import check
from experiments.config.compose import ConfigError, compose
from experiments.config.defaults import with_defaults
from experiments.config.seeds import seeds_of, with_seeds
from lightning_modules.attacks.base import Attack
from lightning_modules.attacks.progress import observed
from lightning_modules.defences.base import Defence
from lightning_modules.defences.base import label as label_of
from lightning_modules.models.fingerprint import fingerprint
from lightning_modules.models.loading import ModelConfig
from lightning_modules.pretrained import PretrainedModel

MAX_NEW_TOKENS = 128
KEY = "command line"
NO_ATTACK = "model.attack: expected an attack, got none; add one, e.g. --config configs/attack/gcg.yaml"


@checked
class AttackedModel(PretrainedModel):
    """What this command needs of any recipe's model.

    Args:
        base: the model.
        attack: the attack on it.
        seed: seed of both; null takes seed_everything's.
        defence: what stands around the model.
    """

    def __init__(
        self,
        base: ModelConfig,
        attack: Attack,
        seed: NonNegativeInt | None = None,
        defence: Defence | None = None,
    ) -> None:
        super().__init__(base, seed, defence=defence)
        self.attack = attack


def attack(files: Sequence[str], overrides: Sequence[tuple[str, str]], flags: Sequence[str]) -> int:
    """Compose, load the model, attack, show, save. Returns the exit status. Raises: ConfigError for a wrong
    call."""
    texts = {key: value for key, value in overrides if key in ("prompt", "target", "document")}
    config = compose(files, [(key, value) for key, value in overrides if key not in texts])
    node = node_of(config, AttackedModel, ("base", "attack", "seed", "defence"))
    if not isinstance(node["init_args"].get("attack"), Mapping):
        raise ConfigError(NO_ATTACK)
    config = {**config, "model": node}
    check(config, "attack")
    config = with_seeds(with_defaults(config))
    if "--print_config" in flags:
        print(yaml.safe_dump(config, sort_keys=False), end="")
        return 0
    for name in ("prompt", "target"):
        if not texts.get(name, "").strip():
            raise ConfigError(f'--{name}: expected a text, got none; write --{name} "..."')
    folder = RunFolder.of(config["trainer"]["default_root_dir"])
    document = _document(texts["document"]) if "document" in texts else None
    row = HarmfulRow(KEY, texts["prompt"], texts["target"], DEFAULT_SAFE_REPLY, "--prompt", data=document)
    return guarded(lambda: _attack(config, folder, row), folder, "--traceback" in flags)


def _document(path: str) -> str:
    """Raises: ConfigError for a file that is none, or that holds no text."""
    try:
        text = Path(path).read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise ConfigError(f"--document: expected a text file, got {path!r}: {error}") from error
    if not text.strip():
        raise ConfigError(f"--document: expected a text, got an empty file {path!r}")
    return text


def _attack(config: dict[str, Any], folder: RunFolder, row: HarmfulRow) -> int:
    module, data = build(config, AttackedModel)
    with RunLock(folder.path), loaded(config, "attack", module, data, folder) as (step, precision):
        span: Attackable = data.encoding.attackable if row.data is None else "data"
        encoder = Encoder(data.chat, replace(data.encoding, on_bad_row="error", attackable=span))
        batch = evaluation_batch(encoder.harmful([row]), span)
        plain, attacked = measured(module, batch, step, precision)
        Provenance(config, seeds_of(config)).write(folder, "attack")
        store = ResultsStore(folder.path)
        store.add([plain, attacked])
    show(plain, attacked)
    print(f"saved: {printable(str(store.path), one_line=True)}")
    return 0


def measured(
    module: AttackedModel, batch: EvaluationBatch, step: int, precision: str = "32-true"
) -> tuple[Row, Row]:
    """The reply to the request as it is, and to the attacked one; every improvement is shown as it is
    found."""
    judge: Judge = TargetPrefix() if batch.documents[0] is None else InjectedText()
    around = [] if module.defence is None else [module.defence]
    plan = Measurement(
        evaluation=KEY,
        stage="attack",
        step=step,
        model=fingerprint(module.model),
        settings=settings_digest(
            module.attack, MAX_NEW_TOKENS, module.seed, contents(batch), precision, *around
        ),
        subject="harmful",
        attack=type(module.attack).__name__,
        quantity="success_rate",
        judge=label(judge),
        refusal=label(KeywordRefusal()),
        judges=[],
        n=1,
        defence=label_of(module.defence),
    )
    rows = []
    for name, attack in (("", None), (plan.attack, module.attack)):
        probe = Probe("harmful", "success_rate", judge, name, attack, KeywordRefusal())
        job = Job(replace(plan, attack=name), probe, batch, MAX_NEW_TOKENS, module.seed)
        with tqdm(desc=name, unit=" iterates", leave=False, disable=None) as bar, observed(_watch(bar)):
            found = measure(module.language_model, job, defence=module.defence, attackable="untrusted")
            rows += judged(found, probe.asked)
    plain, attacked = rows
    return plain, attacked


def _watch(bar: tqdm[Any]) -> Callable[[torch.Tensor, Callable[[], list[str]]], None]:
    """Writes every improvement of the first example."""
    found = [torch.inf]
    iterate = 0

    def watch(losses: torch.Tensor, texts: Callable[[], list[str]]) -> None:
        nonlocal iterate
        iterate += 1
        bar.update()
        loss = losses[0].item()
        if loss < found[0]:
            found[0] = loss
            own = texts()
            text = f"  {printable(repr(own[0]), one_line=True)}" if own else ""
            tqdm.write(f"{iterate:5d}  loss {loss:7.4f}{text}")

    return watch


def show(plain: Row, attacked: Row) -> None:
    """What was sent, all of it, and what came back."""
    judge = next(name for name in attacked.verdicts if name != label(KeywordRefusal()))
    sent = attacked.attacked if attacked.attacked is not None else "(embeddings, nobody can type them)"
    earlier = [line for user, reply in attacked.history for line in (("user", user), ("assistant", reply))]
    lines = [
        ("request", plain.prompt),
        *([("document", plain.document)] if plain.document is not None else []),
        ("reply", plain.reply),
        *((f"turn: {who}", text) for who, text in earlier),
        ("attacked", sent),
        *([("forced", attacked.prefill)] if attacked.prefill else []),
        ("reply", attacked.reply),
    ]
    print()
    for name, text in lines:
        print(f"{name:<9} {printable(text)}")
    print(
        f"success   {attacked.verdict(judge)} ({judge}), {attacked.forward_passes} forward and "
        f"{attacked.backward_passes} backward passes, {attacked.seconds:.1f} s"
    )
