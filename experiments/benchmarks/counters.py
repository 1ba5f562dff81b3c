"""How many operations the host launches, and which of them would make it wait for a GPU.

Counted on a CPU, where the same calls are dispatched: an operation is one call of torch's dispatcher (aten);
views and allocations among them launch nothing on a GPU and are counted apart.
"""

from __future__ import annotations

import sys
from collections import Counter
from collections.abc import Callable, Sequence
from contextlib import ExitStack
from types import FrameType, TracebackType
from typing import Any, Self

import torch
from torch import Tensor
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from experiments.planning.memory import FORMULAS

aten = torch.ops.aten
ALLOCATES = ("empty", "empty_like", "empty_strided", "new_empty", "new_empty_strided", "detach")
READS = {
    "_local_scalar_dense": "scalar read",
    "nonzero": "nonzero",
    "masked_select": "nonzero",
    "masked_scatter_backward": "nonzero",
}
"""Operations whose result the host needs before it can go on, by what they are called here."""
INDEXES = (aten.index.Tensor, aten.index_put.default, aten.index_put_.default)
COPIES = {"tolist", "cpu", "numpy"}
OWN = ("lightning_modules", "datamodules", "callbacks")
"""Packages in which a wait is looked for."""


class Launches:
    """Counts while it is open.

    with Launches() as launches:
        step()
    launches.operations, launches.kernels, launches.syncs
    """

    def __init__(self) -> None:
        self.by_name: Counter[str] = Counter()
        self.operations = 0
        """All calls of the dispatcher."""
        self.kernels = 0
        """Those that compute something: neither views nor allocations."""
        self.written = 0
        """Bytes of the kernels' results."""
        self.flops = 0
        """Floating-point operations of products and attention, forward and backward."""
        self.syncs: Counter[str] = Counter()
        """What would wait for a GPU, by kind."""
        self.places: Counter[str] = Counter()
        """The same by the innermost function of the project: on a CPU all tensors look alike, also those that
        are on the host beside a GPU."""
        self._stack = ExitStack()

    def wait(self, kind: str) -> None:
        """Count one."""
        self.syncs[kind] += 1
        self.places[_place()] += 1

    def __enter__(self) -> Self:
        self._stack.enter_context(_Dispatched(self))
        self._stack.enter_context(_Called(self))
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._stack.close()


class _Dispatched(TorchDispatchMode):
    def __init__(self, launches: Launches) -> None:
        super().__init__()
        self.launches = launches

    def __torch_dispatch__(
        self,
        func: Any,
        types: Sequence[type],
        args: tuple[Any, ...] = (),
        kwargs: dict[str, Any] | None = None,
    ) -> Any:
        if func.namespace == "aten":
            name = func._opname
            own = self.launches
            own.operations += 1
            own.by_name[name] += 1
            own.kernels += not (func.is_view or name in ALLOCATES)
            if name in READS:
                own.wait(READS[name])
            elif func in INDEXES and any(i is not None and i.dtype == torch.bool for i in args[1]):
                own.wait("boolean index")
        given = func(*args, **(kwargs or {}))
        if func.namespace == "aten" and not (func.is_view or func._opname in ALLOCATES):
            self.launches.written += sum(
                leaf.numel() * leaf.element_size() for leaf in tree_leaves(given) if isinstance(leaf, Tensor)
            )
        formula = FORMULAS.get(func._overloadpacket)
        if formula is not None:
            self.launches.flops += formula(*args, **(kwargs or {}), out_val=given)
        return given


class _Called(TorchFunctionMode):
    """Copies to the host, which are no copies on a CPU and are therefore not dispatched there. A copy to
    another tensor's device cannot be told from one that stays where it is."""

    def __init__(self, launches: Launches) -> None:
        super().__init__()
        self.launches = launches

    def __torch_function__(
        self,
        func: Callable[..., Any],
        types: Any,
        args: Sequence[Any] = (),
        kwargs: dict[str, Any] | None = None,
    ) -> Any:
        name = getattr(func, "__name__", "")
        to_host = name == "to" and any(_is_host(value) for value in (*args[1:], *(kwargs or {}).values()))
        if (name in COPIES or to_host) and args and isinstance(args[0], Tensor):
            self.launches.wait("copy to the host")
        return func(*args, **(kwargs or {}))


def _place() -> str:
    frame: FrameType | None = sys._getframe()
    while frame is not None:
        module = str(frame.f_globals.get("__name__", ""))
        if module.startswith(OWN):
            return f"{module.rpartition('.')[2]}.{frame.f_code.co_qualname}"
        frame = frame.f_back
    return ""


def _is_host(value: object) -> bool:
    return isinstance(value, str) and value == "cpu"
