"""``warpstep.enable()``: warpstep's kernels under torch's own optimizers.

Their steps go by plans (planned.py). For steps that no plan takes, and for other callers,
``aten::_fused_adamw_``, ``_fused_adam_`` and ``_fused_sgd_`` (and their ``tensor_lr`` overloads)
get another kernel on the CPU and on CUDA. What it does not take goes to the kernel that was there
before.
"""

from __future__ import annotations

import functools
import os
import threading
import warnings
from collections import Counter, deque
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor

from warpstep import backends, planned, shortcut
from warpstep.lists import Lists, Options, lists_of, stepper
from warpstep.rules import ADAMW, SGD

ENVIRONMENT_VARIABLE = "WARPSTEP_ENABLE"
# Of the one warning that torch gives, once a process, when a kernel is overridden from Python.
_WARNING = r"(?s)Warning only once for all operators.*Overriding a previously registered kernel"

_lock = threading.RLock()
_library: torch.library.Library | None = None
_switched_on = False  # by enable()
_unfused_switched_on = False  # with unfused=True
_scopes = 0  # of enabled() that are open
_unfused_scopes = 0  # with unfused=True
_keys: tuple[str, ...] = ()
_beneath: set[str] = set()  # operators that someone else has overridden from Python
# Kernels that were registered, kept: another thread may still be in one when it is taken off.
_kept: deque[Any] = deque(maxlen=1024)

_remove_shortcut: Callable[[], None] | None = None
_remove_plans: Callable[[], None] | None = None

refusal = ""  # why the environment's wish was not granted
taken = 0
by_plans = 0  # of those taken
passed_on: Counter[str] = Counter()
unplanned: Counter[str] = Counter()


def _taker(cuda: bool) -> Callable[[Lists, Options], bool]:
    """What takes a call on a device, or counts why it goes to torch's kernel."""
    step = stepper().step
    threads = torch.get_num_threads

    def takes(lists: Lists, options: Options) -> bool:
        reason = _gpu_reason(lists.tensors[0]) if cuda else ""
        reason = reason or step(
            lists.rule.name,
            lists.tensors,
            options,
            cuda=cuda,
            dispatched=True,
            always=False,
            count_writes=False,
            threads=threads(),
        )
        if reason is None:
            _count()
        else:
            passed_on[reason] += 1
        return reason is None

    return takes


# The kernel for one operator and key; `original` takes what it does not. torch has its kernels
# leave the gradients unscaled.
_Kernel = Callable[..., None]


def _adam_kernel(original: Any, cuda: bool, coupled: bool) -> _Kernel:
    takes = _taker(cuda)

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


def _sgd_kernel(original: Any, cuda: bool) -> _Kernel:
    takes = _taker(cuda)

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
            advance_steps=not is_first_step,  # without counters: this is the second step, or first
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
OPERATORS: dict[str, Callable[[Any, bool], _Kernel]] = {
    name + overload: kernel
    for name, kernel in (
        ("_fused_adamw_", functools.partial(_adam_kernel, coupled=False)),
        ("_fused_adam_", functools.partial(_adam_kernel, coupled=True)),
        ("_fused_sgd_", _sgd_kernel),
    )
    for overload in ("", ".tensor_lr")
}


def _count() -> None:
    global taken
    taken += 1


def _count_plan() -> None:
    global taken, by_plans
    taken += 1
    by_plans += 1


def _count_unplanned(reason: str) -> None:
    unplanned[reason] += 1


def _takes_unfused() -> bool:
    return _unfused_switched_on or _unfused_scopes > 0


def _gpu_reason(params: list[Tensor]) -> str:
    return backends.unavailable_reason("cuda", params[0].device) if params else ""


def _usable_keys() -> tuple[str, ...]:
    """Dispatch keys for which there is a kernel. Touches no GPU: a process may yet fork."""
    module, reason = backends.native()
    if module is None or not hasattr(torch.library, "get_kernel"):
        reason = reason or f"torch {torch.__version__} has no torch.library.get_kernel: update it"
        raise backends.BackendUnavailableError(
            f"enable() has no kernel to put in the place of torch's: {reason}. Nothing has been "
            "changed."
        )
    has_cuda = module.cuda_device_type == "cuda" and torch.version.cuda is not None
    return ("CPU", "CUDA") if has_cuda else ("CPU",)


@contextmanager
def quiet() -> Iterator[None]:
    """Keeps torch's one warning of an override back; other warnings are as they were."""
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", _WARNING, UserWarning)
        yield


def _put_on() -> None:
    global _library, _keys, _remove_shortcut, _remove_plans
    keys = _usable_keys()
    library = torch.library.Library("aten", "IMPL")
    overridden = set(getattr(torch.library, "_impls", ()))
    _beneath.clear()
    try:
        for name, kernel_of in OPERATORS.items():
            for key in keys:
                original = torch.library.get_kernel(f"aten::{name}", key)
                if f"aten/{name}/{key}" in overridden:
                    _beneath.add(f"aten::{name} on {key}")
                kernel = kernel_of(original, key == "CUDA")
                with quiet():
                    library.impl(name, kernel, key, with_keyset=True, allow_override=True)
                _kept.append(torch.library.get_kernel(f"aten::{name}", key))
    except BaseException:
        library._destroy()
        raise
    _library, _keys = library, keys
    _remove_shortcut = shortcut.put_on(_count)
    _remove_plans = planned.put_on(_count_plan, _count_unplanned, _takes_unfused)


