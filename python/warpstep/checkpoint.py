"""Loading a state dict: torch's contract, with nothing lost and nothing half-loaded."""

from __future__ import annotations

from copy import deepcopy
from itertools import chain
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from warpstep.plan import parameter_name
from warpstep.recipes import ema_dtype
from warpstep.state import MOMENTS, describe

if TYPE_CHECKING:
    from warpstep.optimizer import OnePass


def load(optimizer: OnePass, state_dict: dict[str, Any]) -> None:
    """``optimizer.load_state_dict(state_dict)``."""
    state_dict = state_dict.copy()
    for pre_hook in optimizer._optimizer_load_state_dict_pre_hooks.values():
        state_dict = pre_hook(optimizer, state_dict) or state_dict

    groups = deepcopy(state_dict["param_groups"])
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
    ids = chain.from_iterable(group["params"] for group in groups)
    places = (
        (param, loaded, parameter_name(optimizer.param_groups, g, i))
        for g, (mine, loaded) in enumerate(zip(optimizer.param_groups, groups, strict=True))
        for i, param in enumerate(mine["params"])
    )
    place_of = dict(zip(ids, places, strict=True))

    state: dict[Any, Any] = type(optimizer.state)(dict)
    for key, value in state_dict["state"].items():
        if key in place_of:
            param, group, name = place_of[key]
            state[param] = _loaded_state(optimizer, name, param, group, value)
        else:
            state[key] = value
    for mine, loaded in zip(optimizer.param_groups, groups, strict=True):
        loaded["params"] = mine["params"]
        if "param_names" in mine:
            loaded.setdefault("param_names", mine["param_names"])
        if "base_lr" in mine and loaded.get("decay_form", mine["decay_form"]) == "independent":
            loaded.setdefault("base_lr", mine["base_lr"])
    optimizer.__setstate__({"state": state, "param_groups": groups})
    if callable(optimizer.ema_decay):
        optimizer._ema_steps = max(
            (int(s.get("step", 0)) for s in optimizer.state.values() if isinstance(s, dict)),
            default=0,
        )
    for post_hook in optimizer._optimizer_load_state_dict_post_hooks.values():
        post_hook(optimizer)


def _loaded_state(
    optimizer: OnePass, name: str, param: Tensor, group: dict[str, Any], saved: dict[str, Any]
) -> dict[str, Any]:
    """Copies of the tensors of one parameter's saved state, where and as they are needed."""
    state = dict(saved)
    for key, value in saved.items():
        if not isinstance(value, Tensor):
            state[key] = deepcopy(value)
        elif key == "step":
            if value.numel() != 1:
                raise ValueError(
                    f"loaded state dict does not fit {name}: 'step' is {describe(value)}, "
                    "expected one number"
                )
            on_device = group.get("capturable") or group.get("fused")
            device = param.device if on_device else value.device
            state[key] = value.detach().to(device, torch.float32, copy=True)
        elif key in (*MOMENTS, "ema"):
            if value.shape != param.shape:
                raise ValueError(
                    f"loaded state dict does not fit {name}: {key!r} is {describe(value)}, "
                    f"the parameter {describe(param)}"
                )
            wanted = optimizer.state_dtype if value.is_floating_point() else None
            if key == "ema" and optimizer.ema_dtype is not None:
                wanted = ema_dtype(param, optimizer.ema_dtype)
            elif key == "ema":
                wanted = None
            dtype = wanted or value.dtype
            state[key] = value.detach().to(param.device, dtype, copy=True)
        else:
            state[key] = value.detach().to(param.device, copy=True)
    return state
