"""torch's GradScaler, told that an optimizer's gradients are unscaled in the step's own pass."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.optim.optimizer import Optimizer

from warpstep.transfers import brought


def defer_unscale(scaler: Any, optimizer: Optimizer) -> Tensor | None:
    """Tells a GradScaler that this optimizer's gradients are seen to; the scale that they carry.

    As ``scaler.unscale_(optimizer)``, but the gradients stay as they are: the step divides them.
    None where they carry none (no scaling, or unscaled already). The caller owes the scaler the
    inf check: see ``report_found_inf``.
    """
    if scaler is None:
        return None
    if not isinstance(scaler, torch.amp.GradScaler):
        raise TypeError(f"scaler is a {type(scaler).__name__}, expected a torch.amp.GradScaler")
    if not scaler.is_enabled():
        return None
    states = scaler._per_optimizer_states[id(optimizer)]
    stage = states["stage"].name
    if stage == "STEPPED":
        raise RuntimeError("clip_grad_norm_() with this scaler is being called after step().")
    if stage == "UNSCALED":
        return None
    scaler._check_scale_growth_tracker("unscale_")
    scale: Tensor | None = scaler._scale
    return scale


def report_found_inf(scaler: Any, optimizer: Optimizer, found_inf: Tensor) -> None:
    """Leaves the result of the inf check where ``scaler.step`` and ``update`` look for it."""
    states = scaler._per_optimizer_states[id(optimizer)]
    states["found_inf_per_device"] = {found_inf.device: found_inf}
    states["stage"] = type(states["stage"]).UNSCALED


def scale_and_found_inf(scaler: Any, optimizer: Optimizer) -> tuple[Tensor | None, Tensor]:
    """What a step is to divide the gradients by, if anything, and whether one is not finite.

    As ``scaler.step(optimizer)`` sees to it for an optimizer that unscales in its own step.

    Raises RuntimeError where the scaler has found no gradient.
    """
    states = scaler._per_optimizer_states[id(optimizer)]
    stage = states["stage"].name
    if stage == "READY":
        scaler._check_inf_per_device(optimizer)
    found = list(states["found_inf_per_device"].values())
    if not found:
        raise RuntimeError("grad_scaler has found no gradients: step after backward()")
    scaler._check_scale_growth_tracker("step")
    scale: Tensor = scaler._scale
    first, *others = (brought(one, scale.device) for one in found)
    found_inf = sum(others, start=first)
    return (None if stage == "UNSCALED" else scale), found_inf
