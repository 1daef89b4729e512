"""The rule in plain PyTorch: what the tests compare the kernels with, and the last fallback.

It takes any device, layout and dtype that torch's own operations take. The formula is the one of
kernels/rule.h, with the same variable names; only its fused multiply-adds are two operations here.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from warpstep.recipes import real_dtype

Number = float | Tensor


def _real(tensor: Tensor) -> Tensor:
    tensor = tensor.resolve_conj().resolve_neg()  # themselves, but for lazily conjugated gradients
    return torch.view_as_real(tensor) if tensor.is_complex() else tensor


def _finite_or_zero(x: Tensor) -> Tensor:
    return torch.where(x.isfinite(), x, 0)


@torch.no_grad()
def computed(
    param: Tensor,
    grad: Tensor,
    state: dict[str, Tensor],
    group: dict[str, Any],
    grad_scale: Tensor | None = None,
) -> list[tuple[Tensor, Tensor]]:
    """One step of AdamW, or of Adam with coupled decay, on one parameter: what to store, and where.

    ``state`` holds ``step``, ``exp_avg``, ``exp_avg_sq`` and, under amsgrad, ``max_exp_avg_sq``;
    ``group`` torch's hyper-parameters. With ``capturable`` no value is read on the host. ::

        g <- grad / grad_scale;  -g to maximize;  g + weight_decay * p if coupled
        m <- m + (1 - beta1) * (g - m);  v <- (v - (1 - beta2) * v) + (1 - beta2) * g * g
        p <- p - (lr * weight_decay * p  [decoupled]  + step_size * m / (sqrt(v) + eps_hat))

    Arithmetic is in float32 (float64 for float64 parameters). Nothing is changed: the result is
    pairs of a tensor and its new value, for `store`, which rounds each value once.

    Source: Loshchilov and Hutter, Decoupled Weight Decay Regularization, Algorithm 2
    (https://arxiv.org/abs/1711.05101); amsgrad: Reddi et al. (https://arxiv.org/abs/1904.09237).
    """

    def value(hyper: Any) -> Number:
        if not isinstance(hyper, Tensor):
            return float(hyper)
        if group["capturable"]:
            return hyper.to(param.device, torch.float64, non_blocking=True).squeeze()
        return float(hyper)

    new_step = state["step"] + 1
    step = value(new_step)
    lr, beta1, beta2 = value(group["lr"]), value(group["betas"][0]), value(group["betas"][1])
    bias_correction1 = 1 - beta1**step
    bias_correction2_sqrt = (1 - beta2**step) ** 0.5
    step_size = lr / bias_correction1 * bias_correction2_sqrt
    eps_hat = group["eps"] * bias_correction2_sqrt
    decoupled = group["decoupled_weight_decay"]

    compute = torch.float64 if real_dtype(param.dtype) == torch.float64 else torch.float32
    p, g, m, v = (
        _real(t).to(compute) for t in (param, grad, state["exp_avg"], state["exp_avg_sq"])
    )
    if grad_scale is not None:
        g = g * (1 / grad_scale.to(g.device, torch.float64)).to(compute)
    if group["maximize"]:
        g = -g
    if group["weight_decay"] != 0 and not decoupled:
        g = g + group["weight_decay"] * p

    weight1, weight2 = 1 - beta1, 1 - beta2
    m = torch.lerp(m, g, weight1.to(compute) if isinstance(weight1, Tensor) else weight1)
    v = (v - weight2 * _finite_or_zero(v)) + weight2 * g * g
    new = {"exp_avg": m, "exp_avg_sq": v}
    peak = v
    if group["amsgrad"]:
        peak = torch.maximum(_real(state["max_exp_avg_sq"]).to(compute), v)
        new["max_exp_avg_sq"] = peak

    update = step_size * (m / (peak.sqrt() + eps_hat))
    if decoupled:
        update = lr * group["weight_decay"] * _finite_or_zero(p) + update
    stores = [(state[key], new[key]) for key in new]
    return [(state["step"], new_step), (param, p - update), *stores]


@torch.no_grad()
def store(values: list[tuple[Tensor, Tensor]]) -> None:
    """Writes what `computed` returned, rounding each value to its tensor's dtype."""
    for tensor, value in values:
        tensor.copy_(torch.view_as_complex(value) if tensor.is_complex() else value)
