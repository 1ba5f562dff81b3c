"""A model whose weights lie in pieces on several devices (FSDP2), and when they are put together.

Each decoder layer is a group of its own, gathered for its forward and its backward pass; what stands outside
the layers (embedding, last norm, head) is one more, gathered for the whole outer pass. An attack and an
evaluation gather everything once and keep it: every process may then go its own way, as examples that leave
early and replies of different lengths need, and nothing is sent in an iteration.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from typing import TypeVar

import torch
from torch import nn
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.fsdp import FSDPModule, MixedPrecisionPolicy, fully_shard
from torch.distributed.tensor import DTensor

from lightning_modules.models.decoder import causal_lm

T = TypeVar("T")


class ShardedWeights:
    """Shards a model in place; its names, and those of its checkpoints, stay.

    Args:
        model: a causal LM, plain or wrapped by PEFT, the same on every process.
        mesh: the devices, in one dimension.
        gathered_dtype: what weights are gathered in; None is their own dtype. What each device keeps, and
            what learns, stays in its own; gradients are then added in fp32.

    Raises: ValueError where the decoder has no list of layers.
    """

    def __init__(self, model: nn.Module, mesh: DeviceMesh, gathered_dtype: torch.dtype | None = None) -> None:
        layers = getattr(causal_lm(model).get_decoder(), "layers", None)
        if not isinstance(layers, nn.ModuleList):
            raise ValueError(
                f"trainer.strategy: expected a decoder with a list of layers, got "
                f"{type(causal_lm(model)).__name__}, which cannot be sharded; set trainer.strategy: ddp"
            )
        policy = MixedPrecisionPolicy()
        if gathered_dtype is not None:
            policy = MixedPrecisionPolicy(param_dtype=gathered_dtype, reduce_dtype=torch.float32)
        for layer in layers:
            fully_shard(layer, mesh=mesh, mp_policy=policy, reshard_after_forward=True)
        self._root = _Pass(model)
        fully_shard(self._root, mesh=mesh, mp_policy=policy, reshard_after_forward=False)
        within = {part for layer in layers for part in layer.modules()}
        self._groups = [_Group(layer, layer.modules()) for layer in layers]
        self._groups.append(_Group(self._root, [part for part in model.modules() if part not in within]))
        # The first to run is the root for good; later that might be a layer, in an attack.
        self.outer_pass(lambda: None)
        self._groups[-1].divide()

    def outer_pass(self, losses: Callable[[], T]) -> T:
        """Compute losses with embedding, norm and head gathered until they have been differentiated."""
        result: T = self._root(losses)
        return result

    @contextmanager
    def gathered(self) -> Iterator[None]:
        """All weights whole while the context lasts; contexts may be nested, also in an outer pass."""
        divided = [group for group in self._groups if group.is_divided]
        for group in divided:
            group.gather()
        try:
            yield
        finally:
            for group in divided:
                group.divide()


class _Group:
    """Weights that are gathered together.

    Args:
        module: what FSDP2 calls them by.
        parts: the modules that own them.
    """

    def __init__(self, module: nn.Module, parts: Iterable[nn.Module]) -> None:
        assert isinstance(module, FSDPModule)
        self._module = module
        # One of them tells of all.
        self._owner, self._name = next((part, name) for part in parts for name in part._parameters)
        self._between_passes = isinstance(module, _Pass)

    @property
    def is_divided(self) -> bool:
        return isinstance(getattr(self._owner, self._name), DTensor)

    def gather(self) -> None:
        """Put the weights together and keep them so."""
        self._module.unshard()
        self._module.set_reshard_after_forward(False, recurse=False)
        self._module.set_reshard_after_backward(False, recurse=False)

    def divide(self) -> None:
        """Free what other devices hold; passes gather it again."""
        self._module.set_reshard_after_forward(not self._between_passes, recurse=False)
        self._module.set_reshard_after_backward(True, recurse=False)
        self._module.reshard()


class _Pass(nn.Module):
    """The root: a forward pass is what it is given, since steps call a model's parts and not the model."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model = model

    def forward(self, losses: Callable[[], T]) -> T:
        return losses()
