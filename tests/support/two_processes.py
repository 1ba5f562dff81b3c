"""Attacks that learn during training, in two processes: what each keeps, and what it gets back."""

from __future__ import annotations

from pathlib import Path

import torch
from torch import distributed

from lightning_modules.attacks.base import load_attack_state, share, state_of
from tests.conftest import chat_model, text_batch
from tests.support.attacks import persistent, suffix_generator

ATTACKS = {"persistent_gcg": persistent, "suffix_generator": suffix_generator}


def go_on(rank: int, folder: str) -> None:
    """Attack, save in the first process, resume in both, attack again with the old and the resumed attack;
    each process writes both results to the folder.

    Both processes meet the same examples with different rngs: the hardest case for a pool.
    """
    torch.set_num_threads(1)
    distributed.init_process_group("gloo", init_method=f"file://{folder}/meet", rank=rank, world_size=2)
    model, batch = chat_model(), text_batch(2)
    for name, build in ATTACKS.items():
        whole = build()
        whole(model, batch, torch.Generator().manual_seed(10 + rank))
        if name == "suffix_generator":
            # It learns from what all have found; pools would become alike, and here they are to differ.
            share(whole, model)
        state = state_of(whole)
        if rank == 0:
            torch.save(state, f"{folder}/{name}.pt")
        distributed.barrier()
        resumed = build()
        load_attack_state(resumed, torch.load(f"{folder}/{name}.pt", weights_only=True))
        found = [
            attack(model, batch, torch.Generator().manual_seed(20 + rank)) for attack in (whole, resumed)
        ]
        results = [{"texts": list(a.texts), "loss_curve": a.loss_curve} for a in found]
        torch.save(results, Path(folder) / f"{name}_{rank}.pt")
    distributed.destroy_process_group()
