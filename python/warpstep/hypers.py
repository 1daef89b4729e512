"""Hyper-parameters of a parameter group: checked as torch checks them, packed for kernels."""

from __future__ import annotations

import struct
from collections.abc import Iterable
from typing import Any, Literal

import torch
from torch import Tensor

from warpstep import modes
from warpstep.recipes import one_of
from warpstep.state import is_plain

# How weight decay acts (kernels/rule.h has the formulas), in the order of Decay in tables.h.
DECAY_FORMS = ("coupled", "decoupled", "independent", "l1", "cautious")
DecayForm = Literal["coupled", "decoupled", "independent", "l1", "cautious"]
# What every group has; older state dicts may lack torch's other keys, for which it has defaults.
HYPERS = ("lr", "betas", "eps", "weight_decay")


def check_arguments(params: Any, **numbers: Any) -> None:
    """Raises TypeError for arguments that torch meets with an error of Python's own.

    ``params`` is the optimizer's or a group's. What torch refuses with words of its own is left
    to torch.
    """
    if isinstance(params, torch.nn.Module):
        parts = params if isinstance(params, Iterable) else (None,)
        if not all(isinstance(part, (Tensor, dict, tuple)) for part in parts):
            raise TypeError(
                "params argument given to the optimizer should be an iterable of Tensors or "
                f"dicts, but got {torch.typename(params)}, a module: pass its parameters()"
            )
    betas = numbers.pop("betas", (0.0, 0.0))
    try:
        numbers["betas[0]"], numbers["betas[1]"] = betas
    except (TypeError, ValueError):
        raise TypeError(f"betas should be a pair like (0.9, 0.999), but got {betas!r}") from None
    for name, value in numbers.items():
        try:
            isinstance(value, Tensor) or value >= 0.0  # torch asks this first
        except TypeError:
            hint = f": pass float({value!r})" if isinstance(value, str) else ""
            kind = "a number or a tensor of one" if name[:2] in ("lr", "be") else "a number"
            raise TypeError(
                f"{name} should be {kind}, but got {value!r}, a {type(value).__name__}{hint}"
            ) from None


def decay_form(group: dict[str, Any]) -> str:
    """The form of a group's weight decay: ``decay_form``, else what torch's flag says."""
    default = "decoupled" if group["decoupled_weight_decay"] else "coupled"
    form: str = group.get("decay_form", default)
    return form


def check_group(group: dict[str, Any], where: str) -> None:
    """Raises ValueError if a hyper-parameter of ``group`` is invalid.

    lr, eps and weight_decay are at least 0, betas in [0, 1), ema_decay in [0, 1]; none is NaN.
    Tensors have one element; the values of those on an accelerator are not read, which would wait
    for it, nor are those of any where a mode is active, as they may have none.
    """

    def check(key: str, label: str, value: Any, below_one: bool = False) -> None:
        if isinstance(value, Tensor):
            if value.numel() != 1:
                raise ValueError(f"Tensor {key} must be 1-element{where}")
            if value.device.type != "cpu" or modes.are_active() or not is_plain(value):
                return
        try:
            valid = value >= 0.0 and not (below_one and value >= 1.0)
        except TypeError:
            valid, label = False, f"{label} of type {type(value).__name__}"
        if not valid:
            raise ValueError(f"Invalid {label}: {value}{where}")

    if missing := [key for key in HYPERS if key not in group]:
        raise ValueError(f"{' and '.join(map(repr, missing))} is missing{where}: set it there")
    check("lr", "learning rate", group["lr"])
    check("eps", "epsilon value", group["eps"])
    betas = group["betas"]
    if not isinstance(betas, (tuple, list)) or len(betas) != 2:
        raise ValueError(f"Invalid betas: {betas!r} is not a pair{where}")
    for index in range(2):
        check(f"betas[{index}]", f"beta parameter at index {index}", betas[index], below_one=True)
    check("weight_decay", "weight_decay value", group["weight_decay"])

    check_own_options(group, where)


def check_own_options(group: dict[str, Any], where: str) -> None:
    """Raises ValueError if ``decay_form``, ``base_lr`` or ``ema_decay`` of ``group`` is invalid."""
    form = group.get("decay_form", DECAY_FORMS[0])
    if form not in DECAY_FORMS:
        raise ValueError(f"Invalid decay_form: {form!r}{where}. Choose {one_of(DECAY_FORMS)}.")
    if form == "independent":
        base_lr = group.get("base_lr")
        if not isinstance(base_lr, (int, float)) or not base_lr > 0:
            raise ValueError(
                f"Invalid base_lr: {base_lr!r}{where}: with decay_form='independent' it is the "
                "positive learning rate that lr is the schedule's multiple of"
            )
    ema_decay = group.get("ema_decay")
    if ema_decay is not None and not (
        isinstance(ema_decay, (int, float)) and 0.0 <= ema_decay <= 1.0
    ):
        raise ValueError(f"Invalid ema_decay: {ema_decay!r} is not in [0, 1]{where}")


def pack_groups(groups: list[dict[str, Any]]) -> bytes:
    """The groups' hyper-parameters as the table of ``Hyper`` structs in kernels/tables.h.

    Tensors are read on the host. The native module packs without that; this is for where it is
    missing.
    """
    table = b""
    for group in groups:
        beta1, beta2 = group["betas"]
        form = decay_form(group)
        weight_decay = group["weight_decay"] / (group["base_lr"] if form == "independent" else 1)
        numbers = (group["lr"], beta1, beta2, group["eps"], weight_decay)
        ema_decay = group.get("ema_decay") or 0.0
        kinds = (0, 0, 0)  # numbers, all of them
        table += struct.pack(
            "<6d5B3x",
            *map(float, (*numbers, ema_decay)),
            *kinds,
            DECAY_FORMS.index(form),
            bool(group["maximize"]),
        )
    return table
