"""Loading a state dict: torch's contract, with nothing lost and nothing half-loaded."""

from __future__ import annotations

import math
from collections.abc import Callable
from copy import deepcopy
from itertools import chain
from typing import Any

import torch
from torch import Tensor

from warpstep.allocation import new_copy
from warpstep.averages import SCHEDULED, Averaging
from warpstep.foreign_states import forget_count, translated
from warpstep.hypers import check_own_options, complete_group
from warpstep.precision import Precision
from warpstep.recipes import ema_dtype
from warpstep.rules import Rule
from warpstep.state import (
    describe,
    hint_at_codes,
    is_like,
    missing_keys,
    parameter_name,
    wrong_codes,
    wrong_master,
)

# state_of(name, param, group, saved): the copies of one parameter's saved state.
StateOf = Callable[[str, Tensor, dict[str, Any], Any], dict[str, Any]]


def load(
    optimizer: Averaging,
    rule: Rule,
    state_dict: dict[str, Any],
    state_of: StateOf,
    finish: Callable[[list[dict[str, Any]]], dict[str, Any]],
) -> None:
    """``optimizer.load_state_dict(state_dict)``: all is checked and copied, then put in place.

    ``finish(groups)`` completes the loaded groups, once all states are there, and returns what else
    the optimizer remembers.
    """
    state_dict = state_dict.copy()
    for pre_hook in optimizer._optimizer_load_state_dict_pre_hooks.values():
        state_dict = pre_hook(optimizer, state_dict) or state_dict
    for key in ("state", "param_groups"):
        if key not in state_dict:
            raise KeyError(f"{key}: an optimizer's state dict has it, this one {list(state_dict)}")

    ids = [list(group["params"]) for group in state_dict["param_groups"]]
    groups = _loaded_groups(optimizer, rule, deepcopy(state_dict["param_groups"]))
    places = (
        (parameter_name(optimizer.param_groups, g, i), param, group)
        for g, group in enumerate(groups)
        for i, param in enumerate(group["params"])
    )
    place_of = dict(zip(chain.from_iterable(ids), places, strict=True))
    state: dict[Any, Any] = type(optimizer.state)(dict)
    for key, value in state_dict["state"].items():
        if key in place_of:
            name, param, group = place_of[key]
            state[param] = state_of(name, param, group, value)
        else:
            state[key] = value

    loaded = {"state": state, "param_groups": groups, **finish(groups)}
    before = dict(vars(optimizer))
    try:
        optimizer.__setstate__(loaded)
    except BaseException:  # of a derived class's __setstate__, or a signal's
        vars(optimizer).clear()
        vars(optimizer).update(before)
        raise
    for post_hook in optimizer._optimizer_load_state_dict_post_hooks.values():
        post_hook(optimizer)


def load_for_rule(
    optimizer: Averaging, rule: Rule, state_dict: dict[str, Any], precision: Precision
) -> None:
    """`load` for the optimizers that have torch's names and form of state.

    Moments get the dtype that ``precision`` names, or keep the dtypes that they were saved with:
    those of 8 bits, and those to be, too, which a step converts.
    """
    dtypes = {key: precision.loaded_dtype(which) for which, key in enumerate(rule.moments)}
    dtypes["ema"] = precision.ema_dtype
    steps = [0.0]

    def state_of(name: str, param: Tensor, group: dict[str, Any], saved: Any) -> dict[str, Any]:
        state = _loaded_state(name, param, rule, group, saved, dtypes)
        if callable(optimizer.ema_decay) and "step" in state:
            steps.append(float(state["step"]))
        return state

    def finish(groups: list[dict[str, Any]]) -> dict[str, Any]:
        for group in groups:
            forget_count(group)
        if not callable(optimizer.ema_decay):
            for group in groups:
                group.pop(SCHEDULED, None)
            return {}
        for mine, group in zip(optimizer.param_groups, groups, strict=True):
            if group.setdefault(SCHEDULED, mine.get(SCHEDULED, False)):
                group["ema_decay"] = optimizer.defaults["ema_decay"]
        return {"_ema_steps": int(max(filter(math.isfinite, steps)))}

    load(optimizer, rule, state_dict, state_of, finish)


def _another(rule: Rule) -> str:
    return f"Is it the state dict of another optimizer? Load one of {rule.title}"


