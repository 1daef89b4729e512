"""The rule in plain PyTorch: what the tests compare the kernels with, and the last fallback.

It takes any device, layout and dtype that torch's own operations take. The formula is the one of
kernels/rule.h, with the same variable names; only its fused multiply-adds are two operations here.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

Number = float | Tensor


def _real(tensor: Tensor) -> Tensor:
    tensor = tensor.resolve_conj().resolve_neg()  # themselves, but for lazily conjugated gradients
    return torch.view_as_real(tensor) if tensor.is_complex() else tensor


def _finite_or_zero(x: Tensor) -> Tensor:
    return torch.where(x.isfinite(), x, 0)


@torch.no_grad()
def adamw_(
    param: Tensor,
    grad: Tensor,
    state: dict[str, Tensor],
    group: dict[str, Any],
    grad_scale: Tensor | None = None,
) -> None:
    """One step of AdamW, or of Adam with coupled decay, on one parameter, in place.

    ``state`` holds ``step``, ``exp_avg``, ``exp_avg_sq`` and, under amsgrad, ``max_exp_avg_sq``;
    ``group`` torch's hyper-parameters. With ``capturable`` no value is read on the host. ::

        g <- grad / grad_scale;  -g to maximize;  g + weight_decay * p if coupled
        m <- m + (1 - beta1) * (g - m);  v <- (v - (1 - beta2) * v) + (1 - beta2) * g * g
        p <- p - (lr * weight_decay * p  [decoupled]  + step_size * m / (sqrt(v) + eps_hat))

    Arithmetic is in float32 (float64 for float64 parameters), each stored value rounded once.

    Source: Loshchilov and Hutter, Decoupled Weight Decay Regularization, Algorithm 2
    (https://arxiv.org/abs/1711.05101); amsgrad: Reddi et al. (https://arxiv.org/abs/1904.09237).
    """
    state["step"] += 1

    def value(hyper: Any) -> Number:
        if not isinstance(hyper, Tensor):
            return float(hyper)
        if group["capturable"]:
            return hyper.to(param.device, torch.float64, non_blocking=True).squeeze()
        return float(hyper)

    step = value(state["step"])
    lr, beta1, beta2 = value(group["lr"]), value(group["betas"][0]), value(group["betas"][1])
    bias_correction1 = 1 - beta1**step
    bias_correction2_sqrt = (1 - beta2**step) ** 0.5
    step_size = lr / bias_correction1 * bias_correction2_sqrt
    eps_hat = group["eps"] * bias_correction2_sqrt
    decoupled = group["decoupled_weight_decay"]

    p, m, v = _real(param), _real(state["exp_avg"]), _real(state["exp_avg_sq"])
    compute = torch.float64 if p.dtype == torch.float64 else torch.float32
    p_, g_ = p.to(compute), _real(grad).to(compute)
    m_, v_ = m.to(compute), v.to(compute)

    if grad_scale is not None:
        g_ = g_ * (1 / grad_scale.to(g_.device, torch.float64)).to(compute)
    if group["maximize"]:
        g_ = -g_
    if group["weight_decay"] != 0 and not decoupled:
        g_ = g_ + group["weight_decay"] * p_

    weight1, weight2 = 1 - beta1, 1 - beta2
    m_ = torch.lerp(m_, g_, weight1.to(compute) if isinstance(weight1, Tensor) else weight1)
    v_ = (v_ - weight2 * _finite_or_zero(v_)) + weight2 * g_ * g_
    peak = v_
    if group["amsgrad"]:
        max_v = _real(state["max_exp_avg_sq"])
        peak = torch.maximum(max_v.to(compute), v_)
        max_v.copy_(peak)

    update = step_size * (m_ / (peak.sqrt() + eps_hat))
    if decoupled:
        update = lr * group["weight_decay"] * _finite_or_zero(p_) + update
    p.copy_(p_ - update)
    m.copy_(m_)
    v.copy_(v_)
