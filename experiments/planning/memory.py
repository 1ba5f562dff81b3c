"""Which tensors are alive, by what they are for, and how much is computed: counted at every operation.

Counted are the storages of tensors, by the bytes that they ask for; what a kernel allocates inside and an
allocator's rounding are not. It counts ordinary tensors and tensors that hold nothing
(`shapes_only.ShapesOnly`) alike. Floating-point operations are those of the formulas of
torch.utils.flop_counter; its own mode would keep every graph alive through the hooks by which it names
modules.
"""

from __future__ import annotations

import weakref
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from torch.utils.flop_counter import flop_registry, sdpa_backward_flop_count, sdpa_flop_count

WEIGHTS, ADAPTERS, GRADIENTS, OPTIMISER = "weights", "adapters", "gradients", "optimiser state"
ACTIVATIONS, LOGITS, ATTACK, MERGED = "activations", "logits", "attack", "merged weights"
PARTS = (WEIGHTS, ADAPTERS, GRADIENTS, OPTIMISER, ACTIVATIONS, LOGITS, ATTACK, MERGED)


aten = torch.ops.aten


def _attention(query: Tensor, key: Tensor, value: Tensor, *_: Any, **__: Any) -> int:
    return sdpa_flop_count(query.shape, key.shape, value.shape)


def _attention_backward(
    upstream: Tensor, query: Tensor, key: Tensor, value: Tensor, *_: Any, **__: Any
) -> int:
    return sdpa_backward_flop_count(upstream.shape, query.shape, key.shape, value.shape)


FORMULAS: dict[Any, Callable[..., int]] = {
    **flop_registry,
    aten._scaled_dot_product_flash_attention_for_cpu: _attention,
    aten._scaled_dot_product_flash_attention_for_cpu_backward: _attention_backward,
}
"""torch's own, and those of attention on a CPU, which it leaves out."""


class Counted(TorchDispatchMode):
    """While it is open, every new storage and every floating-point operation is counted under the part that
    is being worked on.

    Args:
        model: its parameters and buffers are counted from the start.
        vocabulary: tensors with so many columns are logits.
    """

    def __init__(self, model: nn.Module, vocabulary: int) -> None:
        super().__init__()
        self.part = ACTIVATIONS
        self.live: Counter[str] = Counter()
        self.flops: Counter[str] = Counter()
        self.sweeps: Counter[str] = Counter()
        """Passes over all layers, forward and backward ones, each of which reads every weight."""
        self.peaks: dict[str, Counter[str]] = {}
        """What was alive, bytes by part, when it was the most while a part was worked on."""
        self._vocabulary = vocabulary
        self._parts: dict[int, str] = {}
        self._weights: set[int] = set()
        for name, parameter in model.named_parameters():
            self._enter(parameter, ADAPTERS if "lora_" in name else WEIGHTS)
            self._weights.add(_key(parameter))
        for buffer in model.buffers():
            self._enter(buffer, WEIGHTS)

    @contextmanager
    def working_on(self, part: str) -> Iterator[None]:
        """What is allocated inside belongs to this part."""
        before, self.part = self.part, part
        try:
            yield
        finally:
            self.part = before

    def swept(self, decoder: nn.Module, given: object, output: Any) -> None:
        """A hook on the decoder stack: count its pass, and the one back where there is one."""
        part, states = self.part, output.last_hidden_state
        self.sweeps[part] += 1
        if states.requires_grad:
            states.register_hook(lambda _: self.sweeps.update({part: 1}))

    def call(self, tensor: Tensor, part: str) -> None:
        """Count a tensor's storage under another part from now on."""
        key, size = _key(tensor), tensor.untyped_storage().nbytes()
        before = self._parts.get(key)
        if before is not None:
            self.live[before] -= size
            self.live[part] += size
            self._parts[key] = part

    def __torch_dispatch__(
        self,
        func: Any,
        types: Sequence[type],
        args: tuple[Any, ...] = (),
        kwargs: dict[str, Any] | None = None,
    ) -> Any:
        if func is torch.ops.prim.device.default:  # asked at every turn of a tensor that holds nothing
            return args[0].fake_device
        given = func(*args, **(kwargs or {}))
        formula = FORMULAS.get(func._overloadpacket)
        if formula is not None:
            self.flops[self.part] += formula(*args, **(kwargs or {}), out_val=given)
        merges = func is aten.clone.default and _key(args[0]) in self._weights
        for tensor in tree_leaves(given):
            if isinstance(tensor, Tensor):
                self._enter(tensor, MERGED if merges else self._part_of(tensor))
        return given

    def _part_of(self, tensor: Tensor) -> str:
        is_logits = tensor.ndim > 1 and tensor.shape[-1] == self._vocabulary and self.part != OPTIMISER
        return LOGITS if is_logits else self.part

    def _enter(self, tensor: Tensor, part: str) -> None:
        storage, key = tensor.untyped_storage(), _key(tensor)
        size = storage.nbytes()
        if key in self._parts or not size:
            return
        self._parts[key] = part
        self.live[part] += size
        weakref.finalize(storage, self._leave, key, size).atexit = False
        if self.part not in self.peaks or self.live.total() > self.peaks[self.part].total():
            self.peaks[self.part] = self.live.copy()

    def _leave(self, key: int, size: int) -> None:
        self.live[self._parts.pop(key)] -= size


def _key(tensor: Tensor) -> int:
    return tensor.untyped_storage()._cdata
