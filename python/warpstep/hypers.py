"""Hyper-parameters of a parameter group: checked, and packed for kernels."""

from __future__ import annotations

import math
import struct
from collections.abc import Iterable
from typing import Any, Literal

import torch
from torch import Tensor

from warpstep import modes
from warpstep.precision import check_master
from warpstep.recipes import one_of
from warpstep.rules import Rule
from warpstep.state import is_plain

# How weight decay acts (kernels/rules/decay.h has the formulas), in the order of Decay in layout.h.
DECAY_FORMS = ("coupled", "decoupled", "independent", "l1", "cautious", "l1l2", "min")
DecayForm = Literal["coupled", "decoupled", "independent", "l1", "cautious", "l1l2", "min"]


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
    default = "decoupled" if group.get("decoupled_weight_decay") else "coupled"
    form: str = group.get("decay_form", default)
    return form


def complete_group(group: dict[str, Any], defaults: dict[str, Any]) -> None:
    """Adds what a group needs beside torch's keys, from an optimizer's defaults."""
    for key in ("decay_form", "ema_decay", "master"):
        if key in defaults:
            group.setdefault(key, defaults[key])
    if group.get("decay_form") == "independent":
        group.setdefault("base_lr", float(group["lr"]))


def check_group(group: dict[str, Any], rule: Rule, where: str) -> None:
    """Raises ValueError if a hyper-parameter of ``group`` is missing or cannot be computed with.

    Torch checks values when an optimizer is made, and steps with whatever they are edited into: so
    the rule's numbers are any numbers here, or tensors of one element. The values of those on an
    accelerator are not read, which would wait for it, nor are those of any where a mode is active,
    as they may have none. What torch does not have is checked always: ``decay_form``, ``base_lr``
    above 0, ``ema_decay`` in [0, 1].
    """
    for key in (*dict.fromkeys(number.key for number in rule.numbers), *rule.flags):
        if key not in group:
            raise ValueError(f"{key!r} is missing{where}: a step needs it; torch's groups have it")

    for number in rule.numbers:
        if number.which is not None:
            _check_pair(number.key, group[number.key], where)
        value = number.of(group)
        if isinstance(value, Tensor):
            if value.numel() != 1:
                raise ValueError(f"Tensor {number.name} must be 1-element{where}")
            if value.device.type != "cpu" or modes.are_active() or not is_plain(value):
                continue
            value = value.detach()  # torch warns of reading one that requires a gradient
        try:
            math.fabs(value)  # as the native module reads it: a string is no number
        except (TypeError, ValueError, OverflowError, RuntimeError) as error:
            raise ValueError(f"Invalid {number.label}: {value!r} is not a number{where}") from error
    for key in rule.flags:
        try:
            bool(group[key])
        except (TypeError, ValueError, RuntimeError) as error:
            raise ValueError(f"Invalid {key}: {group[key]!r} is not a flag{where}") from error

    check_own_options(group, where)


def _check_pair(key: str, value: Any, where: str) -> None:
    try:
        is_pair = len(value) == 2 and tuple(value) is not None
    except TypeError:
        is_pair = False
    if not is_pair:
        raise ValueError(f"Invalid {key}: {value!r} is not a pair{where}")


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
    check_master(group.get("master"), where)
    if group.get("master") is not None and form == "min":
        raise ValueError(
            f"Invalid decay_form: 'min'{where} is not supported with a master, whose smallest "
            "magnitude is not the parameter's"
        )
    ema_decay = group.get("ema_decay")
    if ema_decay is not None and not (
        isinstance(ema_decay, (int, float)) and 0.0 <= ema_decay <= 1.0
    ):
        raise ValueError(f"Invalid ema_decay: {ema_decay!r} is not in [0, 1]{where}")


def pack_groups(groups: list[dict[str, Any]], rule: Rule) -> bytes:
    """The groups' hyper-parameters as the table of ``Hyper`` structs in kernels/layout.h.

    Tensors are read on the host. The native module packs without that; this is for where it is
    missing.
    """
    table = b""
    for group in groups:
        form = decay_form(group)
        lr, weight_decay, *others = (float(number.of(group)) for number in rule.numbers)
        weight_decay /= group["base_lr"] if form == "independent" else 1
        kinds = (0,) * len(rule.numbers)  # numbers, all of them
        table += struct.pack(
            "<6d7Bx",
            *(lr, weight_decay, *others, group.get("ema_decay") or 0.0),
            *kinds,
            DECAY_FORMS.index(form),
            bool(group["maximize"]),
        )
    return table
