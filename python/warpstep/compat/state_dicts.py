"""State dicts of ``FusedAdam``: Transformer Engine's form."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from warpstep import checkpoint
from warpstep.averages import SCHEDULED, Averaging
from warpstep.compat.counters import count_of
from warpstep.compat.masters import OWN_KEYS, STATES, Kept
from warpstep.rules import Rule

# What torch's and warpstep's groups say of how a step is done, and this class's do not.
_OTHERS_KEYS = (
    *("amsgrad", "foreach", "fused", "capturable", "differentiable"),
    *("decay_form", "base_lr", "ema_decay", SCHEDULED, "master"),
)


def saved(state_dict: dict[str, Any], portable: bool) -> dict[str, Any]:
    """The state dict that is saved, of one as torch makes it. Copies what it changes.

    Moments are float32 and the groups' ``"step"`` is an int. ``portable``: a ``"step"`` is in each
    state, too, and there are no masters, for torch's optimizers.
    """
    groups, counts = [], {}
    for group in state_dict["param_groups"]:
        found = {key: value for key, value in group.items() if portable or key not in OWN_KEYS}
        if "step" in found:
            found["step"] = count_of(found["step"])
        counts.update(dict.fromkeys(found["params"], found.get("step", 0)))
        groups.append(found)
    states = {
        key: _saved_state(state, counts.get(key) if portable else None)
        for key, state in state_dict["state"].items()
    }
    return {**state_dict, "state": states, "param_groups": groups}


def _saved_state(state: Any, count: int | None) -> Any:
    if not isinstance(state, dict):
        return state
    found = {
        name: value.to(torch.float32)
        if isinstance(value, Tensor) and value.dtype == torch.bfloat16
        else value
        for name, value in state.items()
    }
    if count is not None:
        found.pop("master_param", None)
        found["step"] = torch.tensor(float(count), dtype=torch.float32, device="cpu")
    return found


class LoadsStates(Averaging):
    """What of a FusedAdam a state dict is loaded into."""

    rule: Rule

    def complete_group(self, group: dict[str, Any]) -> None:
        """Adds what a step reads of a group."""
        raise NotImplementedError


@torch.no_grad()
def load(optimizer: LoadsStates, kept: Kept, state_dict: dict[str, Any]) -> None:
    """``load_state_dict``: what parameters have is checked and copied, then put in place."""

    def state_of(name: str, param: Tensor, group: dict[str, Any], saved: Any) -> dict[str, Any]:
        return _loaded_state(name, param, group, saved, kept)

    def finish(groups: list[dict[str, Any]]) -> dict[str, Any]:
        for group in groups:
            for key in _OTHERS_KEYS:
                group.pop(key, None)
            if "step" in group:
                group["step"] = count_of(group["step"])
            optimizer.complete_group(group)
        return {}

    checkpoint.load(optimizer, optimizer.rule, state_dict, state_of, finish)


def _loaded_state(
    name: str, param: Tensor, group: dict[str, Any], saved_state: Any, kept: Kept
) -> dict[str, Any]:
    """One parameter's state. A count that it has, as torch's states do, becomes its group's."""
    misfit = f"loaded state dict does not fit {name}"
    if not isinstance(saved_state, dict):
        raise ValueError(f"{misfit}: its state is {saved_state!r}, expected a dict")
    state = {}
    for key, value in saved_state.items():
        if value is None:
            continue
        if key == "step":
            count = count_of(value)
            if group.setdefault("step", count) != count:
                raise ValueError(
                    f"{misfit}: it has taken {count} steps, its group {group['step']}: all "
                    "parameters of a group must have taken as many"
                )
        elif key not in STATES:
            raise ValueError(f"{misfit}: its state has {key!r}, and there is {', '.join(STATES)}")
        elif key in kept.names:
            try:
                state[key] = kept.loaded(key, param, value)
            except ValueError as error:
                raise ValueError(f"{misfit}: {error}") from None
        elif param.dtype in (torch.bfloat16, torch.float16):
            raise ValueError(f"{misfit}: it has a master: construct with master_weights=True")
    return state
