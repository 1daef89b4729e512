"""``warpstep.replace(optimizer)``: a live torch optimizer gets warpstep's class and kernels."""

from __future__ import annotations

import functools
import weakref
from typing import Any, overload

import torch
from torch import Tensor

from warpstep.adam import Adam
from warpstep.adamw import AdamW
from warpstep.hypers import check_group
from warpstep.optimizer import Optimizer
from warpstep.rules import Rule
from warpstep.sgd import SGD
from warpstep.state import describe, missing_keys, parameter_name, wrong_codes

_CLASSES: dict[type, type[Adam] | type[SGD]] = {
    torch.optim.AdamW: AdamW,
    torch.optim.Adam: Adam,
    torch.optim.SGD: SGD,
}


@overload
def replace(optimizer: torch.optim.AdamW) -> AdamW: ...
@overload
def replace(optimizer: torch.optim.Adam) -> Adam: ...
@overload
def replace(optimizer: torch.optim.SGD) -> SGD: ...
def replace(optimizer: torch.optim.Optimizer) -> Adam | SGD:
    """Makes a live torch optimizer a ``warpstep.AdamW``, ``Adam`` or ``SGD``, in place.

    It stays the same object and gets another class. So whatever holds it goes on with it, at any
    moment of a run: learning rate schedulers (those inside a ``SequentialLR`` too), a
    ``torch.amp.GradScaler``, hooks and their handles, the wrappers of training libraries. The
    groups, the state and its tensors stay as they are; the next step's hyper-parameters, moments
    and step counts are those that torch's step would have had.

    Nothing has to be made anew. (A learning rate scheduler that is made anew changes the rate when
    it is made, also with torch's optimizers: load its state dict, and after that the optimizer's.)
    The way back to torch's class is a state dict.

    Whoever has kept the method ``optimizer.step`` has kept torch's, and steps with torch: replace
    before that. Where accelerate trains in float16, that is before ``accelerator.prepare``.

    Args:
        optimizer: a ``torch.optim.AdamW``, ``torch.optim.Adam`` or ``torch.optim.SGD`` itself, of
            no derived class. It may have any ``fused`` and ``foreach``: the kernels step it all the
            same.

    Returns:
        ``optimizer`` itself, with ``backend="auto"``.

    Raises:
        TypeError: it is of another class, its ``step`` was replaced, or its parameters or state
            cannot be stepped; the message says what. Nothing has been changed.
    """
    kind = _CLASSES.get(type(optimizer))
    if kind is None:
        found = f"a {type(optimizer).__module__}.{type(optimizer).__qualname__}"
        if isinstance(optimizer, type):
            found = f"the class {optimizer.__name__}: pass an optimizer that was made of it"
        elif isinstance(optimizer, Optimizer):
            found += ": it is warpstep's already, step with it as it is"
        raise TypeError(
            "replace() takes an optimizer of the very class torch.optim.AdamW, torch.optim.Adam or "
            f"torch.optim.SGD, but got {found}"
        )
    step = vars(optimizer).get("step")
    # Learning rate schedulers wrap it, to see that it is called before theirs.
    wrapped = hasattr(step, "_wrapped_by_lr_sched")
    if step is not None and not (wrapped and step.__wrapped__ is type(optimizer).step):
        raise TypeError(
            f"replace() cannot take over: the optimizer's step was replaced by {step!r}, which "
            "would be lost. Remove that replacement first."
        )
    _check(optimizer, kind.rule)

    of_torch, before = type(optimizer), dict(vars(optimizer))
    try:
        optimizer.__class__ = kind
        optimizer.__setstate__({})
        assert isinstance(optimizer, kind)
        if wrapped:
            _wrap_for_schedulers(optimizer)
    except BaseException:  # a signal's, say: half of a warpstep optimizer cannot step
        optimizer.__class__ = of_torch
        vars(optimizer).clear()
        vars(optimizer).update(before)
        raise
    return optimizer


def _wrap_for_schedulers(optimizer: Adam | SGD) -> None:
    """As ``torch.optim.lr_scheduler.LRScheduler`` wraps ``step`` of the optimizer it is given."""
    method = type(optimizer).step
    reference = weakref.ref(optimizer)

    @functools.wraps(method)
    def step(*args: Any, **kwargs: Any) -> Any:
        optimizer: Any = reference()
        optimizer._opt_called = True
        return method(optimizer, *args, **kwargs)

    vars(step)["_wrapped_by_lr_sched"] = True
    vars(optimizer)["step"] = step


def _check(optimizer: torch.optim.Optimizer, rule: Rule) -> None:
    """Raises TypeError for what a step could not take."""
    groups = optimizer.param_groups
    for g, group in enumerate(groups):
        flag = "decoupled_weight_decay"
        if flag in rule.flags and group.get(flag) is None:
            raise TypeError(
                f"replace() cannot take over: parameter group {g} has no 'decoupled_weight_decay'. "
                "Set it to True for AdamW's decay, False for Adam's."
            )
        try:
            check_group(group, rule, f" (in parameter group {g})")
        except ValueError as error:
            raise TypeError(f"replace() cannot take over: {error}") from error
        for i, param in enumerate(group["params"]):
            name = parameter_name(groups, g, i)
            if param.layout != torch.strided:
                raise TypeError(f"{name} is of layout {param.layout}, expected torch.strided")
            if not (param.is_floating_point() or param.is_complex()):
                raise TypeError(
                    f"{name} is {describe(param)}, expected floating point or complex numbers"
                )
            state = optimizer.state.get(param)
            if not state:
                continue
            if missing := missing_keys(state, rule, group):
                raise TypeError(
                    f"{name} has a state without {missing}: torch cannot step it either"
                )
            for key in rule.moments:
                _check_moment(name, key, param, state.get(key))
                if wrong := wrong_codes(param, key, state):
                    raise TypeError(f"{name}: {wrong}")
            step: Any = state.get("step")
            if step is None:  # not missing
                continue
            if not isinstance(step, (int, float)) and not (
                isinstance(step, Tensor) and step.numel() == 1
            ):
                raise TypeError(f"{name}: its state 'step' is {step!r}, expected one number")


def _check_moment(name: str, key: str, param: Tensor, moment: Any) -> None:
    if moment is None:
        return
    if (
        not isinstance(moment, Tensor)
        or moment.layout != torch.strided
        or moment.shape != param.shape
        or moment.device != param.device
        or moment.is_complex() != param.is_complex()
        or moment.is_floating_point() != param.is_floating_point()
    ):
        raise TypeError(
            f"{name} is {describe(param)}, its state {key!r} is {describe(moment)}, expected a "
            "dense tensor of the same shape on the same device"
        )
