"""The rule in plain PyTorch: what the tests compare the kernels with, and the last fallback.

It takes any device, layout and dtype that torch's own operations take. The formula is the one of
kernels/rule.h, with the same variable names; only its fused multiply-adds are two operations here.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from warpstep.hypers import decay_form
from warpstep.recipes import real_dtype
from warpstep.tail import Tail

Number = float | Tensor


@dataclass(frozen=True)
class Constants:
    """What the rule needs of the hyper-parameters and the step counter (kernels/rule.h)."""

    decay: Number
    step_size: Number
    eps_hat: Number
    root_scale: Number
    weight1: Number
    weight2: Number
    beta2: Number


def constants_of(
    group: dict[str, Any], step: Tensor, device: torch.device, compute: torch.dtype
) -> Constants:
    """From float64, for step number ``step``; with ``capturable`` tensors, read by no host."""

    # Tensors also for numbers: Python's raise where IEEE's become infinite or NaN.
    def value(hyper: Any) -> Tensor:
        if isinstance(hyper, Tensor) and group["capturable"]:
            return hyper.to(device, torch.float64, non_blocking=True).squeeze()
        return torch.scalar_tensor(float(hyper), dtype=torch.float64, device="cpu")

    t, lr = value(step), value(group["lr"])
    beta1, beta2 = (value(beta) for beta in group["betas"])
    eps = value(group["eps"]).to(compute).item()  # as torch adds it
    weight_decay = float(group["weight_decay"])
    multiple = lr / group["base_lr"] if decay_form(group) == "independent" else lr
    bias_correction1 = 1 - beta1**t
    bias_correction2_sqrt = (1 - beta2**t).sqrt()
    eps_hat = eps * bias_correction2_sqrt
    scales_root = (eps_hat.abs() < torch.finfo(compute).tiny) & (eps != 0)
    scale = 2.0**48
    constants = (
        multiple * weight_decay,
        lr / bias_correction1 * torch.where(scales_root, scale, bias_correction2_sqrt),
        torch.where(scales_root, eps * scale, eps_hat),
        torch.where(scales_root, scale / bias_correction2_sqrt, 1),
        1 - beta1,
        1 - beta2,
        beta2,
    )
    return Constants(*(c if group["capturable"] else c.item() for c in constants))


def real_view(tensor: Tensor) -> Tensor:
    """The numbers that a tensor is made of, complex ones as pairs. A copy where it is lazy."""
    tensor = tensor.resolve_conj().resolve_neg()  # themselves, but for lazily conjugated gradients
    return torch.view_as_real(tensor) if tensor.is_complex() else tensor


def _finite_or_zero(x: Tensor) -> Tensor:
    return torch.where(x.isfinite(), x, 0)


@dataclass
class Computed:
    """A step of one parameter, worked out and not yet stored."""

    param: Tensor
    stores: list[tuple[Tensor, Tensor]]  # a tensor, and its new value
    sums: Tensor | None = None  # float64[4]: Tail::statistics of kernels/tables.h


@torch.no_grad()
def computed(
    param: Tensor,
    grad: Tensor,
    state: dict[str, Tensor],
    group: dict[str, Any],
    tail: Tail | None = None,
    taken: bool = True,
) -> Computed:
    """One step of AdamW, or of Adam with coupled decay, on one parameter: what to store, and where.

    ``state`` holds ``step``, ``exp_avg``, ``exp_avg_sq`` and, under amsgrad, ``max_exp_avg_sq``,
    and ``ema`` where there is an average; ``group`` torch's hyper-parameters. With ``capturable``
    no value is read on the host. ::

        g <- grad / grad_scale, clipped;  -g to maximize;  g + weight_decay * p if coupled
        m <- m + (1 - beta1) * (g - m);  v <- (v - (1 - beta2) * v) + (1 - beta2) * g * g
        u <- step_size * m / (sqrt(v) + eps_hat)
        p <- p - (decay * d + u)           with decay and d by the form of decay (kernels/rule.h)
        ema <- ema + (1 - ema_decay) * (p - ema)

    Arithmetic is in float32 (float64 for float64 parameters). Nothing is changed: the result is
    pairs of a tensor and its new value, for `store`, which rounds each value once. Of a step that
    is not ``taken`` there are at most the sums and the zeroed gradient.

    Source: Loshchilov and Hutter, Decoupled Weight Decay Regularization, Algorithm 2
    (https://arxiv.org/abs/1711.05101); amsgrad: Reddi et al. (https://arxiv.org/abs/1904.09237);
    cautious decay: Chen et al. (https://arxiv.org/abs/2510.12402).
    """
    tail = tail or Tail()

    new_step = state["step"] + 1
    compute = torch.float64 if real_dtype(param.dtype) == torch.float64 else torch.float32
    c = constants_of(group, new_step, param.device, compute)
    p, g, m, v = (
        real_view(t).to(compute) for t in (param, grad, state["exp_avg"], state["exp_avg_sq"])
    )
    raw, unscale = g, None
    if tail.grad_scale is not None:
        unscale = 1 / tail.grad_scale.to(g.device, torch.float64)
        g = g * unscale.to(compute)
    if tail.total_norm is not None:
        ratio = tail.max_norm / (tail.total_norm.to(g.device, torch.float64) + 1e-6)
        g = g * ratio.clamp(max=1).to(compute)
    if group["maximize"]:
        g = -g
    form, weight_decay = decay_form(group), float(group["weight_decay"])
    if weight_decay != 0 and form == "coupled":
        g = g + weight_decay * p

    weight1 = c.weight1.to(compute) if isinstance(c.weight1, Tensor) else c.weight1
    m = torch.lerp(m, g, weight1)
    v = torch.where(v.isfinite(), v - c.weight2 * v, c.beta2 * v) + c.weight2 * g * g
    new = {"exp_avg": m, "exp_avg_sq": v}
    peak = v
    if group["amsgrad"]:
        peak = torch.maximum(real_view(state["max_exp_avg_sq"]).to(compute), v)
        new["max_exp_avg_sq"] = peak

    update = c.step_size * (m / (peak.sqrt() * c.root_scale + c.eps_hat))
    if weight_decay != 0 and form != "coupled":
        d = p.sign() if form == "l1" else _finite_or_zero(p)
        if form == "cautious":
            d = torch.where(p.sign() * update.sign() < 0, 0, d)
        update = c.decay * d + update
    # What is stored of it, rounded: the average and the statistics see that.
    after = (p - update).to(real_dtype(param.dtype)) if taken else real_view(param)
    if group.get("ema_decay") is not None:
        average = real_view(state["ema"]).to(compute)
        kept = (new_step != 1).double() * group["ema_decay"]  # the first step begins the average
        weight = (1 - kept).to(average.device, compute)
        new["ema"] = torch.lerp(average, after.to(compute), weight)

    stores = [(state[key], new[key]) for key in new]
    stores = [(state["step"], new_step), (param, after), *stores] if taken else []
    if tail.zero_grads:
        stores.append((grad, torch.zeros_like(real_view(grad))))
    if not tail.statistics:
        return Computed(param, stores)

    def sum_of_squares(x: Tensor) -> Tensor:
        return x.double().square().sum()

    sums = [
        sum_of_squares(raw) * (1 if unscale is None else unscale**2),
        sum_of_squares(after),
        sum_of_squares(after.double() - p),
        (~raw.isfinite()).sum(),
    ]
    return Computed(param, stores, torch.stack([s.double() for s in sums]))


@torch.no_grad()
def store(values: list[tuple[Tensor, Tensor]]) -> None:
    """Writes what `computed` returned, rounding each value to its tensor's dtype."""
    for tensor, value in values:
        tensor.copy_(torch.view_as_complex(value) if tensor.is_complex() else value)
