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
from warpstep.lists import OPERATOR, OPERATORS, Operator, list_names, low_precision_names

KEYS = ("CPU", "CUDA", "XPU")

_library = torch.library.Library("warpstep", "DEF")


def _schema(operator: Operator, overload: str, lr: str) -> str:
    """Every list is declared as written to."""
    written = (f"Tensor({chr(97 + i)}!)[]" for i in range(26))
    lists = [f"{next(written)} {name}" for name in list_names(operator.rule)]
    low = [f"{next(written)}? {n}=None" for n in low_precision_names(operator.rule.moments)]
    numbers = operator.numbers.items()
    own = [f"float {name}" for name, is_flag in numbers if not is_flag]
    own += [f"bool {name}=False" for name in operator.flags]
    return (
        f"{operator.name}{overload}({', '.join(lists)}, *, {lr} lr, {', '.join(own)}, "
        "bool maximize=False, Tensor? grad_scale=None, Tensor? found_inf=None, "
        f"bool advance_steps=True, bool unscale_grads=False, {', '.join(low)}, "
        "str? rounding=None, int seed=0, int[]? param_indices=None, int[]? first_elements=None"
        ") -> ()"
    )


def _implementation(operator: Operator) -> Callable[..., None]:
    def step_(*tensors: list[Tensor], **given: Any) -> None:
        # torch leaves out what is as by default, and has no integers of 64 bits without a sign.
        given = operator.defaults | given
        given["seed"] %= 2**64
        list_steps.run(*operator.bound(tensors, given), caller=OPERATOR)

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
