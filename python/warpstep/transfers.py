"""Tensors brought from one device to another."""

from __future__ import annotations

import torch
from torch import Tensor


def brought(tensor: Tensor, device: torch.device, dtype: torch.dtype | None = None) -> Tensor:
    """A tensor on ``device``, in ``dtype`` if one is given: itself where it is so already.

    The host does not wait for a GPU to have it, since what reads it there comes later on the same
    stream. It waits for what comes to the CPU: ``non_blocking`` would give it memory that the
    numbers have yet to arrive in.
    """
    return tensor.to(device, dtype, non_blocking=device.type != "cpu")
