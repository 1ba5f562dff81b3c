"""Evaluate inside training without a trace: modules' modes, gradients and all random states are as they were
afterwards."""

from __future__ import annotations

import random
from collections.abc import Iterator
from contextlib import contextmanager

import numpy as np
import torch
from torch import nn


@contextmanager
def undisturbed(module: nn.Module) -> Iterator[None]:
    """Evaluation mode inside; train/eval flags, `.grad` tensors and RNG states restored on leaving."""
    modes = [(part, part.training) for part in module.modules()]
    gradients = [(p, p.grad) for p in module.parameters()]
    states = random.getstate(), np.random.get_state(), torch.get_rng_state()
    cuda = torch.cuda.get_rng_state_all() if torch.cuda.is_available() else []
    module.eval()
    for parameter, _ in gradients:
        parameter.grad = None
    try:
        yield
    finally:
        for part, training in modes:
            part.training = training
        for parameter, gradient in gradients:
            parameter.grad = gradient
        random.setstate(states[0])
        np.random.set_state(states[1])
        torch.set_rng_state(states[2])
        for device, state in enumerate(cuda):
            torch.cuda.set_rng_state(state, device)
