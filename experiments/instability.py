"""SmoothLLM's assumption, measured on a run's own suffixes: how often an attack still works with exactly k
characters of its suffix changed, and what the published guarantee would promise were it k-unstable.

python -m experiments.instability runs/quickstart --attack gcg        (after `thundercat test`)

Suffixes that worked are read from the run's rows and tried on the model of the same step, greedily; none is
searched for. Copies of one suffix are counted as independent: the intervals are for them, not for requests.
"""

from __future__ import annotations

import json
import logging
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from statistics import median
from typing import Any

from jsonargparse import ArgumentParser

from callbacks.judges.exact import TargetPrefix
from callbacks.metrics.estimates import Estimate, rate
from callbacks.run_folder.folder import RunFolder
from datamodules.fields import Count
from datamodules.result_lines import Row, Stage
from datamodules.results import read_measurements, read_rows
from experiments.commands.loaded import build, loaded, node_of, run_configuration
from experiments.config.errors import ConfigError
from lightning_modules.defences.certificates.k_instability import copy_fails, defence_success, instability
from lightning_modules.models.fingerprint import fingerprint
from lightning_modules.models.requests import Decoding, Request
from lightning_modules.pretrained import PretrainedModel

Measured = dict[int, Estimate]
JUDGE = f"{TargetPrefix.name}@{TargetPrefix.revision}"


def measure(
    run: str,
    attack: str = "gcg",
    stage: Stage = "test",
    ckpt_path: str | None = "last",
    ks: Sequence[Count] = (1, 2, 3, 5, 8),
    draws: Count = 10,
    limit: Count = 20,
    copies: Count = 10,
    share: float = 0.1,
    seed: int = 0,
    out: str | None = None,
) -> Measured:
    """Measure, print a table, and write it as JSON.

    Args:
        run: a run folder whose rows hold the attack.
        attack: name of a suffix attack in its suite.
        stage: which rows.
        ckpt_path: a checkpoint, or `last`; null for the model before training.
        ks: how many characters change.
        draws: changed copies of each suffix.
        limit: suffixes, at most.
        copies: SmoothLLM's copies, for what it would promise.
        share: SmoothLLM's share of characters that it swaps.
        seed: of the changes.
        out: file to write; null prints only.

    Raises: ConfigError where the run has no such suffix that worked.
    """
    folder = RunFolder.of(run)
    config = {**run_configuration(run, "instability"), "ckpt_path": ckpt_path}
    config["model"] = node_of(config, PretrainedModel, ("base", "seed"))
    module, data = build(config, PretrainedModel)
    with loaded(config, "predict", module, data, folder) as (step, _):
        worked = _worked(folder.path, attack, stage, step, fingerprint(module.model))[:limit]
        if not worked:
            raise ConfigError(
                f"--attack: expected a suffix attack that worked on the model of step {step} in {run!r} "
                f"({stage}), found none of {attack!r}; name another attack, or run `thundercat {stage}` first"
            )
        lengths = [len(_suffix(row)) for row in worked]
        texts = [str(row.attacked) for row in worked]
        found = instability(
            module.language_model,
            [Request(text, system=row.system) for text, row in zip(texts, worked, strict=True)],
            [row.expected for row in worked],
            lengths,
            TargetPrefix(),
            ks,
            draws,
            seed,
            Decoding(max_new_tokens=48),
        )
    measured = {own.k: rate([True] * own.works + [False] * (own.draws - own.works)) for own in found}
    length, suffix = int(median(map(len, texts))), int(median(lengths))
    promised = {k: defence_success(copies, copy_fails(k, length, suffix, share)) for k in measured}
    print(f"{len(worked)} suffixes of {attack!r}, {suffix} characters in {length} (medians), step {step}\n")
    print(f"| characters changed | attack works | were it k-unstable, {copies} copies at {share:g} |")
    print("| --- | --- | --- |")
    for k, own in measured.items():
        print(f"| {k} | {_percent(own)}, n = {own.n} | {100 * promised[k]:.1f} % |")
    if out is not None:
        settings: dict[str, Any] = {"run": Path(run).name, "attack": attack, "stage": stage, "step": step}
        settings |= {"suffixes": len(worked), "draws": draws, "copies": copies, "share": share, "seed": seed}
        cells = [{"k": k, "works": asdict(own), "promised": promised[k]} for k, own in measured.items()]
        Path(out).write_text(json.dumps({**settings, "cells": cells}, indent=2) + "\n", encoding="utf-8")
    return measured


def _worked(folder: Path, attack: str, stage: Stage, step: int, model: str) -> list[Row]:
    """Harmful requests on which the attack's latest measurement of this very model succeeded, without a
    defence around it."""
    asked = {
        own.settings
        for own in read_measurements(folder)
        if (own.attack, own.stage, own.step, own.subject) == (attack, stage, step, "harmful")
    }
    return [
        row
        for row in read_rows(folder)
        if (row.attack, row.stage, row.step, row.subject) == (attack, stage, step, "harmful")
        and (row.model, row.defence) == (model, "")
        and row.settings in asked
        and _works(row)
    ]


def _works(row: Row) -> bool:
    return bool(_suffix(row)) and not row.history and JUDGE in row.verdicts and row.verdict(JUDGE)


def _suffix(row: Row) -> str:
    """What stands behind the request; '' for an attack of another kind."""
    text = row.attacked or ""
    return text[len(row.prompt) :].lstrip() if text.startswith(row.prompt) and not row.prefill else ""


def _percent(own: Estimate) -> str:
    return f"{100 * own.value:.1f} % [{100 * own.low:.0f}, {100 * own.high:.0f}]"


def main(arguments: Sequence[str] | None = None) -> Measured:
    """The command line."""
    logging.getLogger("lightning.pytorch").setLevel(logging.ERROR)
    parser = ArgumentParser(prog="python -m experiments.instability", description=__doc__)
    parser.add_function_arguments(measure, as_positional=True)
    options = parser.parse_args(list(arguments) if arguments is not None else None)
    try:
        return measure(**vars(options))
    except (ValueError, FileNotFoundError) as error:
        parser.exit(2, f"error: {error}\n")


if __name__ == "__main__":
    main()
