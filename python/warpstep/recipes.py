"""Recipes: a rule and the dtypes of a parameter's operands, which decide the kernel."""

from __future__ import annotations

from typing import NamedTuple

import torch

from warpstep.rules import RULES

_REAL_OF_COMPLEX = {
    torch.complex32: torch.float16,
    torch.complex64: torch.float32,
    torch.complex128: torch.float64,
}
FORMATS = (torch.float64, torch.float32, torch.bfloat16, torch.float16)
MOMENTS = 3  # that a rule has at most: as many operands there are between `param` and `ema`


class Recipe(NamedTuple):
    """A rule, and the dtypes of what it works on, complex ones as their real part's.

    ``ema`` is the dtype of the parameter's average, or None where none is kept.
    """

    rule: str
    param: torch.dtype
    grad: torch.dtype
    moments: tuple[torch.dtype, ...]
    ema: torch.dtype | None = None
    counts_steps: bool = True

    def formats(self) -> tuple[str | None, ...]:
        """The name of each operand's format, in the order of ``Operand`` in kernels/layout.h."""
        none = (None,) * (MOMENTS - len(self.moments))
        dtypes = (self.param, *self.moments, *none, self.ema, self.grad)
        return tuple(None if dtype is None else dtype_name(dtype) for dtype in dtypes)

    def keys(self) -> tuple[str | None, ...]:
        """What a state calls each operand, in that order; None for what is not in it."""
        none = (None,) * (MOMENTS - len(self.moments))
        ema = None if self.ema is None else "ema"
        return (None, *RULES[self.rule].moments[: len(self.moments)], *none, ema, None)

    def __str__(self) -> str:
        param, grad = dtype_name(self.param), dtype_name(self.grad)
        moments = sorted({dtype_name(dtype) for dtype in self.moments})
        text = param
        if {param, grad, *moments} != {param}:
            of_moments = f", {' and '.join(moments)} moments" if moments else ""
            text = f"{param}, {grad} gradients{of_moments}"
        optional = RULES[self.rule].optional
        for key in RULES[self.rule].moments[: len(self.moments)]:
            text += f", {optional[key]}" if key in optional else ""
        return text + (f", {dtype_name(self.ema)} average" if self.ema is not None else "")


def one_of(choices: tuple[object, ...]) -> str:
    """``one of 'a', 'b' and 'c'``, for messages."""
    *most, last = map(repr, choices)
    return f"one of {', '.join(most)} and {last}"


def dtype_name(dtype: torch.dtype) -> str:
    """``torch.float32`` -> ``"float32"``."""
    return str(dtype).removeprefix("torch.")


def real_dtype(dtype: torch.dtype) -> torch.dtype:
    """The dtype of the numbers that a tensor is made of: its own, or its real part's."""
    return _REAL_OF_COMPLEX.get(dtype, dtype)


def moment_dtype(param: torch.Tensor, state_dtype: torch.dtype | None) -> torch.dtype:
    """The dtype of a new moment of ``param``; complex parameters have complex moments."""
    if state_dtype is None or param.is_complex():
        return param.dtype
    return state_dtype


def ema_dtypes(param: torch.Tensor) -> tuple[torch.dtype, ...]:
    """The dtypes that kernels can keep an average of ``param`` in."""
    if param.dtype in (torch.bfloat16, torch.float16):
        return (param.dtype, torch.float32)
    return (param.dtype,)


def ema_dtype(param: torch.Tensor, wanted: torch.dtype | None) -> torch.dtype:
    """The dtype of a new average of ``param``: ``wanted``, by default the widest there is.

    An average has at least the parameter's precision, so what is wanted counts for 16-bit ones.
    """
    allowed = ema_dtypes(param)
    return wanted if wanted in allowed else allowed[-1]
