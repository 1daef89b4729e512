"""The rule of SGD with or without momentum: kernels/rules/sgd.h in plain PyTorch."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor

from warpstep.rules.rule import LR, WEIGHT_DECAY, Constants, Number, Numbers, Rule


class SgdConstants(NamedTuple):
    """What the update needs of the hyper-parameters and the step counter."""

    lr: Any
    kept: Any
    weight: Any
    momentum: Any
    nesterov: Any


@dataclass(frozen=True)
class SgdRule(Rule):
    """::

        b <- momentum * b + (1 - dampening) * g, or g at the first step
        u <- lr * b, or lr * (g + momentum * b) with nesterov, or lr * g without momentum

    Source: Sutskever et al., On the importance of initialization and momentum in deep learning
    (https://proceedings.mlr.press/v28/sutskever13.html), as torch.optim.SGD has it.
    """

    def constants(self, numbers: Numbers, t: Tensor, compute: torch.dtype) -> Constants:
        """As `Rule.constants`."""
        lr, _, momentum, dampening, nesterov = numbers
        is_first = t == 1
        return SgdConstants(
            lr,
            torch.where(is_first, 0, momentum),
            torch.where(is_first, 1, 1 - dampening),
            momentum,
            nesterov,
        )

    def update(self, c: SgdConstants, grad: Tensor, moments: dict[str, Tensor]) -> Tensor:
        """As `Rule.update`."""
        if "momentum_buffer" in moments:
            buffer = c.kept * moments["momentum_buffer"] + c.weight * grad
            moments["momentum_buffer"] = buffer
            ahead = grad + c.momentum * buffer
            if isinstance(c.nesterov, Tensor):
                grad = torch.where(c.nesterov != 0, ahead, buffer)
            else:
                grad = ahead if c.nesterov else buffer
        update: Tensor = c.lr * grad
        return update


SGD: Rule = SgdRule(
    name="sgd",
    title="SGD's",
    numbers=(
        LR,
        WEIGHT_DECAY,
        Number("momentum", "momentum value"),
        Number("dampening", "dampening value"),
        Number("nesterov", "nesterov flag", is_flag=True),
    ),
    flags=("maximize", "differentiable", "fused"),
    moments=("momentum_buffer",),
    optional={"momentum_buffer": "momentum"},
    counted_for=("momentum", "dampening"),
    is_whole=False,
    takes_sparse=True,
)
