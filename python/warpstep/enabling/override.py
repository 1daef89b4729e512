"""``warpstep.enable()``: warpstep's kernels under torch's own optimizers.

Their steps go by plans (torchs_plan.py). For steps that no plan takes, and for other callers,
``aten::_fused_adamw_``, ``_fused_adam_`` and ``_fused_sgd_`` (and their ``tensor_lr`` overloads)
get another kernel on the CPU and on CUDA. What it does not take goes to the kernel that was there
before.
"""

from __future__ import annotations

import os
import threading
import warnings
from collections import deque
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch

from warpstep import backends, signals
from warpstep.enabling import shortcut, torchs_plan
from warpstep.enabling.counts import Counts
from warpstep.enabling.fused_operators import OPERATORS

ENVIRONMENT_VARIABLE = "WARPSTEP_ENABLE"
# Of the one warning that torch gives, once a process, when a kernel is overridden from Python.
_WARNING = r"(?s)Warning only once for all operators.*Overriding a previously registered kernel"

_lock = threading.RLock()
# A child would wait for ever for a thread of its parent's that is enabling or disabling.
os.register_at_fork(
    before=_lock.acquire, after_in_parent=_lock.release, after_in_child=_lock.release
)
_library: torch.library.Library | None = None
_switched_on = False  # by enable()
_unfused_switched_on = False  # with unfused=True
_scopes = 0  # of enabled() that are open
_unfused_scopes = 0  # with unfused=True
_keys: tuple[str, ...] = ()
_beneath: set[str] = set()  # operators that someone else has overridden from Python
# Kernels that were registered, kept: another thread may still be in one when it is taken off. Not
# for ever, since `with enabled():` around each step registers six anew, or twelve with CUDA: 1,024
# are those of 85 scopes at least, and no call lasts that long.
_kept: deque[Any] = deque(maxlen=1024)

_remove_shortcut: Callable[[], None] | None = None
_remove_plans: Callable[[], None] | None = None

refusal = ""  # why the environment's wish was not granted
counts = Counts()


def _takes_unfused() -> bool:
    return _unfused_switched_on or _unfused_scopes > 0


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
                kernel = kernel_of(original, key == "CUDA", counts)
                with quiet():
                    library.impl(name, kernel, key, with_keyset=True, allow_override=True)
                _kept.append(torch.library.get_kernel(f"aten::{name}", key))
    except BaseException:
        library._destroy()
        raise
    _library, _keys = library, keys
    try:
        _remove_shortcut = shortcut.put_on(counts)
        _remove_plans = torchs_plan.put_on(counts, _takes_unfused)
    except BaseException:
        _take_off()
        raise


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
    with signals.deferred():  # half of it could not be taken off
        if (_switched_on or _scopes) and _library is None:
            _put_on()
        elif not (_switched_on or _scopes):
            _take_off()


def enable(unfused: bool = False) -> None:
    """Puts warpstep's kernels under torch's AdamW, Adam and SGD, for this process.

    Every ``torch.optim.AdamW(..., fused=True)``, ``Adam(..., fused=True)`` and ``SGD(...,
    fused=True)``, whenever it was constructed, then steps by a plan, as warpstep's own classes do:
    one launch for all its groups. So do instances of derived classes, whenever a ``step`` of their
    own calls torch's. Their state, its dtypes and counters stay as torch has them, so that a
    checkpoint, a copy or ``disable()`` finds a plain torch optimizer at any moment; hooks,
    schedulers, closures and a ``GradScaler`` go on as before. The semantics are torch's (steps,
    grad_scale, found_inf, gradients left unscaled); results differ by a few roundings a step.

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
    is_open = False

    def close() -> None:
        nonlocal is_open
        global _scopes, _unfused_scopes
        with signals.deferred(), _lock:
            if is_open:
                is_open = False
                _scopes -= 1
                _unfused_scopes -= unfused
                _update()

    try:
        try:
            with signals.deferred(), _lock:
                _scopes += 1
                try:
                    _update()
                except BaseException:
                    _scopes -= 1
                    raise
                _unfused_scopes += unfused
                is_open = True
            yield
        finally:
            close()
    finally:
        if is_open:  # a signal came as it was called
            close()


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
    if _library is not None and not counts.taken and not counts.passed_on:
        line += "; no call yet: it takes those of optimizers constructed with fused=True"
    line += str(counts)
    if _library is not None and _beneath:
        line += f"; overridden by others before: {', '.join(sorted(_beneath))}"
    return line
