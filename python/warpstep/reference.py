"""A step in plain PyTorch: what the tests compare the kernels with, and the last fallback.

It takes any device, layout and dtype that torch's own operations take. The formulas are those of
kernels/tail.h and kernels/rules/, with the same variable names; only their fused multiply-adds are
two operations here.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from contextlib import nullcontext
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.autograd.graph import increment_version

from warpstep.codecs import joined, split
from warpstep.hypers import decay_form
from warpstep.recipes import RESIDUAL, real_dtype
from warpstep.rules import Rule
from warpstep.shards import holds_values, layout_of, own_part, smallest, whole
from warpstep.state import is_plain
from warpstep.stored import Encoder, Stored, moments_in, numbers_of, real_view
from warpstep.tail import Tail
from warpstep.transfers import brought

Number = float | Tensor
_TRIES = 10  # to write a tensor, in a step of which some has been written


def constants_of(
    group: dict[str, Any],
    rule: Rule,
    step: Tensor | None,
    device: torch.device,
    compute: torch.dtype,
    on_host: bool = True,
) -> tuple[Any, Number]:
    """The rule's constants and what decays, for step number ``step``: worked out in float64.

    They are tensors that no host reads with ``capturable``, without ``on_host``, and where a
    hyper-parameter has no value to be read (on the meta device, or fake); else numbers.
    """
    given = [number.of(group) for number in rule.numbers]
    tensors = [g for g in (step, *given) if isinstance(g, Tensor)]
    stays = bool(group.get("capturable")) or not on_host
    stays = stays or not all(is_plain(own_part(tensor)) for tensor in tensors)

    # Tensors also for numbers: Python's raise where IEEE's become infinite or NaN.
    def value(hyper: Any) -> Tensor:
        if isinstance(hyper, Tensor) and stays:
            return brought(hyper, device, torch.float64).squeeze()
        return torch.scalar_tensor(float(hyper), dtype=torch.float64, device="cpu")

    numbers = tuple(value(hyper) for hyper in given)
    t = value(2.0 if step is None else step)  # as kUncounted in kernels/tail.h has it
    constants = rule.constants(numbers, t, compute)
    lr, weight_decay = numbers[:2]
    form = decay_form(group)
    decay = lr / group["base_lr"] if form == "independent" else lr
    if form != "min":  # of which `computed` knows the other factor
        decay = decay * (weight_decay / 2 if form == "l1l2" else weight_decay)
    if stays:
        return constants, decay
    return type(constants)(*(c.item() for c in constants)), decay.item()


def _finite_or_zero(x: Tensor) -> Tensor:
    return x.masked_fill(~x.isfinite(), 0)


def least_magnitude(param: Tensor, layout: Any = None) -> Tensor:
    """The smallest magnitude of the numbers that a tensor is made of, NaN if any is; inf of none.

    Of a sharded tensor, or of one's own part with its ``layout``, that of the whole.
    """
    if layout is None and holds_values(layout_of(param)):
        param, layout = own_part(param), layout_of(param)
    numbers = real_view(whole(param).detach())
    compute = torch.promote_types(numbers.dtype, torch.float32)
    if numbers.numel() == 0:
        return smallest(numbers.new_full((), torch.inf, dtype=compute), layout)
    return smallest(numbers.abs().amin().to(compute), layout)


@dataclass
class Computed:
    """A step of one parameter, worked out and not yet stored."""

    param: Tensor
    stores: list[tuple[Tensor, Tensor | None]]  # a tensor, and its new value; None for zeros
    sums: Tensor | None = None  # float64[4]: Tail::statistics of kernels/layout.h


@torch.no_grad()
def computed(
    param: Tensor,
    grad: Tensor,
    state: dict[str, Tensor],
    group: dict[str, Any],
    rule: Rule,
    tail: Tail | None = None,
    taken: bool | Tensor = True,
    on_host: bool = True,
    layout: Any = None,
    counts_steps: bool | None = None,
    stored: Stored | None = None,
) -> Computed:
    """One step of one parameter: what to store, and where.

    ``state`` holds the rule's moments, as numbers or codes, ``step`` where steps are counted, and
    ``ema`` where there is an average; ``group`` torch's hyper-parameters. With ``capturable``, or
    without ``on_host``, no value is read on the host, nor is that of a tensor that has none (on the
    meta device, or fake).
    ``layout``: of the sharded parameter that ``param`` is this process's part of. ``counts_steps``:
    whether the state has a counter, where that is not the group's to say.
    ::

        g <- grad / grad_scale * clip_coef;  -g to maximize;  g + weight_decay * p if coupled
        u <- the rule's update
        p <- p - (decay * d + u)        decay and d by the form of decay (kernels/rules/decay.h)
        ema <- ema + (1 - ema_decay) * (p - ema)

    Arithmetic is in float32 (float64 for float64 parameters). Nothing is changed: the result is
    pairs of a tensor and its new value, for `store`, which rounds each value once. Of a step that
    is not ``taken`` there are at most the sums and the zeroed or unscaled gradient; if ``taken`` is
    a tensor, what is stored is chosen by it.

    Source: Loshchilov and Hutter, Decoupled Weight Decay Regularization, Algorithms 1 and 2
    (https://arxiv.org/abs/1711.05101); cautious decay: Chen et al.
    (https://arxiv.org/abs/2510.12402).
    """
    tail, stored = tail or Tail(), stored or Stored()

    has_master, precision = group.get("master") is not None, stored.precision
    counts_steps = precision.counts_steps(rule, group) if counts_steps is None else counts_steps
    new_step = state["step"] + 1 if counts_steps else None
    compute = torch.float64 if real_dtype(param.dtype) == torch.float64 else torch.float32
    c, decay = constants_of(group, rule, new_step, param.device, compute, on_host)
    raw = real_view(grad.detach()).to(compute)
    before = joined(param.detach(), state[RESIDUAL]) if has_master else real_view(param.detach())
    p = before.to(compute)
    held = moments_in(state, rule.moments_of(group))
    new = {key: numbers_of(state, key, squares=key in rule.squares).to(compute) for key in held}
    g = unscaled(raw, tail)
    if group["maximize"]:
        g = -g
    form, weight_decay = decay_form(group), float(group["weight_decay"])
    if weight_decay != 0 and form == "coupled":
        g = g + weight_decay * p
    update = rule.update(c, g, new)
    if weight_decay != 0 and form != "coupled":
        d = p.sign() if form in ("l1", "min") else _finite_or_zero(p)
        if form == "min":
            decay = decay * least_magnitude(param, layout)
        if form == "l1l2":
            d = d + p.sign()
        if form == "cautious":
            d = d.masked_fill(p.sign() * update.sign() < 0, 0)
        update = decay * d + update

    def chosen(new: Tensor, old: Tensor) -> Tensor:
        if isinstance(taken, Tensor):
            return torch.where(taken, new.to(old.dtype), old)
        return new if taken else old

    # What is stored of it, rounded: the average and the statistics see that.
    encoder = Encoder(stored, new_step)
    of_param = precision.format_of_param(param, has_master)
    if has_master:
        high, low = split((p - update).to(compute))
        written = {"param": high, RESIDUAL: low}
        after = joined(high, low)
    else:
        after = encoder.rounded(param, p - update, of_param, operand=0)
        written = {"param": after}
    after = chosen(after, before)
    for index, (key, moment) in enumerate(held.items()):
        one = precision.format_of_moment(rule, key, moment.dtype)
        written |= encoder.stored_moment(state, key, new[key], one, operand=1 + index)
    if group.get("ema_decay") is not None and new_step is not None:
        average = real_view(state["ema"]).to(compute)
        kept = (new_step != 1).double() * group["ema_decay"]  # the first step begins the average
        weight = (1 - kept).to(average.device, compute)
        written["ema"] = torch.lerp(average, after.to(compute), weight)
    if stored.copy is not None:
        written["copy"] = after

    stores: list[tuple[Tensor, Tensor | None]] = []
    if taken is not False:
        of: dict[str, Any] = {**state, "param": param, "copy": stored.copy}
        if new_step is not None:
            stores = [(state["step"], chosen(new_step, state["step"]))]
        stores += [(of[key], chosen(value, real_view(of[key]))) for key, value in written.items()]
    if tail.zero_grads:
        stores.append((grad, None))
    elif tail.unscales:
        part = distinct(grad.detach())
        stores.append((part, unscaled(real_view(part).to(compute), tail)))
    if not tail.statistics:
        return Computed(param, stores)

    scale = tail.grad_scale

    def sum_of_squares(x: Tensor) -> Tensor:
        return x.double().square().sum()

    sums = [
        sum_of_squares(raw) * (1 if scale is None else (1 / scale.to(raw.device).double()) ** 2),
        sum_of_squares(after),
        sum_of_squares(chosen(after.double() - p, torch.zeros_like(after, dtype=torch.float64))),
        (~raw.isfinite()).sum(),
    ]
    return Computed(param, stores, torch.stack([s.double() for s in sums]))


def unscaled(grad: Tensor, tail: Tail) -> Tensor:
    """A gradient's numbers without GradScaler's scale, and clipped."""
    if tail.grad_scale is not None:
        grad = grad * (1 / tail.grad_scale.to(grad.device, torch.float64)).to(grad.dtype)
    if tail.clip_coef is not None:
        grad = grad * tail.clip_coef.to(grad.device, grad.dtype)
    return grad


def distinct(tensor: Tensor) -> Tensor:
    """A view of a tensor's elements, one of those that share their memory by ``expand``."""
    for dim, (stride, size) in enumerate(zip(tensor.stride(), tensor.shape, strict=True)):
        if stride == 0 and size > 1:
            tensor = tensor.narrow(dim, 0, 1)
    return tensor


@torch.no_grad()
def leave(grads: Iterable[Tensor | None], tail: Tail) -> None:
    """Leaves gradients, each once, as ``tail`` says: zero, or unscaled and clipped."""
    for grad in {id(grad): grad for grad in grads if grad is not None}.values():
        part = own_part(grad.detach())
        if tail.zero_grads:
            write(part, None)
        else:
            part = distinct(part)
            values = real_view(part)
            values = values.to(torch.promote_types(values.dtype, torch.float32))
            write(part, unscaled(values, tail))
        if own_part(grad) is not grad:
            increment_version(grad)  # a sharded tensor has a counter of its own


@torch.no_grad()
def store(steps: list[Computed], launch: Callable[[], None] | None = None) -> None:
    """Writes what `computed` returned, rounding each value to its tensor's dtype: all or nothing.

    Tensors that may refuse to be written come first, and get their values back where one does, or
    where ``launch`` raises, which is called next. The others refuse nothing: if memory is short
    for a moment, they are written again.
    """
    values = [pair for one in steps for pair in one.stores]
    reluctant = [pair for pair in values if may_refuse(pair[0])]
    written: list[tuple[Tensor, Tensor]] = []
    try:
        for tensor, value in reluctant:
            before = tensor.detach().clone()
            write(tensor, value)
            written.append((tensor, before))
        willing = [pair for pair in reversed(values) if not may_refuse(pair[0])]
        if launch is not None:
            launch()
    except BaseException:
        for tensor, before in written:
            write(tensor, before)
        raise
    tries = _TRIES
    while willing:
        try:
            while willing:
                write(*willing[-1])
                willing.pop()
                tries = _TRIES
        except Exception:
            tries -= 1
            if tries == 0:
                raise


def may_refuse(tensor: Tensor) -> bool:
    """Whether a write may raise: subclasses may, and elements that share memory do."""
    shares = any(s == 0 and n > 1 for s, n in zip(tensor.stride(), tensor.shape, strict=True))
    return shares or not is_plain(tensor)


def write(tensor: Tensor, value: Tensor | None) -> None:
    """Writes one value of `Computed.stores`."""
    # What was made in inference mode is written in inference mode only.
    with torch.inference_mode() if tensor.is_inference() else nullcontext():
        if value is None:
            tensor.zero_()
        elif tensor.is_complex() and not value.is_complex():
            tensor.copy_(torch.view_as_complex(value))
        else:
            tensor.copy_(value)
