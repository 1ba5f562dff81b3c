"""A model whose weights lie in pieces on several devices (FSDP2), and when they are put together.

Each decoder layer is a group of its own, gathered for its forward and its backward pass; what stands outside
the layers (embedding, last norm, head) is one more, gathered for the whole outer pass. An attack and an
evaluation gather everything once and keep it: every process may then go its own way, as examples that leave
early and replies of different lengths need, and nothing is sent in an iteration. In the outer pass all of
them make the same passes: each is agreed on before it begins.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from typing import Any, TypeVar

import torch
from torch import Tensor, nn
from torch.autograd.graph import Node
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.fsdp import FSDPModule, MixedPrecisionPolicy, fully_shard
from torch.distributed.tensor import DTensor
from torch.utils._pytree import tree_leaves

from lightning_modules.models.agreement import Agreement
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
        self._agree = Agreement()
        self._passes: list[set[Node]] | None = None
        """Of each pass over divided layers, in an outer pass, where its gradient enters the layers."""
        self._current: set[Node] | None = None
        # Before FSDP2's own hooks, which gather and free.
        layers[0].register_forward_pre_hook(self._begin_pass, prepend=True)
        for layer in (layers[0], layers[-1]):
            layer.register_forward_hook(self._note_output, prepend=True)
        # The first to run is the root for good; later that might be a layer, in an attack.
        self.outer_pass(lambda: None)
        self._groups[-1].divide()

    def outer_pass(self, losses: Callable[[], T]) -> T:
        """Compute losses with embedding, norm and head gathered until they have been differentiated.

        Raises: ValueError where processes make different passes, or differentiate different ones.
        """
        self._agree("an outer pass")
        self._passes = []
        try:
            result: T = self._root(losses)
            reached = _reached(result, self._passes)
        finally:
            self._passes = None
        self._agree(f"the end of an outer pass that differentiates passes {reached}")
        return result

    @contextmanager
    def gathered(self) -> Iterator[None]:
        """All weights whole while the context lasts; contexts may be nested, also in an outer pass."""
        divided = [group for group in self._groups if group.is_divided]
        if divided:
            self._agree("gathering all weights")
        for group in divided:
            group.gather()
        try:
            yield
        finally:
            for group in divided:
                group.divide()

    def _begin_pass(self, layer: nn.Module, inputs: object) -> None:
        self._current = None
        # Layers that are gathered already send nothing, and what is recomputed in a backward pass is a pass
        # that was agreed on.
        if self._passes is not None and self._groups[0].is_divided:
            self._current = set()
            self._passes.append(self._current)
            kind = "with" if torch.is_grad_enabled() else "without"
            self._agree(f"pass {len(self._passes)} over the layers {kind} gradients")

    def _note_output(self, layer: nn.Module, inputs: object, output: Any) -> None:
        states = output[0] if isinstance(output, tuple) else output
        if self._current is not None and states.grad_fn is not None:
            self._current.add(states.grad_fn)


def _reached(result: object, passes: list[set[Node]]) -> list[int]:
    """Numbers, from 1, of the passes that differentiating a result goes through."""
    waiting = [leaf.grad_fn for leaf in tree_leaves(result) if isinstance(leaf, Tensor)]
    owners = {node: number for number, nodes in enumerate(passes, start=1) for node in nodes}
    seen: set[Node | None] = {None}
    found: set[int] = set()
    while waiting:
        node = waiting.pop()
        if node in seen:
            continue
        seen.add(node)
        if node in owners:
            # What lies below is this pass, and what it has read of earlier ones.
            found.add(owners[node])
        elif node is not None:
            waiting += [before for before, _ in node.next_functions]
    return sorted(found)


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
