"""From ``torch.optim``'s fused step straight to the kernels, while warpstep is enabled.

torch groups the tensors by device and dtype and advances 2,000 step counters one by one before it
calls its fused operator: more than the step itself then costs. The private function that does this
is replaced while it has the parameters that it is known to have; what it does not take goes to
torch's own function, and from there to the operator, as if this module were not there.
"""

from __future__ import annotations

import importlib
import inspect
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.autograd.graph import increment_version

from warpstep import backends, modes
from warpstep.enabling.counts import Counts
from warpstep.lists import TORCHS_STEP, Options, lists_of, stepper
from warpstep.rules import ADAMW

NAME = "_fused_adam"
KNOWN = [
    *("params", "grads", "exp_avgs", "exp_avg_sqs", "max_exp_avg_sqs", "state_steps"),
    *("grad_scale", "found_inf", "amsgrad", "has_complex", "beta1", "beta2", "lr", "weight_decay"),
    *("eps", "maximize", "capturable", "differentiable", "decoupled_weight_decay"),
]


def shorter(original: Any, counts: Counts, is_on: Callable[[], bool]) -> Any:
    """In place of torch's ``original``; ``counts`` counts the calls taken.

    Someone may have wrapped it, and it cannot be taken off: then ``is_on`` says if it is wanted.
    """
    step = stepper().step
    threads = torch.get_num_threads

    def fused_adam(
        params: list[Tensor],
        grads: list[Tensor],
        exp_avgs: list[Tensor],
        exp_avg_sqs: list[Tensor],
        max_exp_avg_sqs: list[Tensor],
        state_steps: list[Tensor],
        grad_scale: Tensor | None,
        found_inf: Tensor | None,
        **options: Any,
    ) -> None:
        beta1, beta2 = options["beta1"], options["beta2"]
        numbers = isinstance(beta1, float) and isinstance(beta2, float)
        plain = bool(params) and numbers and is_on()
        if plain and not options["differentiable"] and not modes.is_watched():
            device = params[0].device
            cuda = device.type == "cuda" and not backends.unavailable_reason("cuda", device)
            taken = Options(
                options["lr"],
                (options["weight_decay"], beta1, beta2, options["eps"]),
                options["maximize"],
                not options["decoupled_weight_decay"],
                grad_scale,
                found_inf,
                advance_steps=True,
                unscale_grads=True,
            )
            all_lists = (params, grads, exp_avgs, exp_avg_sqs, max_exp_avg_sqs, state_steps)
            lists = lists_of(ADAMW, all_lists, options)
            reason = step(
                lists.rule.name,
                lists.tensors,
                taken,
                TORCHS_STEP,
                cuda,
                threads(),
                None,  # of low precision
            )
            if reason is None:
                increment_version(state_steps)  # as torch's addition to them does
                counts.taken += 1
                return
        original(
            params,
            grads,
            exp_avgs,
            exp_avg_sqs,
            max_exp_avg_sqs,
            state_steps,
            grad_scale,
            found_inf,
            **options,
        )

    return fused_adam


def put_on(counts: Counts) -> Callable[[], None]:
    """Puts the shortcut in its place. Returns what takes it off again."""
    module: Any = importlib.import_module("torch.optim.adam")  # no attribute of torch.optim
    original = getattr(module, NAME, None)
    if original is None or list(inspect.signature(original).parameters) != KNOWN:
        return lambda: None  # another torch: the operators are overridden all the same
    on = True
    ours = shorter(original, counts, lambda: on)

    def take_off() -> None:
        nonlocal on
        on = False
        if getattr(module, NAME) is ours:
            setattr(module, NAME, original)

    setattr(module, NAME, ours)  # last: what would fail has not
    return take_off
