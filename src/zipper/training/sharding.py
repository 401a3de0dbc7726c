"""Sharding: a model whose parameters lie in pieces on several processes (FSDP2: torch's
`fully_shard`).

A block is gathered by all processes just before it runs, so all must run the same blocks in the
same order. Nothing here knows what the blocks compute and which of them learn.
"""

from collections.abc import Iterable

import torch
from torch import Tensor, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import FSDPModule, fully_shard
from torch.distributed.tensor import DTensor, distribute_tensor


def shard(model: nn.Module, blocks: Iterable[nn.Module], device: torch.device) -> None:
    """Cut all parameters, frozen and trained, into one piece a process, in place. Each of `blocks`
    is gathered for itself while it runs; what lies outside of them from the model's forward until
    its backward. Gradients are means over processes.

    A model's parameters are other objects afterwards: make the optimizer later. Needs a process
    group.
    """
    mesh = init_device_mesh(device.type, (torch.distributed.get_world_size(),))
    for unit in (*blocks, model):
        fully_shard(unit, mesh=mesh)
        assert isinstance(unit, FSDPModule)
        unit.set_force_sum_reduction_for_comms(True)  # and divide: gloo knows no mean


def whole(tensor: Tensor) -> Tensor:
    """A tensor on the CPU. Of one that is cut all processes must ask, and all get the whole."""
    found = tensor.detach()
    return (found.full_tensor() if isinstance(found, DTensor) else found).cpu().contiguous()


def like(tensor: Tensor, parameter: Tensor) -> Tensor:
    """A whole tensor cut as `parameter` is, if it is, on its device. Every process gives the same
    one."""
    moved = tensor.to(parameter.device)
    if isinstance(parameter, DTensor):
        return distribute_tensor(
            moved, parameter.device_mesh, parameter.placements, src_data_rank=None
        )
    return moved
