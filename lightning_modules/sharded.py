"""FSDP2 as a trainer's strategy: each process keeps a piece of every weight, gradient and optimiser state.

trainer.strategy: {class_path: lightning_modules.sharded.FSDP2}
"""

from __future__ import annotations

from pathlib import Path
from typing import Any, Literal, Protocol, cast

import torch
from lightning.pytorch.strategies import ModelParallelStrategy
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.tensor import DTensor, distribute_tensor
from torch.optim import Optimizer

from lightning_modules.models.loading import ModelConfig
from lightning_modules.models.shard_files import OPTIMIZERS, WEIGHTS, read_shards, take_apart
from lightning_modules.models.sharding import ShardedWeights

PRECISIONS = ("32-true", "bf16-mixed")


class SharedCheckpointIO(Protocol):
    """Checkpoints that all processes write and read together."""

    def save_pieces(self, rest: dict[str, Any], tensors: dict[str, Tensor], path: Path) -> None:
        """Write the larger tensors' pieces beside the file that holds the rest."""
        ...

    def load_pieces(self, path: Path) -> tuple[dict[str, Any], Path | None]:
        """What the file holds, verified, and the folder of the pieces; None where it holds everything."""
        ...


class FSDP2(ModelParallelStrategy):
    """Fully sharded data parallelism by decoder layer. Attacks and evaluations gather the whole model.

    Args:
        gathered_dtype: what weights are gathered and computed with; null is their own dtype. What is kept,
            and learns, stays in its own.
    """

    def __init__(self, gathered_dtype: Literal["bfloat16"] | None = None) -> None:
        super().__init__(tensor_parallel_size=1, save_distributed_checkpoint=True)
        self.gathered_dtype = gathered_dtype

    def setup_environment(self) -> None:
        self._data_parallel_size = self.num_nodes * self.num_processes
        super().setup_environment()

    def sharded(self, model: nn.Module) -> ShardedWeights:
        """Shard a model that has just been loaded."""
        mesh: DeviceMesh = self.device_mesh["data_parallel"]
        dtype = None if self.gathered_dtype is None else getattr(torch, self.gathered_dtype)
        return ShardedWeights(model.to(self.root_device), mesh, dtype)

    def lightning_module_state_dict(self) -> dict[str, Any]:
        """The pieces that are here, as parameters: a tied one is one."""
        assert self.lightning_module is not None
        state: dict[str, Any] = self.lightning_module.state_dict(keep_vars=True)
        return state

    def optimizer_state(self, optimizer: Optimizer) -> dict[str, Any]:
        return dict(optimizer.state_dict())

    def save_checkpoint(
        self, checkpoint: dict[str, Any], filepath: str | Path, storage_options: Any | None = None
    ) -> None:
        rest, tensors = take_apart(checkpoint)
        path = Path(self.broadcast(str(filepath)))
        cast(SharedCheckpointIO, self.checkpoint_io).save_pieces(rest, tensors, path)

    def load_checkpoint(
        self, checkpoint_path: str | Path, weights_only: bool | None = None
    ) -> dict[str, Any]:
        """Fill model and optimisers, from pieces of any number of processes or from a whole file."""
        assert self.lightning_module is not None
        path = Path(self.broadcast(str(checkpoint_path)))
        content, folder = cast(SharedCheckpointIO, self.checkpoint_io).load_pieces(path)
        if folder is not None:
            return read_shards(folder, self.lightning_module, self.optimizers, content)
        own = self.lightning_module.state_dict(keep_vars=True)
        for name, value in content[WEIGHTS].items():
            if name in own and own[name].shape == value.shape:
                _fill(own[name], value)
        for optimizer, state in zip(self.optimizers, content.get(OPTIMIZERS, []), strict=False):
            optimizer.load_state_dict(_divided(state, optimizer))
        return content


def check_sharding(base: ModelConfig, precision: str) -> None:
    """Raises: ValueError for what FSDP2 cannot do here, or was never tried with."""
    if base.quantization is not None:
        raise ValueError(
            f"base.quantization: {base.quantization} weights cannot be sharded by FSDP2; set "
            "trainer.strategy: ddp (each device then holds the 4-bit base), or base.quantization: null"
        )
    if base.compile_attacks:
        raise ValueError(
            "base.compile_attacks: a graph cannot be compiled through FSDP2's hooks; set it to false, or "
            "trainer.strategy: ddp"
        )
    if precision not in PRECISIONS:
        raise ValueError(
            f"trainer.precision: expected {' or '.join(PRECISIONS)} with FSDP2, got {precision}; set it, or "
            "base.dtype: bfloat16, or the strategy's gathered_dtype"
        )


@torch.no_grad()
def _fill(own: Tensor, whole: Tensor) -> None:
    """Copy a whole tensor, the same on every process, into what is kept of it here."""
    if isinstance(own, DTensor):
        whole = distribute_tensor(whole.to(own.device), own.device_mesh, own.placements)
    own.copy_(whole)


def _divided(state: dict[str, Any], optimizer: Optimizer) -> dict[str, Any]:
    """An optimiser's state, whole, as pieces like its parameters'."""
    parameters = [p for group in optimizer.param_groups for p in group["params"]]
    divided: dict[int, dict[str, Any]] = {}
    for number, parts in state["state"].items():
        divided[number] = dict(parts)
        for name, value in parts.items():
            if isinstance(value, Tensor) and value.shape == parameters[number].shape:
                divided[number][name] = torch.zeros_like(parameters[number], dtype=value.dtype)
                _fill(divided[number][name], value)
    return {**state, "state": divided}
