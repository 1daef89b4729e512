"""Statistics of a step: norms and counts for each parameter, from the sums that kernels leave."""

from __future__ import annotations

from dataclasses import dataclass, field

import torch
from torch import Tensor

from warpstep.transfers import brought


@dataclass(frozen=True)
class Statistics:
    """What the last step saw, one number a parameter, on the first parameter's device.

    Attributes:
        params: the parameters, in the order of the plan's buckets. The other fields have theirs.
        grad_norm: 2-norm of the unscaled gradient, before clipping. float32.
        param_norm: 2-norm of the parameter after the step. float32.
        update_norm: 2-norm of what the step changed the parameter by, decay included. float32.
        nonfinite: how many values of the gradient were NaN or infinite; -1 where there was no
            gradient. int64. A step that was skipped for found_inf is counted as well.
        names: the parameters' names, if they were given to the optimizer with their parameters
            (``model.named_parameters()``), else ``parameter 3 of group 0``.
    """

    params: list[Tensor]
    grad_norm: Tensor
    param_norm: Tensor
    update_norm: Tensor
    nonfinite: Tensor
    names: list[str] = field(default_factory=list)


def statistics_of(params: list[Tensor | None], tables: list[Tensor]) -> Statistics:
    """From tables float64[tensors, 4] of sums, as kernels leave them (kernels/layout.h).

    Rows of parameters that are no more (None) are left out.
    """
    device = next((param.device for param in params if param is not None), tables[0].device)
    sums = torch.cat([brought(table, device) for table in tables])
    alive = [param for param in params if param is not None]
    if len(alive) < len(params):
        sums = sums[[row for row, param in enumerate(params) if param is not None]]
    *squares, nonfinite = sums.unbind(1)
    grad, param, update = (sum_of_squares.sqrt().float() for sum_of_squares in squares)
    return Statistics(alive, grad, param, update, nonfinite.clamp(min=-1).to(torch.int64))
