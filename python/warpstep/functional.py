"""One step of AdamW, Adam or SGD on lists of tensors: no optimizer, no state but the lists."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Literal

import torch
from torch import Tensor

from warpstep import modes
from warpstep.list_steps import run
from warpstep.lists import OPERATORS, low_precision_names
from warpstep.precision import Rounding

ListBackend = Literal["auto", "cpu", "cuda", "reference"]
ListRounding = Literal[Rounding, "stochastic_exp_avg_sq"]

# Of each operator. Not asked for in a call: Dynamo warns of a cached function in what it traces.
_LOW_PRECISION = {
    name: low_precision_names(operator.rule.moments) for name, operator in OPERATORS.items()
}


def _call(name: str, given: Sequence[Sequence[Tensor]], backend: str, **options: Any) -> None:
    """The step of `OPERATORS[name]`, or of torch's operator of that name where one looks."""
    tensors = [g if isinstance(g, list) else list(g) for g in given]
    for low in _LOW_PRECISION[name]:
        if (entries := options[low]) is not None and not isinstance(entries, list):
            options[low] = list(entries)
    # Tracers and modes are to see an operator; without a tensor there is none to call.
    if any(tensors) and modes.is_watched():
        # By name: torch would try to read the tensor as a number first.
        overload = "tensor_lr" if isinstance(options["lr"], Tensor) else "default"
        if options["seed"] >= 2**63:  # torch's integers have 64 bits and a sign
            options["seed"] -= 2**64
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
    residuals: Sequence[Tensor] | None = None,
    exp_avg_scales: Sequence[Tensor] | None = None,
    exp_avg_sq_scales: Sequence[Tensor] | None = None,
    max_exp_avg_sq_scales: Sequence[Tensor] | None = None,
    copies: Sequence[Tensor] | None = None,
    rounding: ListRounding | None = None,
    seed: int = 0,
    param_indices: Sequence[int] | None = None,
    first_elements: Sequence[int] | None = None,
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

    A tensor may be a contiguous range of a flat parameter, with the same range of all that belongs
    to it: ranges get the bits that the whole would. Count their step once, before the first of
    them, and pass this counter with ``advance_steps=False`` to each. They may be stepped from
    several threads at once; while a large one is, other Python threads run.

    Source: Loshchilov and Hutter, Decoupled Weight Decay Regularization, Algorithm 2
    (https://arxiv.org/abs/1711.05101); amsgrad: Reddi et al. (https://arxiv.org/abs/1904.09237).

    Args:
        params, grads, exp_avgs, exp_avg_sqs: p, g, m and v, one entry a tensor; entries of one
            tensor have the same shape, device and kind (real or complex). Kernels take float64,
            float32, bfloat16, float16 and the mixtures in docs/support.md; other mixtures,
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
        residuals: for bfloat16 parameters, int16 tensors that begin as zeros: with them p is the
            float32 of which the parameter is the nearest bfloat16 (``master="residual"``).
        exp_avg_scales, exp_avg_sq_scales, max_exp_avg_sq_scales: for moments of 8 bits a number
            (uint8), the scales of their blocks of 64 elements, uint8 in the order of memory; both
            begin as zeros. An empty tensor for a moment of another dtype.
        copies: bfloat16 or float16 tensors that get the values of float32 parameters.
        rounding: ``"stochastic"`` rounds bfloat16 parameters without residuals and bfloat16
            exp_avg_sqs up or down at random, right in the mean; ``"stochastic_exp_avg_sq"`` only
            the latter, as the classes do with ``state_dtype=torch.bfloat16``; else to nearest.
        seed: from 0 to 2^64 - 1, of random bits: the same on every backend, a function of it, the
            step, the parameter's index, and the element's index in the whole parameter. (An
            operator of torch takes those above 2^63 less 2^64.)
        param_indices: the indices of the parameters there; by default their places in ``params``.
        first_elements: where tensors that are ranges begin in the whole parameters: multiples of 64
            for 8-bit moments. By default 0.
        backend: ``"auto"``, ``"cpu"``, ``"cuda"`` or ``"reference"``.

    Raises:
        ValueError: lists differ in length, a hyper-parameter is no number, or what decides about
            random bits is out of range.
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
        residuals=residuals,
        exp_avg_scales=exp_avg_scales,
        exp_avg_sq_scales=exp_avg_sq_scales,
        max_exp_avg_sq_scales=max_exp_avg_sq_scales,
        copies=copies,
        rounding=rounding,
        seed=seed,
        param_indices=param_indices,
        first_elements=first_elements,
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
    residuals: Sequence[Tensor] | None = None,
    exp_avg_scales: Sequence[Tensor] | None = None,
    exp_avg_sq_scales: Sequence[Tensor] | None = None,
    max_exp_avg_sq_scales: Sequence[Tensor] | None = None,
    copies: Sequence[Tensor] | None = None,
    rounding: ListRounding | None = None,
    seed: int = 0,
    param_indices: Sequence[int] | None = None,
    first_elements: Sequence[int] | None = None,
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
        residuals=residuals,
        exp_avg_scales=exp_avg_scales,
        exp_avg_sq_scales=exp_avg_sq_scales,
        max_exp_avg_sq_scales=max_exp_avg_sq_scales,
        copies=copies,
        rounding=rounding,
        seed=seed,
        param_indices=param_indices,
        first_elements=first_elements,
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
    residuals: Sequence[Tensor] | None = None,
    momentum_buffer_scales: Sequence[Tensor] | None = None,
    copies: Sequence[Tensor] | None = None,
    rounding: Rounding | None = None,
    seed: int = 0,
    param_indices: Sequence[int] | None = None,
    first_elements: Sequence[int] | None = None,
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
        momentum_buffer_scales: as the moments' scales of `adamw_`. ``rounding="stochastic"`` needs
            ``state_steps``.

        All others are as for `adamw_`.

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
        residuals=residuals,
        momentum_buffer_scales=momentum_buffer_scales,
        copies=copies,
        rounding=rounding,
        seed=seed,
        param_indices=param_indices,
        first_elements=first_elements,
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
    residuals: Sequence[Tensor] | None = None,
    momentum_buffer_scales: Sequence[Tensor] | None = None,
    copies: Sequence[Tensor] | None = None,
    rounding: Rounding | None = None,
    seed: int = 0,
    param_indices: Sequence[int] | None = None,
    first_elements: Sequence[int] | None = None,
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
        residuals=residuals,
        momentum_buffer_scales=momentum_buffer_scales,
        copies=copies,
        rounding=rounding,
        seed=seed,
        param_indices=param_indices,
        first_elements=first_elements,
    )


__all__ = ["adam_", "adamw_", "sgd_", "sgdw_"]
