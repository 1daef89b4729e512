"""The step of lists of tensors: by kernels as they are, or checked and stepped as they need."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from warpstep import backends, reference, signals
from warpstep import lists as native_lists
from warpstep.hypers import check_group
from warpstep.lists import Lists, Options
from warpstep.recipes import FORMATS, Recipe, one_of, real_dtype
from warpstep.rules import Rule
from warpstep.state import check_gradient, describe, is_dense, is_freed, is_plain, match_layout
from warpstep.state import same_layout as has_layout_of
from warpstep.stored import real_view
from warpstep.tail import Tail


def run(lists: Lists, options: Options, backend: str = "auto", dispatched: bool = False) -> None:
    """The step: by kernels as the lists are, or checked, sorted and stepped as they need."""
    check_group(_group(lists.rule, len(lists.tensors) - 3, options), lists.rule, "")
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
        if chosen in ("cpu", "cuda") and _launch(lists, options, chosen, dispatched) is None:
            return
    _check(lists, options)
    _step_sorted(lists, options, requested)


def _launch(lists: Lists, options: Options, backend: str, dispatched: bool) -> str | None:
    """Runs the native kernels on everything; or says why not, and then nothing is changed."""
    reason: str | None = native_lists.stepper().step(
        lists.rule.name,
        lists.tensors,
        options,
        cuda=backend == "cuda",
        dispatched=dispatched,
        always=True,
        count_writes=True,
        threads=torch.get_num_threads(),
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


def _goes_uncounted(lists: Lists) -> bool:
    """Whether no steps are counted, where the rule allows that."""
    return not lists.tensors[-1] and lists.rule.counted_for is not None


def _check(lists: Lists, options: Options) -> None:
    """Raises what `adamw_` documents; nothing has been written yet."""
    params, grads, *moments, steps = lists.tensors
    for name, tensors in zip(lists.names, lists.tensors, strict=True):
        if len(tensors) != len(params) and not (tensors is steps and _goes_uncounted(lists)):
            raise ValueError(
                f"{name} has {len(tensors)} tensors and params {len(params)}: the lists must be of "
                "one length"
            )
    for i, param in enumerate(params):
        name = f"params[{i}]"
        for of_list, tensors in zip(lists.names, lists.tensors, strict=True):
            if not tensors:
                continue
            tensor = tensors[i]
            if not isinstance(tensor, Tensor):
                kind = type(tensor).__name__
                raise TypeError(f"{of_list}[{i}] is of type {kind}, expected a tensor")
            if tensor.layout != torch.strided:
                raise RuntimeError(
                    f"{of_list}[{i}] is of layout {tensor.layout}, expected torch.strided: call "
                    "to_dense() on it"
                )
            if tensors is not steps and real_dtype(tensor.dtype) not in FORMATS:
                raise TypeError(
                    f"{of_list}[{i}] is {describe(tensor)}: its dtype has to be "
                    f"{one_of(FORMATS)}, or complex"
                )
        check_gradient(name, param, grads[i])
        for of_list, of_moment in zip(lists.names[2:], moments, strict=False):
            _check_moment(name, param, f"{of_list}[{i}]", of_moment[i])
        _check_scalars(name, param, options)
        if not steps:
            continue
        step = steps[i]
        if step.numel() != 1 or step.dtype not in (torch.float32, torch.float64) or is_freed(step):
            raise TypeError(f"state_steps[{i}] is {describe(step)}, expected one float32")
        if options.advance_steps and i > 0 and step is steps[i - 1]:
            raise RuntimeError(
                f"state_steps[{i}] is state_steps[{i - 1}]: several tensors would advance one step "
                "counter. Give each its own, or advance it once and pass advance_steps=False."
            )


def _check_scalars(name: str, param: Tensor, options: Options) -> None:
    for label, scalar in (("grad_scale", options.grad_scale), ("found_inf", options.found_inf)):
        if scalar is None:
            continue
        if not isinstance(scalar, Tensor) or scalar.numel() != 1:
            found = describe(scalar) if isinstance(scalar, Tensor) else repr(scalar)
            raise RuntimeError(f"{label} is {found}, expected a tensor of one element")
        if scalar.device != param.device:
            raise RuntimeError(
                f"{label} is on {scalar.device}, {name} on {param.device}: move {label} there"
            )


def _check_moment(name: str, param: Tensor, of_moment: str, moment: Tensor) -> None:
    if moment.shape != param.shape or moment.device != param.device:
        raise RuntimeError(
            f"{name} is {describe(param)}, {of_moment} is {describe(moment)}: shape and device "
            "must be the same"
        )
    if moment.is_complex() != param.is_complex():
        raise TypeError(
            f"{name} is {describe(param)}, {of_moment} is {describe(moment)}: both must be real, "
            "or both complex"
        )
    if is_freed(moment):
        raise RuntimeError(
            f"{of_moment} has elements and no memory: its storage was freed. Bring it back before "
            "the step."
        )


def _step_sorted(lists: Lists, options: Options, requested: str) -> None:
    """Steps lists that were checked: by kernels what they take, the others by the reference."""
    by_kernel: dict[tuple[str, torch.device], list[list[Tensor]]] = {}
    by_reference: list[tuple[list[Tensor], Tensor | None]] = []
    grad_scale, found_inf = (
        None if scalar is None else scalar.to(torch.float32)
        for scalar in (options.grad_scale, options.found_inf)
    )
    options = options._replace(grad_scale=grad_scale, found_inf=found_inf)
    *streams, steps = lists.tensors
    counters: Sequence[Tensor | None] = steps or [None] * len(streams[0])
    for *one, step in zip(*streams, counters, strict=True):
        param = one[0]
        chosen = backends.choose(requested, param.device)
        if not _has_kernel(chosen, lists.rule, one, step, options):
            by_reference.append((one, step))
            continue
        one[1] = match_layout(param, one[1])
        all_of = by_kernel.setdefault((chosen, param.device), [[] for _ in lists.tensors])
        for mine, added in zip(all_of, (*one, *(() if step is None else (step,))), strict=False):
            mine.append(added)

    # What can fail comes first.
    computed = [_compute(lists.rule, one, step, options) for one, step in by_reference]
    with signals.deferred():
        reference.store(computed)
        for (backend, _), some in by_kernel.items():
            reason = _launch(lists._replace(tensors=some), options, backend, dispatched=True)
            if reason is not None:
                raise RuntimeError(f"the {backend!r} backend took no checked tensors: {reason}")


def _has_kernel(
    backend: str, rule: Rule, one: list[Tensor], step: Tensor | None, options: Options
) -> bool:
    param, grad, *moments = one
    formats = [real_dtype(tensor.dtype) for tensor in (param, grad, *moments)]
    recipe = Recipe(rule.name, formats[0], formats[1], tuple(formats[2:]))
    copied = not has_layout_of(grad, param)
    return (
        backend in ("cpu", "cuda")
        and backends.has_kernel(backend, recipe)
        and all(is_plain(tensor) for tensor in (param, *moments))
        and is_plain(grad.resolve_conj().resolve_neg())
        and is_dense(param)
        and all(has_layout_of(moment, param) for moment in moments)
        and not (copied and options.unscale_grads)
        and (
            step is None
            or (is_plain(step) and step.dtype == torch.float32 and step.device == param.device)
        )
    )


def _compute(
    rule: Rule, one: list[Tensor], step: Tensor | None, options: Options
) -> reference.Computed:
    """One tensor's step by the reference, not yet stored."""
    param, grad, *moments = one
    state = dict(zip(rule.moments, moments, strict=False))
    if step is not None:
        state["step"] = step if options.advance_steps else step - 1
    tail = Tail(options.grad_scale, options.found_inf)
    taken = options.found_inf is None or options.found_inf.item() == 0
    group = _group(rule, len(moments), options)
    counts = step is not None
    computed = reference.computed(param, grad, state, group, rule, tail, taken, counts_steps=counts)
    if options.unscale_grads and options.grad_scale is not None and taken:
        with torch.no_grad():
            unscaled = real_view(grad) * (1 / options.grad_scale)
            computed.stores.append((grad, unscaled))
    return computed
