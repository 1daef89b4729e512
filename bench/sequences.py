"""What runs inside the clock: the step alone, or what training loops do around it as well."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch
from torch.nn.utils import clip_grad_norm_
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn

import warpstep

Step = Callable[[], object]

# Far above any norm here: what is clipped costs the same, and the parameters stay comparable.
MAX_NORM = 1e9
EMA_DECAY = 0.999

# Sequence -> what it is, in words. For the step alone there is nothing to say.
IN_WORDS = {
    "step": "",
    "clip": "clip the gradients' norm, step",
    "tail": "unscale (GradScaler), clip, step, average the weights",
    "stats": "step with statistics, against without",
    "copies": "bfloat16 gradients in, float32 step, a bfloat16 copy out",
    "enabled": "torch's fused optimizer under enable(), against without",
    "unfused": "torch's optimizer by default, under enable(unfused=True), against without",
}

# Sequence -> `fused` of torch's optimizer, which is enabled for one of the two that step.
ENABLED = {"enabled": True, "unfused": None}


def torchs(sequence: str, optimizer: Any) -> Step:
    """The sequence as one writes it with torch."""
    params = [p for group in optimizer.param_groups for p in group["params"]]
    if sequence == "clip":

        def clip_and_step() -> None:
            clip_grad_norm_(params, MAX_NORM)
            optimizer.step()

        return clip_and_step
    if sequence == "tail":
        model = torch.nn.ParameterList(params)
        average = AveragedModel(model, multi_avg_fn=get_ema_multi_avg_fn(EMA_DECAY))
        scaler = scaler_on(params[0].device)

        def tail() -> None:
            scaler.unscale_(optimizer)
            clip_grad_norm_(params, MAX_NORM)
            scaler.step(optimizer)
            scaler.update()
            average.update_parameters(model)

        return tail
    if sequence == "copies":
        halves: list[torch.Tensor] = []  # the gradients that came
        copies = halves_of(params)

        def widen_step_and_copy() -> None:
            if not halves:
                halves.extend(p.grad.bfloat16() for p in params if p.grad is not None)
            with torch.no_grad():
                torch._foreach_copy_([p.grad for p in params], halves)
                optimizer.step()
                torch._foreach_copy_(copies, params)

        return widen_step_and_copy
    step: Step = optimizer.step
    return step


def ours(sequence: str, optimizer: Any) -> Step:
    """The sequence as one writes it with warpstep."""
    if sequence == "clip":

        def clip_and_step() -> None:
            optimizer.clip_grad_norm_(MAX_NORM)
            optimizer.step()

        return clip_and_step
    if sequence == "tail":
        scaler = scaler_on(optimizer.param_groups[0]["params"][0].device)

        def tail() -> None:
            optimizer.clip_grad_norm_(MAX_NORM, scaler=scaler)
            scaler.step(optimizer)
            scaler.update()

        return tail
    step: Step = optimizer.step
    return step


def options(sequence: str, params: list[torch.Tensor]) -> dict[str, object]:
    """What warpstep's optimizer of these parameters is constructed with, for a sequence."""
    if sequence == "tail":
        return {"ema_decay": EMA_DECAY}
    if sequence == "copies":
        for param in params:
            param.grad_dtype = torch.bfloat16
        return {"copies": halves_of(params)}
    return {"stats": True} if sequence == "stats" else {}


def surroundings(sequence: str, is_ours: bool) -> AbstractContextManager[None]:
    """In which a competitor's turn takes place."""
    if not is_ours or sequence not in ENABLED:
        return nullcontext()
    return warpstep.enabled(unfused=sequence == "unfused")


def halves_of(params: list[torch.Tensor]) -> list[torch.Tensor]:
    """Memory for a bfloat16 copy of each."""
    return [torch.zeros_like(p, dtype=torch.bfloat16, requires_grad=False) for p in params]


def scaler_on(device: torch.device) -> torch.amp.GradScaler:
    """A GradScaler whose scale is one and stays one."""
    scaler = torch.amp.GradScaler(device.type, init_scale=1.0, growth_interval=2**30)
    scaler.scale(torch.ones((), device=device))
    return scaler
