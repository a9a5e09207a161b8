"""Fully sharded data parallelism: each process keeps a share of every parameter, gradient and moment.

PyTorch's `fully_shard` (FSDP2) gathers a block's parameters just before they are needed and lets them go
after (Zhao et al. 2023, "PyTorch FSDP"; the idea is stage 3 of ZeRO, Rajbhandari et al. 2020). What is here
is what a training loop needs around it: sharding a model, norms over all shards, and whole tensors for a
checkpoint, so that what shards have trained is read like any other run.
"""

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn


@dataclass(frozen=True)
class Gathered:
    """What `state_dict` would return on one process."""

    state: dict[str, Any]

    def state_dict(self) -> dict[str, Any]:
        """The whole tensors."""
        return self.state


def shard(model: nn.Module) -> None:
    """Turn the parameters of `model` into shards, in place; rank 0's values become everybody's.

    Each of `model.blocks`, where there are any, is gathered on its own, and the rest as one.
    """
    from torch.distributed.fsdp import fully_shard

    with torch.no_grad():
        for tensor in (*model.parameters(), *model.buffers()):
            dist.broadcast(tensor, 0)
    device = next(model.parameters()).device
    mesh = dist.init_device_mesh(device.type, (dist.get_world_size(),))
    for block in getattr(model, "blocks", ()):
        fully_shard(block, mesh=mesh)
    fully_shard(model, mesh=mesh)


def is_shard(tensor: Tensor) -> bool:
    """Whether other processes hold the rest of it."""
    return hasattr(tensor, "to_local")


def local(tensor: Tensor) -> Tensor:
    """This process's part of a shard (the same memory); any other tensor as it is."""
    return tensor.to_local() if is_shard(tensor) else tensor


def global_norm(parts: list[Tensor]) -> Tensor:
    """The L2 norm of all processes' parts together, a 0-d tensor."""
    squares = torch.stack(torch._foreach_norm(parts)).square().sum()
    dist.all_reduce(squares)
    return squares.sqrt()


@contextmanager
def unsynchronised(model: nn.Module) -> Iterator[None]:
    """Backward inside adds up whole local gradients and sends nothing."""
    model.set_requires_gradient_sync(False)
    try:
        yield
    finally:
        model.set_requires_gradient_sync(True)


def gather_model(model: nn.Module) -> Gathered:
    """The whole parameters and buffers, on the CPU; all processes must call it.

    A tensor under two names is gathered once, and stays one tensor.
    """
    whole: dict[int, Tensor] = {}
    state = {}
    for name, tensor in model.state_dict(keep_vars=True).items():
        if id(tensor) not in whole:
            whole[id(tensor)] = _whole(tensor.detach())
        state[name] = whole[id(tensor)]
    return Gathered(state)


def gather_optimizer(optimizer: Any) -> Gathered:
    """The optimiser's state with whole tensors, on the CPU; all processes must call it."""
    return Gathered(_map(optimizer.state_dict(), _whole))


def scatter(value: Tensor, like: Tensor) -> Tensor:
    """The shard of a whole tensor that belongs where `like` is; all processes must call it, with the same."""
    if not is_shard(like):
        return value
    from torch.distributed.tensor import distribute_tensor

    return distribute_tensor(value.to(like.device), like.device_mesh, like.placements)


def scatter_optimizer(state: Mapping[str, Any], optimizer: Any) -> dict[str, Any]:
    """An optimiser's whole state with shards where its parameters are shards."""
    parameters = [p for group in optimizer.param_groups for p in group["params"]]
    return {
        **state,
        "state": {
            index: {
                name: scatter(value, parameters[index])
                if isinstance(value, Tensor) and value.shape == parameters[index].shape
                else value
                for name, value in moments.items()
            }
            for index, moments in state["state"].items()
        },
    }


def _whole(tensor: Tensor) -> Tensor:
    return (tensor.full_tensor() if is_shard(tensor) else tensor).cpu()


def _map(value: Any, change: Any) -> Any:
    """`value` with every tensor in it changed, in the order in which they stand."""
    if isinstance(value, Tensor):
        return change(value)
    if isinstance(value, Mapping):
        return {key: _map(item, change) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return type(value)(_map(item, change) for item in value)
    return value
