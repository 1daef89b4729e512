"""Recipes: the dtypes of one parameter's streams, which decide the kernel that runs it."""

from __future__ import annotations

from typing import NamedTuple

import torch

_REAL_OF_COMPLEX = {
    torch.complex32: torch.float16,
    torch.complex64: torch.float32,
    torch.complex128: torch.float64,
}
FORMATS = (torch.float64, torch.float32, torch.bfloat16, torch.float16)


class Recipe(NamedTuple):
    """The dtypes of a parameter, its gradient and its moments, complex ones as their real part's.

    ``amsgrad`` tells whether there is a ``max_exp_avg_sq``, which has the moments' dtype; ``ema``
    is the dtype of the parameter's average, or None where none is kept.
    """

    param: torch.dtype
    grad: torch.dtype
    moment: torch.dtype
    amsgrad: bool
    ema: torch.dtype | None = None

    def names(self) -> tuple[str, str, str]:
        """Names of the three dtypes, as the native module spells them."""
        return dtype_name(self.param), dtype_name(self.grad), dtype_name(self.moment)

    def __str__(self) -> str:
        param, grad, moment = self.names()
        text = param if param == grad == moment else f"{param}, {grad} gradients, {moment} moments"
        text += ", amsgrad" if self.amsgrad else ""
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
