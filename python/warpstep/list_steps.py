"""The step of lists of tensors: by kernels as they are, or checked and stepped as they need."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from warpstep import backends, reference, signals
from warpstep.hypers import check_group
from warpstep.list_checks import STOCHASTIC_SQUARES, check, check_options
from warpstep.lists import (
    COPIES,
    FUNCTION,
    OPERATOR,
    RESIDUALS,
    Caller,
    Lists,
    Options,
    scales_of,
    stepper,
)
from warpstep.precision import Precision
from warpstep.recipes import RESIDUAL, Recipe, moment_key, one_of, real_dtype, scale_of
from warpstep.rules import Rule
from warpstep.state import is_dense, is_plain, match_layout
from warpstep.state import same_layout as has_layout_of
from warpstep.stored import Stored, real_view
from warpstep.tail import Tail


def run(lists: Lists, options: Options, backend: str = "auto", caller: Caller = FUNCTION) -> None:
    """The step: by kernels as the lists are, or checked, sorted and stepped as they need."""
    check_group(_group(lists.rule, len(lists.tensors) - 3, options), lists.rule, "")
    check_options(lists, options)
    if backend == "triton":
        raise ValueError(
            "Invalid backend: 'triton' does not take lists of tensors. Choose "
            f"{one_of(('auto', 'cpu', 'cuda', 'reference'))}."
        )
    params = lists.tensors[0]
    if not any(lists.tensors):
        return
    requested = backends.requested_backend(backend) if backend != "auto" else "auto"
    if params and isinstance(params[0], Tensor):
        chosen = backends.choose(requested, params[0].device)
        if chosen in ("cpu", "cuda") and _launch(lists, options, chosen, caller) is None:
            return
    check(lists, options)
    _step_sorted(lists, options, requested)


def _launch(lists: Lists, options: Options, backend: str, caller: Caller) -> str | None:
    """Runs the native kernels on everything; or says why not, and then nothing is changed."""
    reason: str | None = stepper().step(
        lists.rule.name,
        lists.tensors,
        options,
        caller,
        backend == "cuda",
        torch.get_num_threads(),
        lists.for_kernels(),
    )
    return reason


def _group(rule: Rule, moments: int, options: Options) -> dict[str, Any]:
    """The options as a group of an optimizer has them whose tensors have so many moments."""
    group: dict[str, Any] = dict.fromkeys(rule.flags, False)
    for number, value in zip(rule.numbers, (options.lr, *options.numbers), strict=True):
        before = group.get(number.key, ())
        group[number.key] = value if number.which is None else (*before, value)
    for key in rule.moments[:moments]:
        if key in rule.optional:
            group[rule.optional[key]] = group[rule.optional[key]] or True
    group |= {"maximize": options.maximize, "decoupled_weight_decay": not options.coupled}
    return group


def _step_sorted(lists: Lists, options: Options, requested: str) -> None:
    """Steps lists that were checked: by kernels what they take, the others by the reference."""
    by_kernel: dict[tuple[str, torch.device], list[int]] = {}
    by_reference: list[int] = []
    grad_scale, found_inf = (
        None if scalar is None else scalar.to(torch.float32)
        for scalar in (options.grad_scale, options.found_inf)
    )
    options = options._replace(grad_scale=grad_scale, found_inf=found_inf)
    grads = list(lists.tensors[1])
    for i, param in enumerate(lists.tensors[0]):
        chosen = backends.choose(requested, param.device)
        if not _has_kernel(chosen, lists, options, i):
            by_reference.append(i)
            continue
        grads[i] = match_layout(param, grads[i])
        by_kernel.setdefault((chosen, param.device), []).append(i)

    # What can fail comes first.
    computed = [_compute(lists, options, i) for i in by_reference]
    launches = []
    for (backend, device), some in by_kernel.items():
        theirs = options._replace(
            lr=_lr_for(options.lr, device),
            param_indices=[_number(options.param_indices, i, i) for i in some],
            first_elements=[_number(options.first_elements, i, 0) for i in some],
        )
        launches.append((lists.chosen(some, grads), theirs, backend))

    def launch() -> None:
        for chosen_lists, theirs, backend in launches:
            reason = _launch(chosen_lists, theirs, backend, OPERATOR)
            if reason is not None:
                raise RuntimeError(f"the {backend!r} backend took no checked tensors: {reason}")

    with signals.deferred():
        reference.store(computed, launch)


def _lr_for(lr: float | Tensor, device: torch.device) -> float | Tensor:
    """A learning rate that kernels on a device can read: there, or a number."""
    if isinstance(lr, Tensor) and lr.device.type != "cpu":
        return lr.to(device)
    return lr


def _number(given: Sequence[int] | None, index: int, default: int) -> int:
    return default if given is None else given[index]


def _precision_of(options: Options) -> Precision:
    """What an optimizer has been asked for that rounds as the options say."""
    if options.rounding == STOCHASTIC_SQUARES:  # as where bfloat16 moments were asked for
        return Precision(state_dtype=torch.bfloat16, seed=options.seed)
    stochastic = options.rounding == "stochastic"
    return Precision(rounding="stochastic" if stochastic else "nearest", seed=options.seed)


def _has_kernel(backend: str, lists: Lists, options: Options, i: int) -> bool:
    """Whether a kernel takes a tensor's entries, the gradient in the parameter's layout."""
    param, grad, *moments = (one[i] for one in lists.tensors[:-1])
    step = lists.tensors[-1][i] if lists.tensors[-1] else None
    of = {name: tensors[i] for name, tensors in lists.low_precision.items()}
    residual, copy, precision = of.get(RESIDUALS), of.get(COPIES), _precision_of(options)
    recipe = Recipe(
        lists.rule.name,
        precision.format_of_param(param, residual is not None),
        real_dtype(grad.dtype),
        tuple(
            precision.format_of_moment(lists.rule, key, moment.dtype)
            for key, moment in zip(lists.moments, moments, strict=True)
        ),
        counts_steps=step is not None,
        has_master=residual is not None,
        copy=None if copy is None else copy.dtype,
    )
    copied = not has_layout_of(grad, param)
    others = [*moments, *(tensor for tensor in (residual, copy) if tensor is not None)]
    return (
        backend in ("cpu", "cuda")
        and backends.has_kernel(backend, recipe)
        and all(is_plain(tensor) for tensor in (param, *moments, *of.values()))
        and is_plain(grad.resolve_conj().resolve_neg())
        and is_dense(param)
        and all(has_layout_of(other, param) for other in others)
        and not (copied and options.unscale_grads)
        and (
            step is None
            or (is_plain(step) and step.dtype == torch.float32 and step.device == param.device)
        )
    )


def _compute(lists: Lists, options: Options, i: int) -> reference.Computed:
    """One tensor's step by the reference, not yet stored."""
    rule, low = lists.rule, lists.low_precision
    param, grad, *moments = (one[i] for one in lists.tensors[:-1])
    named = dict(zip(lists.moments, moments, strict=True))
    state = {moment_key(key, moment.dtype): moment for key, moment in named.items()}
    state |= {scale_of(key): low[scales_of(key)][i] for key in named if scales_of(key) in low}
    group = _group(rule, len(moments), options)
    if RESIDUALS in low:
        state[RESIDUAL] = low[RESIDUALS][i]
        group["master"] = "residual"
    counts = bool(lists.tensors[-1])
    if counts:
        step = lists.tensors[-1][i]
        state["step"] = step if options.advance_steps else step - 1
    tail = Tail(options.grad_scale, options.found_inf)
    taken = options.found_inf is None or options.found_inf.item() == 0
    stored = Stored(
        _precision_of(options),
        _number(options.param_indices, i, i),
        _number(options.first_elements, i, 0),
        low[COPIES][i] if COPIES in low else None,
    )
    computed = reference.computed(
        param, grad, state, group, rule, tail, taken, counts_steps=counts, stored=stored
    )
    if options.unscale_grads and options.grad_scale is not None and taken:
        with torch.no_grad():
            unscaled = real_view(grad) * (1 / options.grad_scale)
            computed.stores.append((grad, unscaled))
    return computed
