"""The rule of AdamW and Adam: kernels/rules/adamw.h in plain PyTorch, with the same names."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor

from warpstep.rules.rule import LR, WEIGHT_DECAY, Constants, Number, Numbers, Rule


class AdamWConstants(NamedTuple):
    """What the update needs of the hyper-parameters and the step counter."""

    step_size: Any
    eps_hat: Any
    root_scale: Any
    weight1: Any
    weight2: Any
    beta2: Any


@dataclass(frozen=True)
class AdamWRule(Rule):
    """::

        m <- m + (1 - beta1) * (g - m);  v <- (v - (1 - beta2) * v) + (1 - beta2) * g * g
        u <- step_size * m / (sqrt(v) * root_scale + eps_hat)

    where root_scale is 1, unless eps_hat would be subnormal (kernels/rules/adamw.h).

    Source: Kingma and Ba, Adam (https://arxiv.org/abs/1412.6980); amsgrad: Reddi et al.
    (https://arxiv.org/abs/1904.09237).
    """

    def constants(self, numbers: Numbers, t: Tensor, compute: torch.dtype) -> Constants:
        """As `Rule.constants`."""
        lr, _, beta1, beta2, given_eps = numbers
        eps = given_eps
        if compute == torch.float32:  # as torch adds it
            eps = given_eps.to(torch.float32).double()
        bias_correction1 = 1 - beta1**t
        bias_correction2_sqrt = (1 - beta2**t).sqrt()
        eps_hat = eps * bias_correction2_sqrt
        scales_root = (eps_hat.abs() < torch.finfo(compute).tiny) & (eps != 0)
        scale = 2.0**48
        return AdamWConstants(
            lr / bias_correction1 * torch.where(scales_root, scale, bias_correction2_sqrt),
            torch.where(scales_root, eps * scale, eps_hat),
            torch.where(scales_root, scale / bias_correction2_sqrt, 1),
            1 - beta1,
            1 - beta2,
            beta2,
        )

    def update(self, c: AdamWConstants, grad: Tensor, moments: dict[str, Tensor]) -> Tensor:
        """As `Rule.update`."""
        weight1 = c.weight1.to(grad.dtype) if isinstance(c.weight1, Tensor) else c.weight1
        m = moments["exp_avg"] = torch.lerp(moments["exp_avg"], grad, weight1)
        v = moments["exp_avg_sq"]
        v = torch.where(v.isfinite(), v - c.weight2 * v, c.beta2 * v) + c.weight2 * grad * grad
        moments["exp_avg_sq"] = peak = v
        if "max_exp_avg_sq" in moments:
            peak = moments["max_exp_avg_sq"] = torch.maximum(moments["max_exp_avg_sq"], v)
        update: Tensor = c.step_size * (m / (peak.sqrt() * c.root_scale + c.eps_hat))
        return update


ADAMW: Rule = AdamWRule(
    name="adamw",
    title="AdamW's or Adam's",
    numbers=(
        LR,
        WEIGHT_DECAY,
        Number("betas", "beta parameter at index 0", 0),
        Number("betas", "beta parameter at index 1", 1),
        Number("eps", "epsilon value"),
    ),
    flags=(
        "amsgrad",
        "maximize",
        "decoupled_weight_decay",
        "capturable",
        "differentiable",
        "fused",
    ),
    moments=("exp_avg", "exp_avg_sq", "max_exp_avg_sq"),
    optional={"max_exp_avg_sq": "amsgrad"},
    squares=frozenset({"exp_avg_sq", "max_exp_avg_sq"}),
)
