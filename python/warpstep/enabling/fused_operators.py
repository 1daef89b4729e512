"""Kernels for torch's fused operators, in the place of torch's own: see ``warpstep.enable()``."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from warpstep import backends
from warpstep.enabling.counts import Counts
from warpstep.lists import TORCHS_OPERATOR, Lists, Options, lists_of, stepper
from warpstep.rules import ADAMW, SGD


def _taker(cuda: bool, counts: Counts) -> Callable[[Lists, Options], bool]:
    """What takes a call on a device, or counts why it goes to torch's kernel."""
    step = stepper().step
    threads = torch.get_num_threads

    def takes(lists: Lists, options: Options) -> bool:
        reason = _gpu_reason(lists.tensors[0]) if cuda else ""
        reason = reason or step(
            lists.rule.name,
            lists.tensors,
            options,
            TORCHS_OPERATOR,
            cuda,
            threads(),
            None,  # of low precision
        )
        if reason is None:
            counts.taken += 1
        else:
            counts.passed_on[reason] += 1
        return reason is None

    return takes


# The kernel for one operator and key; `original` takes what it does not. torch has its kernels
# leave the gradients unscaled.
_Kernel = Callable[..., None]


def _adam_kernel(original: Any, cuda: bool, counts: Counts, coupled: bool) -> _Kernel:
    takes = _taker(cuda, counts)

    def fused(
        keys: Any,
        params: list[Tensor],
        grads: list[Tensor],
        exp_avgs: list[Tensor],
        exp_avg_sqs: list[Tensor],
        max_exp_avg_sqs: list[Tensor],
        state_steps: list[Tensor],
        *,
        lr: float | Tensor,
        beta1: float,
        beta2: float,
        weight_decay: float,
        eps: float,
        amsgrad: bool,
        maximize: bool,
        grad_scale: Tensor | None = None,
        found_inf: Tensor | None = None,
    ) -> None:
        lists = (params, grads, exp_avgs, exp_avg_sqs, max_exp_avg_sqs, state_steps)
        options = Options(
            lr,
            (weight_decay, beta1, beta2, eps),
            maximize,
            coupled,
            grad_scale,
            found_inf,
            advance_steps=False,  # torch has
            unscale_grads=True,
        )
        if not takes(lists_of(ADAMW, lists, {"amsgrad": amsgrad}), options):
            original.call_boxed(
                keys,
                *lists,
                lr=lr,
                beta1=beta1,
                beta2=beta2,
                weight_decay=weight_decay,
                eps=eps,
                amsgrad=amsgrad,
                maximize=maximize,
                grad_scale=grad_scale,
                found_inf=found_inf,
            )

    return fused


def _sgd_kernel(original: Any, cuda: bool, counts: Counts) -> _Kernel:
    takes = _taker(cuda, counts)

    def fused(
        keys: Any,
        params: list[Tensor],
        grads: list[Tensor],
        buffers: list[Tensor],
        *,
        weight_decay: float,
        momentum: float,
        lr: float | Tensor,
        dampening: float,
        nesterov: bool,
        maximize: bool,
        is_first_step: bool,
        grad_scale: Tensor | None = None,
        found_inf: Tensor | None = None,
    ) -> None:
        if is_first_step and buffers:
            # They are memory as it was found, which the kernel would read, and which would stay if
            # the step is skipped for an inf. Through .data, which counts no write: torch counts it.
            torch._foreach_zero_([buffer.data for buffer in buffers])
        options = Options(
            lr,
            (weight_decay, momentum, dampening, nesterov),
            maximize,
            True,
            grad_scale,
            found_inf,
            # Without counters kernels take every counter for 1 (kUncounted in kernels/tail.h). So
            # this is step 2; or 1, if they are told that the caller has advanced the counters.
            advance_steps=not is_first_step,
            unscale_grads=True,
        )
        lists = lists_of(SGD, (params, grads, buffers, []), {"momentum": buffers})
        if not takes(lists, options):
            original.call_boxed(
                keys,
                params,
                grads,
                buffers,
                weight_decay=weight_decay,
                momentum=momentum,
                lr=lr,
                dampening=dampening,
                nesterov=nesterov,
                maximize=maximize,
                is_first_step=is_first_step,
                grad_scale=grad_scale,
                found_inf=found_inf,
            )

    return fused


# Each with what makes its kernel.
OPERATORS: dict[str, Callable[[Any, bool, Counts], _Kernel]] = {
    name + overload: kernel
    for name, kernel in (
        ("_fused_adamw_", functools.partial(_adam_kernel, coupled=False)),
        ("_fused_adam_", functools.partial(_adam_kernel, coupled=True)),
        ("_fused_sgd_", _sgd_kernel),
    )
    for overload in ("", ".tensor_lr")
}


def _gpu_reason(params: list[Tensor]) -> str:
    return backends.unavailable_reason("cuda", params[0].device) if params else ""
