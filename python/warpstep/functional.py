"""One step of AdamW, Adam or SGD on lists of tensors: no optimizer, no state but the lists."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Literal

import torch
from torch import Tensor

from warpstep import backends, modes, reference, signals
from warpstep import lists as native_lists
from warpstep.hypers import check_group
from warpstep.lists import OPERATORS, Lists, Options
from warpstep.recipes import FORMATS, Recipe, one_of, real_dtype
from warpstep.rules import Rule
from warpstep.state import check_gradient, describe, is_dense, is_freed, is_plain, match_layout
from warpstep.state import same_layout as has_layout_of
from warpstep.stored import real_view
from warpstep.tail import Tail

ListBackend = Literal["auto", "cpu", "cuda", "reference"]


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


def _call(name: str, given: Sequence[Sequence[Tensor]], backend: str, **options: Any) -> None:
    """The step of `OPERATORS[name]`, or of torch's operator of that name where one looks."""
    tensors = [g if isinstance(g, list) else list(g) for g in given]
    # Tracers and modes are to see an operator; without a tensor there is none to call.
    if any(tensors) and modes.is_watched():
        # By name: torch would try to read the tensor as a number first.
        overload = "tensor_lr" if isinstance(options["lr"], Tensor) else "default"
        getattr(getattr(torch.ops.warpstep, name), overload)(*tensors, **options)
        return
    run(*OPERATORS[name].bound(tensors, options), backend)


def adamw_(
    params: Sequence[Tensor],
    grads: Sequence[Tensor],
    exp_avgs: Sequence[Tensor],
    exp_avg_sqs: Sequence[Tensor],
    max_exp_avg_sqs: Sequence[Tensor],
    state_steps: Sequence[Tensor],
    *,
    lr: float | Tensor,
    beta1: float,
    beta2: float,
    weight_decay: float,
    eps: float,
    amsgrad: bool = False,
    maximize: bool = False,
    grad_scale: Tensor | None = None,
    found_inf: Tensor | None = None,
    advance_steps: bool = True,
    unscale_grads: bool = False,
    backend: ListBackend = "auto",
) -> None:
    """One step of AdamW on lists of tensors, in place, in one launch for all of a recipe.

    For each tensor, with t its step counted from 1::

        g <- grad / grad_scale;  -g to maximize
        m <- beta1 * m + (1 - beta1) * g
        v <- beta2 * v + (1 - beta2) * g^2
        p <- p - lr * weight_decay * p
               - lr * (m / (1 - beta1^t)) / (sqrt(v / (1 - beta2^t)) + eps)

    Under amsgrad the running maximum of v takes v's place in the last line. Arithmetic is in
    float32 (float64 for float64 tensors), and each stored value is rounded once. A complex tensor
    is a pair of real ones.

    Everything is checked before anything is written. The host's cost is a C++ loop over the
    tensors; a GPU is not waited for. On CUDA the tables of lists that come again are kept on the
    device; in a graph capture, take such a step once eagerly before. Under ``torch.compile``, modes
    and transforms this is the operator ``torch.ops.warpstep.adamw_``. Under ``torch.vmap`` all that
    is written needs the batch dimension, except step counters that the batch shares.

    Source: Loshchilov and Hutter, Decoupled Weight Decay Regularization, Algorithm 2
    (https://arxiv.org/abs/1711.05101); amsgrad: Reddi et al. (https://arxiv.org/abs/1904.09237).

    Args:
        params, grads, exp_avgs, exp_avg_sqs: p, g, m and v, one entry a tensor; entries of one
            tensor have the same shape, device and kind (real or complex). Kernels take float64,
            float32, bfloat16, float16 and the mixtures that the README lists; other mixtures,
            tensors with gaps in memory and tensor subclasses go through plain PyTorch.
        max_exp_avg_sqs: the running maxima of v under amsgrad, else ignored (``[]``).
        state_steps: how many steps were taken: for each tensor a float32 of one element on its
            device. No two may be the same tensor if they are to be advanced.
        lr: a number, or a tensor of one element. One on the parameters' GPU is read there.
        beta1, beta2, weight_decay, eps: numbers. As with lr, none is refused for its value: the
            result is what torch's fused kernel would make of it.
        amsgrad, maximize: as in torch.
        grad_scale: a tensor of one element on the parameters' device, by which gradients are
            divided; or None.
        found_inf: a tensor of one element there: if it is not 0, nothing is changed; or None.
        advance_steps: count the step in ``state_steps``. False where the caller has counted it
            already, as torch has before it calls ``torch._fused_adamw_``.
        unscale_grads: with ``grad_scale``, leave the gradients unscaled, as torch's operator does.
        backend: ``"auto"``, ``"cpu"``, ``"cuda"`` or ``"reference"``.

    Raises:
        ValueError: lists differ in length, or a hyper-parameter is no number.
        TypeError: an entry is no tensor, or of a dtype that cannot be stepped.
        RuntimeError: shapes or devices of one tensor's entries differ; an entry is sparse, expanded
            or has no memory; ``grad_scale`` or ``found_inf`` does not fit.
        BackendUnavailableError: the backend named cannot run on the parameters' device.

        Messages name the list and the index. Entries that share memory are not looked for.
    """
    _call(
        "adamw_",
        (params, grads, exp_avgs, exp_avg_sqs, max_exp_avg_sqs, state_steps),
        backend,
        lr=lr,
        beta1=beta1,
        beta2=beta2,
        weight_decay=weight_decay,
        eps=eps,
        amsgrad=amsgrad,
        maximize=maximize,
        grad_scale=grad_scale,
        found_inf=found_inf,
        advance_steps=advance_steps,
        unscale_grads=unscale_grads,
    )


