"""``warpstep.replace(optimizer)``: a live torch optimizer, carried on by warpstep's kernels."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from warpstep.hypers import check_group
from warpstep.optimizer import Adam, AdamW, OnePass
from warpstep.plan import parameter_name
from warpstep.state import MOMENTS, describe

_CLASSES: dict[type, type[OnePass]] = {torch.optim.AdamW: AdamW, torch.optim.Adam: Adam}
_HOOKS = (
    "_optimizer_step_pre_hooks",
    "_optimizer_step_post_hooks",
    "_optimizer_state_dict_pre_hooks",
    "_optimizer_state_dict_post_hooks",
    "_optimizer_load_state_dict_pre_hooks",
    "_optimizer_load_state_dict_post_hooks",
)


def replace(optimizer: torch.optim.Adam) -> OnePass:
    """A ``warpstep.AdamW`` or ``Adam`` that goes on where ``optimizer`` stands.

    It has the same Parameters in the same groups, with all that the groups hold (names, initial_lr
    and keys that torch does not know included), and the very same state tensors, not copies; the
    next step's hyper-parameters, moments and step counts are those that ``optimizer``'s would have
    had. Hooks are shared too: a hook's handle removes it from both.

    The two share parameters and state from then on, so step with one of them only. ``optimizer``
    itself is not changed, and can still be used if the new one is never stepped. What holds
    ``optimizer`` goes on holding it: make learning rate schedulers anew, with the new optimizer
    (their ``state_dict`` can be loaded), or set ``scheduler.optimizer``; and replace before
    ``torch.amp.GradScaler`` has unscaled its gradients.

    Args:
        optimizer: a ``torch.optim.AdamW`` or ``torch.optim.Adam`` itself, of no derived class. It
            may have any ``fused`` and ``foreach``: the kernels step it all the same.

    Returns:
        The new optimizer, with ``backend="auto"``.

    Raises:
        TypeError: it is of another class, its ``step`` was replaced, or its parameters or state
            cannot be stepped; the message says what. Nothing has been changed.
    """
    kind = _CLASSES.get(type(optimizer))
    if kind is None:
        ours = "; it is warpstep's already" if isinstance(optimizer, OnePass) else ""
        raise TypeError(
            f"replace() takes a torch.optim.AdamW or torch.optim.Adam, and no "
            f"{type(optimizer).__module__}.{type(optimizer).__qualname__}{ours}"
        )
    # Learning rate schedulers wrap it to see that it is called before theirs.
    step = vars(optimizer).get("step")
    if step is not None and not hasattr(step, "_wrapped_by_lr_sched"):
        raise TypeError(f"the optimizer's step was replaced by {step!r}: it would be lost")
    _check(optimizer)

    new = kind.__new__(kind)
    state = type(optimizer.state)(dict)
    for key, value in optimizer.state.items():
        state[key] = dict(value) if isinstance(value, dict) else value
    groups = [{**group, "params": list(group["params"])} for group in optimizer.param_groups]
    hooks = {name: getattr(optimizer, name) for name in _HOOKS if hasattr(optimizer, name)}
    new.__setstate__(
        {
            "defaults": dict(optimizer.defaults),
            "state": state,
            "param_groups": groups,
            **hooks,
        }
    )
    return new


def _check(optimizer: torch.optim.Adam) -> None:
    """Raises TypeError for what a step could not take."""
    groups = optimizer.param_groups
    for g, group in enumerate(groups):
        if group.get("decoupled_weight_decay") is None:
            raise TypeError(f"group {g} does not say whether its weight decay is decoupled")
        try:
            check_group(group, f" (in parameter group {g})")
        except ValueError as error:
            raise TypeError(f"replace() cannot take over: {error}") from error
        for i, param in enumerate(group["params"]):
            name = parameter_name(groups, g, i)
            if param.layout != torch.strided:
                raise TypeError(f"{name} is of layout {param.layout}: not supported")
            if not (param.is_floating_point() or param.is_complex()):
                raise TypeError(f"{name} is {describe(param)}: cannot be stepped")
            state = optimizer.state.get(param) or {}
            for key in MOMENTS:
                _check_moment(name, key, param, state.get(key))
            step: Any = state.get("step", 0)
            if not isinstance(step, (int, float)) and not (
                isinstance(step, Tensor) and step.numel() == 1
            ):
                raise TypeError(f"{name}: its state 'step' is {step!r}, and not one number")


def _check_moment(name: str, key: str, param: Tensor, moment: Any) -> None:
    if moment is None:
        return
    if (
        not isinstance(moment, Tensor)
        or moment.layout != torch.strided
        or moment.shape != param.shape
        or moment.device != param.device
    ):
        found = describe(moment) if isinstance(moment, Tensor) else repr(moment)
        raise TypeError(f"{name} is {describe(param)}, its state {key!r} is {found}: not supported")