def _take_off() -> None:
    global _library, _keys, _remove_shortcut, _remove_plans
    if _remove_plans is not None:
        _remove_plans()
        _remove_plans = None
    if _remove_shortcut is not None:
        _remove_shortcut()
        _remove_shortcut = None
    if _library is not None:
        _library._destroy()
        _library, _keys = None, ()


def _update() -> None:
    if (_switched_on or _scopes) and _library is None:
        _put_on()
    elif not (_switched_on or _scopes):
        _take_off()


def enable(unfused: bool = False) -> None:
    """Puts warpstep's kernels under torch's AdamW, Adam and SGD, for this process.

    Every ``torch.optim.AdamW(..., fused=True)``, ``Adam(..., fused=True)`` and ``SGD(...,
    fused=True)``, whenever it was constructed, then steps by a plan, as warpstep's own classes do:
    one launch for all its groups. So do instances of derived classes that have no ``step`` of their
    own. Their state, its dtypes and counters stay as torch has them, so that a checkpoint, a copy or
    ``disable()`` finds a plain torch optimizer at any moment; hooks, schedulers, closures and a
    ``GradScaler`` go on as before. The semantics are torch's (steps, grad_scale, found_inf,
    gradients left unscaled); results differ by a few roundings a step.

    What no plan takes, and any other caller of ``torch._fused_adamw_``, ``torch._fused_adam_`` and
    ``torch._fused_sgd_``, gets warpstep's kernels for the operators. Calls that warpstep has no
    kernel for, or whose tensors have layouts that differ, go to torch's kernel. A compiled step
    calls the operators. ``warpstep.status()`` counts all of it by reason. Calling it again changes
    nothing, but that ``unfused=True`` is added.

    A kernel that someone else registers for these operators while this is enabled may hold ours
    (``torch.library.get_kernel``), to pass calls on. After ``disable()`` it cannot: torch raises
    "SafeKernelFunction has been invalidated". Register it before ``enable()``, or take it off
    before ``disable()``.

    Args:
        unfused: also take instances for which no implementation was chosen, ``fused`` and
            ``foreach`` both None, which torch steps by its loop or by foreach. ``fused=False``, any
            ``foreach`` and ``differentiable=True`` stay torch's. What is then different: each value
            is rounded once, where torch rounds after each operation (in bfloat16 that shows); new
            step counters are float32 on the parameter's device, as with ``fused=True``, where torch
            has them on the CPU (or in float64, if that is the default dtype), and those that are
            elsewhere are moved there by the next step; version counters advance by one for each
            parameter, and not at all for moments.

    Raises:
        BackendUnavailableError: there is no native module, or torch cannot hand over its own
            kernels; nothing has been changed then.
    """
    global _switched_on, _unfused_switched_on
    with _lock:
        if not _switched_on:
            _usable_keys()
            _switched_on = True
            try:
                _update()
            except BaseException:
                _switched_on = False
                raise
        _unfused_switched_on = _unfused_switched_on or unfused


def enable_if_asked() -> None:
    """``enable()`` if the environment asks for it; where it cannot, ``status()`` says why."""
    global refusal
    if (asked := os.environ.get(ENVIRONMENT_VARIABLE)) in ("1", "all"):
        try:
            enable(unfused=asked == "all")
        except backends.BackendUnavailableError as error:  # importing never fails
            refusal = f"{ENVIRONMENT_VARIABLE}={asked} could not be granted: {error}"


def disable() -> None:
    """Undoes ``enable()``: torch's functions and kernels are in their place again, the very ones.

    Inside ``with enabled():`` this takes effect when the last such scope ends.
    """
    global _switched_on, _unfused_switched_on
    with _lock:
        _switched_on = _unfused_switched_on = False
        _update()


@contextmanager
def enabled(unfused: bool = False) -> Iterator[None]:
    """``enable()`` for the inside of a ``with``; scopes may be nested. For the whole process.

    Args:
        unfused: as ``enable`` has it.

    Raises:
        BackendUnavailableError: as ``enable``.
    """
    global _scopes, _unfused_scopes
    with _lock:
        _scopes += 1
        try:
            _update()
        except BaseException:
            _scopes -= 1
            raise
        _unfused_scopes += unfused
    try:
        yield
    finally:
        with _lock:
            _scopes -= 1
            _unfused_scopes -= unfused
            _update()


def is_enabled() -> bool:
    """Whether warpstep's kernels are under torch's fused optimizers now."""
    return _library is not None


def report() -> str:
    """One line for ``warpstep.status()``."""
    line = f"torch's fused optimizers: {'warpstep on ' + ' and '.join(_keys) if _keys else 'own'}"
    if _library is not None and _takes_unfused():
        line += ", and those for which nothing was chosen"
    if refusal:
        line += f" ({refusal})"
    if _library is not None and not taken and not passed_on:
        line += "; no call yet: it takes those of optimizers constructed with fused=True"
    if taken or passed_on:
        line += f"; {taken} calls taken, {by_plans} of them whole steps by plans"
        line += "".join(f", {count} passed on to torch ({why})" for why, count in passed_on.items())
    line += "".join(f"; {count} steps without a plan ({why})" for why, count in unplanned.items())
    if _library is not None and _beneath:
        line += f"; overridden by others before: {', '.join(sorted(_beneath))}"
    return line
