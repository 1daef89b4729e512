"""``torch.ops.warpstep.adamw_`` and ``adam_``: the functional steps as operators of torch.

For libraries that need an operator: ``torch.compile`` keeps it whole, and dispatch modes see it.
The semantics are those of `warpstep.functional`; every list is declared as written to.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from warpstep import batching, functional
from warpstep.lists import Options, adam_lists

OPERATORS = ("adamw_", "adam_")
KEYS = ("CPU", "CUDA", "XPU")

_SCHEMA = (
    "{name}{overload}(Tensor(a!)[] params, Tensor(b!)[] grads, Tensor(c!)[] exp_avgs, "
    "Tensor(d!)[] exp_avg_sqs, Tensor(e!)[] max_exp_avg_sqs, Tensor(f!)[] state_steps, *, "
    "{lr} lr, float beta1, float beta2, float weight_decay, float eps, bool amsgrad=False, "
    "bool maximize=False, Tensor? grad_scale=None, Tensor? found_inf=None, "
    "bool advance_steps=True, bool unscale_grads=False) -> ()"
)

_library = torch.library.Library("warpstep", "DEF")


def _implementation(coupled: bool) -> Callable[..., None]:
    def step_(
        params: list[Tensor],
        grads: list[Tensor],
        exp_avgs: list[Tensor],
        exp_avg_sqs: list[Tensor],
        max_exp_avg_sqs: list[Tensor],
        state_steps: list[Tensor],
        *,
        lr: float | Tensor,
        beta1: float,
        beta2: float,
        weight_decay: float,
        eps: float,
        amsgrad: bool = False,
        maximize: bool = False,
        grad_scale: Tensor | None = None,
        found_inf: Tensor | None = None,
        advance_steps: bool = True,
        unscale_grads: bool = False,
    ) -> None:
        options = Options(
            lr=lr,
            numbers=(weight_decay, beta1, beta2, eps),
            maximize=maximize,
            coupled=coupled,
            grad_scale=grad_scale,
            found_inf=found_inf,
            advance_steps=advance_steps,
            unscale_grads=unscale_grads,
        )
        tensors = (params, grads, exp_avgs, exp_avg_sqs, max_exp_avg_sqs, state_steps)
        functional.run(adam_lists(tensors, amsgrad), options, dispatched=True)

    return step_


def _fake(*_lists: Any, **_options: Any) -> None:
    """Shapes and dtypes stay as they are, and nothing is returned."""


def _register() -> None:
    for name in OPERATORS:
        implementation = _implementation(coupled=name == "adam_")
        for overload, lr in (("", "float"), (".tensor_lr", "Tensor")):
            schema = _SCHEMA.format(name=name, overload=overload, lr=lr)
            _library.define(schema, tags=(torch.Tag.pt2_compliant_tag,))
            for key in KEYS:
                _library.impl(name + overload, implementation, key)
            torch.library.register_fake(f"warpstep::{name}{overload}", _fake, lib=_library)
            operator = getattr(getattr(torch.ops.warpstep, name), overload[1:] or "default")
            vmapped = batching.rule(operator)
            _library.impl(name + overload, vmapped, "FuncTorchBatched", with_keyset=True)


def _describe() -> None:
    """Gives operators and overloads the docstrings of the functions, with what is other here."""
    for name in OPERATORS:
        operator = getattr(torch.ops.warpstep, name)
        text = f"``warpstep.functional.{name}`` as an operator of torch, without ``backend``.\n\n"
        text += inspect.cleandoc(getattr(functional, name).__doc__ or "")
        for described in (operator, *(getattr(operator, key) for key in operator.overloads())):
            described.__doc__ = text


_register()
_describe()
