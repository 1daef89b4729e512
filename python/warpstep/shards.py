"""Sharded tensors (torch.distributed's DTensor): each process steps the shard that it has.

A step is element by element, so a parameter's shard needs nothing but the same shards of its
gradient and its state. Only what is summed over a whole tensor needs the other processes.
"""

from __future__ import annotations

import math
import sys
from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor


def _module() -> Any:
    return sys.modules.get("torch.distributed.tensor")  # not imported: there is no DTensor


def _sharded(tensor: Tensor) -> Any:
    """The tensor if it is one of torch.distributed's, else None."""
    module = _module()
    return tensor if module is not None and isinstance(tensor, module.DTensor) else None


def layout_of(tensor: Tensor) -> Any:
    """How a tensor is laid out over processes, (mesh, placements); None for a plain one."""
    sharded = _sharded(tensor)
    return None if sharded is None else (sharded._spec.mesh, sharded._spec.placements)


def own_part(tensor: Tensor) -> Tensor:
    """The shard that this process has; of a plain tensor, itself."""
    sharded = _sharded(tensor)
    part: Tensor = tensor if sharded is None else sharded._local_tensor
    return part


def like_shards(tensor: Tensor, part: Tensor, shape: tuple[int, ...]) -> Tensor:
    """A tensor of ``shape`` whose shards are laid out as those of ``tensor``, from this one's."""
    if (layout := layout_of(tensor)) is None:
        return part
    stride = tuple(math.prod(shape[i + 1 :]) for i in range(len(shape)))
    sharded: Tensor = _module().DTensor.from_local(
        part, *layout, run_check=False, shape=torch.Size(shape), stride=stride
    )
    return sharded


def first_element(tensor: Tensor) -> int:
    """Where a shard by rows begins in the whole tensor, in elements; 0 for other tensors."""
    if (layout := layout_of(tensor)) is None or tensor.numel() == 0:
        return 0
    if not any(p.is_shard() for p in layout[1]):
        return 0
    from torch.distributed.tensor._utils import compute_local_shape_and_global_offset

    _, offsets = compute_local_shape_and_global_offset(tensor.shape, *layout)
    strides = (math.prod(tensor.shape[i + 1 :]) for i in range(tensor.dim()))
    return sum(offset * stride for offset, stride in zip(offsets, strides, strict=True))


def gather_anew(params: Iterable[Tensor]) -> None:
    """Has FSDP2 gather these parameters from their shards before they are next used.

    After a forward pass the root module keeps its whole parameters (others do with
    ``reshard_after_forward=False``) and computes with them again, whatever has been written to the
    shards since. No parameter leads to its module: all that FSDP2 knows are looked through.
    """
    wanted = {id(param) for param in params if _sharded(param) is not None}
    states = sys.modules.get("torch.distributed._composable_state")
    fsdp: Any = sys.modules.get("torch.distributed.fsdp")
    if not wanted or states is None or not hasattr(fsdp, "FSDPModule"):
        return
    for module in list(states._module_state_mapping):
        if isinstance(module, fsdp.FSDPModule) and not wanted.isdisjoint(_own_shards(module)):
            module.reshard()


def is_flattened(param: Tensor) -> bool:
    """Whether it is of FSDP1 (``FullyShardedDataParallel``): a plain tensor, part of a flat one."""
    return bool(getattr(param, "_fsdp_flattened", False))


def _own_shards(module: Any) -> Iterable[int]:
    """The ids of the parameters that FSDP2 has sharded for a module."""
    state = module._get_fsdp_state()
    groups = getattr(state, "_fsdp_param_groups", None)
    if groups is None:  # an older torch, which has one at most
        groups = [state._fsdp_param_group] if state._fsdp_param_group is not None else []
    return (id(param.sharded_param) for group in groups for param in group.fsdp_params)


def holds_values(layout: Any) -> bool:
    """Whether shards are made of the tensor's own elements, not of summands."""
    return layout is None or not any(placement.is_partial() for placement in layout[1])


def whole(tensor: Tensor) -> Tensor:
    """Itself; of a sharded tensor, the value that all processes' shards make together."""
    sharded = _sharded(tensor)
    full: Tensor = tensor if sharded is None else sharded.full_tensor()
    return full


def summed(sums: Tensor, layout: Any) -> Tensor:
    """From sums over shards, those over whole tensors. Every process has to call it."""
    return sums if layout is None else _reduced(sums, layout, "sum")


def largest(maxima: Tensor, layout: Any) -> Tensor:
    """From largest magnitudes, NaN where there is one. Every process has to call it."""
    if layout is None:
        return maxima
    total = _reduced(maxima, layout, "sum")  # NaN if any is, which a reduction's maximum may lose
    return total.where(total.isnan(), _reduced(maxima, layout, "max"))


def smallest(minima: Tensor, layout: Any) -> Tensor:
    """From smallest magnitudes of shards, infinity where there is no element, NaN where one is."""
    if layout is None:
        return minima
    total = _reduced(minima, layout, "sum")  # as above
    return total.where(total.isnan(), _reduced(minima, layout, "min"))


def _reduced(tensor: Tensor, layout: Any, operation: str) -> Tensor:
    mesh, placements = layout
    module = _module()
    shares = [
        module.Replicate() if placement.is_replicate() else module.Partial(operation)
        for placement in placements
    ]
    return whole(module.DTensor.from_local(tensor, mesh, shares, run_check=False))
