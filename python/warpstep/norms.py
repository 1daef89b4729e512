"""Norms of all gradients together, from norms and sums of each."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from warpstep.shards import whole
from warpstep.stored import real_view
from warpstep.transfers import brought

_summed_in = {torch.float16: torch.float32, torch.bfloat16: torch.float32}


def combined_norm(shares: list[Tensor], norm_type: float) -> Tensor:
    """One float64 norm from shares of it, one-element tensors on any devices.

    A share is the sum of squares for the 2-norm, the norm itself for the inf-norm.
    """
    device = shares[0].device
    together = torch.stack([brought(s, device, torch.float64) for s in shares])
    if math.isinf(norm_type):
        return together.amax()  # NaN if any is
    return together.sum().sqrt()


def norm_of_norms(grads: list[Tensor], norm_type: float) -> Tensor:
    """One float64 norm as torch.nn.utils.get_total_norm takes it, of gradients in any format.

    16-bit ones are summed in float32: scaled by a GradScaler, they would soon be infinite.
    """
    each = [torch.linalg.vector_norm(g, norm_type, dtype=_summed_in.get(g.dtype)) for g in grads]
    norms = [brought(norm, grads[0].device) for norm in each]
    total: Tensor = torch.linalg.vector_norm(torch.stack(norms), norm_type)
    return total.double()


def share_of_norm(grad: Tensor, norm_type: float) -> Tensor:
    """One gradient's share of `combined_norm`."""
    is_largest = math.isinf(norm_type)
    numbers = grad.detach()
    if numbers.is_complex():
        numbers = numbers.abs() if is_largest else real_view(numbers)
    norm = whole(torch.linalg.vector_norm(numbers, norm_type, dtype=torch.float64))
    return norm if is_largest else norm.square()