def adam_(
    params: Sequence[Tensor],
    grads: Sequence[Tensor],
    exp_avgs: Sequence[Tensor],
    exp_avg_sqs: Sequence[Tensor],
    max_exp_avg_sqs: Sequence[Tensor],
    state_steps: Sequence[Tensor],
    *,
    lr: float | Tensor,
    beta1: float,
    beta2: float,
    weight_decay: float,
    eps: float,
    amsgrad: bool = False,
    maximize: bool = False,
    grad_scale: Tensor | None = None,
    found_inf: Tensor | None = None,
    advance_steps: bool = True,
    unscale_grads: bool = False,
    backend: ListBackend = "auto",
) -> None:
    """One step of Adam on lists of tensors: as `adamw_`, but weight decay joins the gradient.

    ::

        g <- grad / grad_scale;  -g to maximize;  g + weight_decay * p

    and nothing else is taken from p. Arguments, dtypes and errors are those of `adamw_`.

    Source: Kingma and Ba, Adam (https://arxiv.org/abs/1412.6980).
    """
    _call(
        "adam_",
        (params, grads, exp_avgs, exp_avg_sqs, max_exp_avg_sqs, state_steps),
        backend,
        lr=lr,
        beta1=beta1,
        beta2=beta2,
        weight_decay=weight_decay,
        eps=eps,
        amsgrad=amsgrad,
        maximize=maximize,
        grad_scale=grad_scale,
        found_inf=found_inf,
        advance_steps=advance_steps,
        unscale_grads=unscale_grads,
    )


def sgd_(
    params: Sequence[Tensor],
    grads: Sequence[Tensor],
    momentum_buffers: Sequence[Tensor],
    state_steps: Sequence[Tensor],
    *,
    lr: float | Tensor,
    weight_decay: float,
    momentum: float,
    dampening: float,
    nesterov: bool = False,
    maximize: bool = False,
    grad_scale: Tensor | None = None,
    found_inf: Tensor | None = None,
    advance_steps: bool = True,
    unscale_grads: bool = False,
    backend: ListBackend = "auto",
) -> None:
    """One step of SGD, with or without momentum, on lists of tensors: as `adamw_` otherwise.

    For each tensor::

        g <- grad / grad_scale;  -g to maximize;  g + weight_decay * p
        b <- momentum * b + (1 - dampening) * g        g at the first step
        p <- p - lr * b                                lr * (g + momentum * b) with nesterov

    and without momentum ``p <- p - lr * g``.

    Source: Sutskever et al., On the importance of initialization and momentum in deep learning
    (https://proceedings.mlr.press/v28/sutskever13.html), in torch's form.

    Args:
        params, grads, momentum_buffers: p, g and b, one entry a tensor; without momentum there are
            no buffers (what is given counts for nothing). They begin as zeros.
        state_steps: how many steps were taken, as for `adamw_`; or ``[]``, where the steps are not
            counted: none is the first then. That matters with dampening only.
        lr: a number, or a tensor of one element. One on the parameters' GPU is read there.
        weight_decay, momentum, dampening: numbers; none is refused for its value.
        nesterov, maximize: as in torch.
        grad_scale, found_inf, advance_steps, unscale_grads, backend: as for `adamw_`.

    Raises:
        ValueError, TypeError, RuntimeError, BackendUnavailableError: as `adamw_`.
    """
    _call(
        "sgd_",
        (params, grads, momentum_buffers, state_steps),
        backend,
        lr=lr,
        weight_decay=weight_decay,
        momentum=momentum,
        dampening=dampening,
        nesterov=nesterov,
        maximize=maximize,
        grad_scale=grad_scale,
        found_inf=found_inf,
        advance_steps=advance_steps,
        unscale_grads=unscale_grads,
    )


def sgdw_(
    params: Sequence[Tensor],
    grads: Sequence[Tensor],
    momentum_buffers: Sequence[Tensor],
    state_steps: Sequence[Tensor],
    *,
    lr: float | Tensor,
    weight_decay: float,
    momentum: float,
    dampening: float,
    nesterov: bool = False,
    maximize: bool = False,
    grad_scale: Tensor | None = None,
    found_inf: Tensor | None = None,
    advance_steps: bool = True,
    unscale_grads: bool = False,
    backend: ListBackend = "auto",
) -> None:
    """One step of SGDW on lists of tensors: as `sgd_`, but weight decay stays out of the gradient.

    ``lr * weight_decay * p`` is taken from p beside the update. Arguments, dtypes and errors are
    those of `sgd_`.

    Source: Loshchilov and Hutter, Decoupled Weight Decay Regularization, Algorithm 1
    (https://arxiv.org/abs/1711.05101).
    """
    _call(
        "sgdw_",
        (params, grads, momentum_buffers, state_steps),
        backend,
        lr=lr,
        weight_decay=weight_decay,
        momentum=momentum,
        dampening=dampening,
        nesterov=nesterov,
        maximize=maximize,
        grad_scale=grad_scale,
        found_inf=found_inf,
        advance_steps=advance_steps,
        unscale_grads=unscale_grads,
    )


__all__ = ["adam_", "adamw_", "sgd_", "sgdw_"]
