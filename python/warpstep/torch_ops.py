"""``torch.ops.warpstep``: the functional steps as operators of torch.

For libraries that need an operator: ``torch.compile`` keeps it whole, and dispatch modes see it.
The semantics are those of `warpstep.functional`; every list is declared as written to.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from warpstep import batching, functional, list_steps
from warpstep.lists import DEFAULTS, OPERATORS, Operator, list_names

KEYS = ("CPU", "CUDA", "XPU")

_library = torch.library.Library("warpstep", "DEF")


def _schema(operator: Operator, overload: str, lr: str) -> str:
    """Every list is declared as written to."""
    lists = (f"Tensor({chr(97 + i)}!)[] {n}" for i, n in enumerate(list_names(operator.rule)))
    numbers = operator.numbers.items()
    own = [f"float {name}" for name, is_flag in numbers if not is_flag]
    own += [f"bool {name}=False" for name in operator.flags]
    return (
        f"{operator.name}{overload}({', '.join(lists)}, *, {lr} lr, {', '.join(own)}, "
        "bool maximize=False, Tensor? grad_scale=None, Tensor? found_inf=None, "
        "bool advance_steps=True, bool unscale_grads=False) -> ()"
    )


def _implementation(operator: Operator) -> Callable[..., None]:
    def step_(*tensors: list[Tensor], **given: Any) -> None:
        # torch leaves out what is as by default.
        defaults = dict.fromkeys(operator.flags, False) | DEFAULTS
        list_steps.run(*operator.bound(tensors, defaults | given), dispatched=True)

    return step_


def _fake(*_lists: Any, **_options: Any) -> None:
    """Shapes and dtypes stay as they are, and nothing is returned."""


def _register() -> None:
    for name, of_lists in OPERATORS.items():
        implementation = _implementation(of_lists)
        for overload, lr in (("", "float"), (".tensor_lr", "Tensor")):
            schema = _schema(of_lists, overload, lr)
            _library.define(schema, tags=(torch.Tag.pt2_compliant_tag,))
            for key in KEYS:
                _library.impl(name + overload, implementation, key)
            torch.library.register_fake(f"warpstep::{name}{overload}", _fake, lib=_library)
            operator = getattr(getattr(torch.ops.warpstep, name), overload[1:] or "default")
            vmapped = batching.rule(operator, of_lists)
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
