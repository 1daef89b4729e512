"""Tensors as DTensors, as FSDP2 has them: sharded by rows, here over this process alone."""

from __future__ import annotations

import torch
import torch.distributed as dist

from bench.copying import Tensors


def as_shards(tensors: Tensors) -> Tensors:
    """The same memory as shards of DTensors. Makes the process a group of one, if it is none yet.

    What a step does with a shard is the same for any number of processes: it communicates nothing.
    """
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.tensor import DTensor, Shard

    if not dist.is_initialized():
        dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    mesh = init_device_mesh(tensors[0].device.type, (1,))
    return [DTensor.from_local(t, mesh, [Shard(0)], run_check=False) for t in tensors]


def local(tensor: torch.Tensor) -> torch.Tensor:
    """The shard of a DTensor; itself otherwise."""
    part: torch.Tensor = getattr(tensor, "_local_tensor", tensor)
    return part