def _loaded_groups(
    optimizer: Averaging, rule: Rule, groups: list[dict[str, Any]]
) -> list[dict[str, Any]]:
    """The groups of a state dict, with the optimizer's parameters and what a step needs."""
    if len(groups) != len(optimizer.param_groups):
        raise ValueError(
            "loaded state dict has a different number of parameter groups: "
            f"{len(groups)}, the optimizer {len(optimizer.param_groups)}"
        )
    for index, (mine, loaded) in enumerate(zip(optimizer.param_groups, groups, strict=True)):
        if len(mine["params"]) != len(loaded["params"]):
            raise ValueError(
                "loaded state dict contains a parameter group that doesn't match the size of "
                f"optimizer's group: group {index} has {len(loaded['params'])} parameters, "
                f"the optimizer's {len(mine['params'])}"
            )
        missing = [key for key in dict.fromkeys(n.key for n in rule.numbers) if key not in loaded]
        if missing:
            raise ValueError(
                f"loaded state dict has no {' and no '.join(map(repr, missing))} in parameter "
                f"group {index}. {_another(rule)}, or add what is missing to its 'param_groups'."
            )
        loaded["params"] = mine["params"]
        if "param_names" in mine:
            loaded.setdefault("param_names", mine["param_names"])
        if "base_lr" in mine and loaded.get("decay_form", mine.get("decay_form")) == "independent":
            loaded.setdefault("base_lr", mine["base_lr"])
        complete_group(loaded, {**optimizer.defaults, **mine})
        check_own_options(loaded, f" (in parameter group {index} of the loaded state dict)")
    return groups


def _loaded_state(
    name: str,
    param: Tensor,
    rule: Rule,
    group: dict[str, Any],
    saved: Any,
    dtypes: dict[str, Any],
) -> dict[str, Any]:
    """Copies of the tensors of one parameter's saved state, where and as they are needed."""
    misfit = f"loaded state dict does not fit {name}"
    if not isinstance(saved, dict):
        raise ValueError(f"{misfit}: its state is {saved!r}, expected a dict")
    saved = translated(misfit, saved, group, rule)
    missing = missing_keys(saved, rule, group) if saved else []
    if missing:
        raise ValueError(
            f"{misfit}: its state has {', '.join(map(repr, saved))} and no "
            f"{' and no '.join(map(repr, missing))}. {_another(rule)}, or remove this parameter's "
            "state to begin it anew."
        )
    state = dict(saved)
    for key, value in saved.items():
        if key == "step":
            on_device = group.get("capturable") or group.get("fused")
            state[key] = _loaded_step(misfit, value, param.device if on_device else None)
        elif key in dtypes and value is not None:
            state[key] = _loaded_moment(misfit, param, key, value, dtypes[key])
        elif isinstance(value, Tensor):
            state[key] = new_copy(value, param.device, value.dtype)
        else:
            state[key] = deepcopy(value)
    wrong = _wrong_precision(param, rule, group, state)
    if wrong is not None:
        raise ValueError(f"{misfit}: {wrong}")
    return state


def _wrong_precision(
    param: Tensor, rule: Rule, group: dict[str, Any], state: dict[str, Any]
) -> str | None:
    """What is wrong with the codes of 8-bit moments or with a master; None where nothing is."""
    for moment in rule.moments:
        if (wrong := wrong_codes(param, moment, state)) is not None:
            return wrong
    return wrong_master(param, state, group.get("master") is not None)


def _loaded_step(misfit: str, step: Any, device: torch.device | None) -> Tensor:
    """A step counter of one's own, on ``device``, by default where it is; numbers on the CPU."""
    if not isinstance(step, Tensor):
        try:
            return torch.tensor(float(step), dtype=torch.float32, device=device or "cpu")
        except (TypeError, ValueError, OverflowError):
            raise ValueError(f"{misfit}: 'step' is {step!r}, expected one number") from None
    if step.numel() != 1 or step.is_complex():
        raise ValueError(f"{misfit}: 'step' is {describe(step)}, expected one real number")
    return step.detach().to(device or step.device, torch.float32, copy=True)


def _loaded_moment(
    misfit: str, param: Tensor, key: str, value: Any, wanted: torch.dtype | None
) -> Tensor:
    """A copy of a moment's numbers or an average, on the parameter's device, as is wanted."""
    if not isinstance(value, Tensor) or value.shape != param.shape or not is_like(value, param):
        raise ValueError(
            f"{misfit}: {key!r} is {describe(value)}, the parameter {describe(param)}: shape and "
            f"kind must be the same{hint_at_codes(value)}"
        )
    if key == "ema":
        wanted = ema_dtype(param, wanted) if wanted is not None else None
    elif value.is_complex():
        wanted = None
    return new_copy(value, param.device, wanted or value.dtype)
