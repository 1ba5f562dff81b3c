"""A model without weights: floating-point tensors have shapes only, whole numbers and masks are computed.

The shipped code then runs as it is on tensors that hold nothing (torch's FakeTensorMode). Which positions are
scored, how long a row is and who attends to whom are questions about ids and masks; these stay ordinary
tensors, so that boolean indexing gives the true shapes. What remains unanswerable is a decision about a
floating-point value: see `ShapesOnly`.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensor, FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

aten = torch.ops.aten
MAKES = (
    aten.empty.memory_format,
    aten.zeros.default,
    aten.ones.default,
    aten.full.default,
    aten.rand.default,
    aten.randn.default,
    aten.empty_strided.default,
)
"""What makes a tensor out of nothing."""
INDEXES = (aten.index.Tensor, aten.index_put.default, aten.index_put_.default)


class UnknownValue(ValueError):
    """The code at hand decides by a value that a plan does not have."""


class ShapesOnly(TorchDispatchMode):
    """While it is open, floating-point tensors of one dimension or more hold nothing.

    A truth value that comes from them is taken to be true: the loss is finite, no example has reached its
    `stop_loss`, training goes on.

    Raises: UnknownValue where a number is read from a tensor that holds none.
    """

    def __init__(self) -> None:
        super().__init__()
        self.fake = FakeTensorMode(allow_non_fake_inputs=True)

    def __torch_dispatch__(
        self,
        func: Any,
        types: Sequence[type],
        args: tuple[Any, ...] = (),
        kwargs: dict[str, Any] | None = None,
    ) -> Any:
        kwargs = kwargs or {}
        tensors = [leaf for leaf in tree_leaves((args, kwargs)) if isinstance(leaf, Tensor)]
        empty = any(isinstance(tensor, FakeTensor) for tensor in tensors)
        if func is aten._local_scalar_dense.default and empty:
            return self._answer(args[0])
        if func in INDEXES and empty:
            args = (args[0], _numbered(args[1]), *args[2:])
        if empty or (not tensors and self._makes_floats(func, args, kwargs)):
            with self.fake:
                return func(*args, **kwargs)
        return func(*args, **kwargs)

    @staticmethod
    def _answer(asked: Tensor) -> bool:
        if asked.dtype == torch.bool:
            return True
        raise UnknownValue(
            "model.attack: the training step decides by a floating-point value, which a plan does not have; "
            "plan with another attack, e.g. --model.attack=EmbeddingPGD"
        )

    @staticmethod
    def _makes_floats(func: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> bool:
        if func not in MAKES or not len(args[0]):
            return False
        dtype = kwargs.get("dtype")
        if dtype is None:
            dtype = type(args[1]) if func is aten.full.default else torch.get_default_dtype()
        return dtype is float or (isinstance(dtype, torch.dtype) and dtype.is_floating_point)


def _numbered(indices: Sequence[Tensor | None]) -> list[Tensor | None]:
    """Masks as the numbers of their True positions: a shape without values cannot be cut by a mask."""
    numbered: list[Tensor | None] = []
    for index in indices:
        is_mask = index is not None and index.dtype == torch.bool and not isinstance(index, FakeTensor)
        numbered += list(index.nonzero().unbind(1)) if is_mask else [index]  # type: ignore[union-attr]
    return numbered


@contextmanager
def built_without_weights() -> Iterator[None]:
    """Whatever is constructed inside is on torch's meta device, which allocates nothing."""
    with torch.device("meta"):
        yield


def without_weights(module: nn.Module, mode: ShapesOnly) -> nn.Module:
    """The same module, made on the meta device, with parameters and buffers that `mode` computes shapes with;
    tied ones stay tied."""
    known: dict[int, Tensor] = {}

    def shape_of(tensor: Tensor, learns: bool) -> Tensor:
        if id(tensor) not in known:
            with mode.fake:
                made = torch.empty_strided(tensor.shape, tensor.stride(), dtype=tensor.dtype, device="cpu")
            # Not nn.Parameter(made): it would leave a weak reference, which `Module.to` refuses.
            made.requires_grad_(learns)
            made._is_param = isinstance(tensor, nn.Parameter)  # type: ignore[attr-defined]
            known[id(tensor)] = made
        return known[id(tensor)]

    for part in module.modules():
        for name, parameter in part._parameters.items():
            if parameter is not None:
                made = shape_of(parameter, parameter.requires_grad)
                part._parameters[name] = made  # type: ignore[assignment]
        for name, buffer in part._buffers.items():
            if buffer is not None:
                part._buffers[name] = shape_of(buffer, False)
    return module
