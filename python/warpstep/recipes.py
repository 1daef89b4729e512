"""Recipes: a rule and the dtypes of a parameter's operands, which decide the kernel."""

from __future__ import annotations

from typing import NamedTuple

import torch

from warpstep.codecs import BLOCK
from warpstep.rules import RULES

_REAL_OF_COMPLEX = {
    torch.complex32: torch.float16,
    torch.complex64: torch.float32,
    torch.complex128: torch.float64,
}
FORMATS = (torch.float64, torch.float32, torch.bfloat16, torch.float16)
MOMENTS = 3  # that a rule has at most: as many operands there are between `param` and `ema`


class Format(NamedTuple):
    """A way to store numbers that a dtype alone does not tell (kernels/blocks.h)."""

    name: str  # in kernels/layout.h
    dtype: torch.dtype  # of the memory


BFLOAT16_STOCHASTIC = Format("bfloat16_stochastic", torch.bfloat16)  # rounded at random
E4M3 = Format("e4m3", torch.uint8)  # in blocks with scales
UE5M3 = Format("ue5m3", torch.uint8)
AnyFormat = torch.dtype | Format


class Recipe(NamedTuple):
    """A rule, and the formats of what it works on: dtypes, complex ones as their real part's.

    ``ema`` is that of the parameter's average, or None where none is kept; ``copy`` that of a copy
    of the parameter. With ``has_master`` the parameter has a residual in its state; with
    ``is_in_state`` what is stepped is a master there, and its copy the optimizer's parameter.
    """

    rule: str
    param: AnyFormat
    grad: torch.dtype
    moments: tuple[AnyFormat, ...]
    ema: torch.dtype | None = None
    counts_steps: bool = True
    has_master: bool = False
    copy: torch.dtype | None = None
    is_in_state: bool = False

    @property
    def is_plain(self) -> bool:
        """Whether it is made of dtypes alone."""
        formats = (self.param, *self.moments)
        return not (self.has_master or self.copy or any(isinstance(f, Format) for f in formats))

    @property
    def state_bytes(self) -> float:
        """Bytes of state an element, without its step counter."""
        each = [f.dtype if isinstance(f, Format) else f for f in self.moments]
        each += [f for f in (self.ema, torch.int16 if self.has_master else None) if f is not None]
        each += [self.param] if self.is_in_state and isinstance(self.param, torch.dtype) else []
        return sum(dtype.itemsize for dtype in each) + sum(map(is_codes, self.moments)) / BLOCK

    def formats(self) -> tuple[str | None, ...]:
        """The name of each operand's format, in the order of ``Operand`` in kernels/layout.h."""
        none = (None,) * (MOMENTS - len(self.moments))
        scales = tuple("uint8" if is_codes(f) else None for f in self.moments)
        residual = "int16" if self.has_master else None
        moments = tuple(format_name(f) for f in self.moments)
        ema, copy = (None if f is None else dtype_name(f) for f in (self.ema, self.copy))
        of_param = (residual, ema, copy)
        return (
            format_name(self.param),
            *(*moments, *none),
            *(*scales, *none),
            *of_param,
            dtype_name(self.grad),
        )

    def keys(self) -> tuple[str | None, ...]:
        """What a state calls each operand, in that order; None for what is not in it."""
        moments = RULES[self.rule].moments[: len(self.moments)]
        none = (None,) * (MOMENTS - len(moments))
        param = RESIDUAL if self.is_in_state else None
        keys = (*map(moment_key, moments, self.moments), *none, *map(scale_of, moments), *none)
        names = (param, *keys, RESIDUAL, "ema", None, None)
        return tuple(
            None if found is None else name
            for name, found in zip(names, self.formats(), strict=True)
        )

    @property
    def in_words(self) -> str:
        """The formats, without what they cost."""
        param, grad = format_name(self.param), dtype_name(self.grad)
        param += " with a residual" if self.has_master else ""
        moments = list(dict.fromkeys(format_name(f) for f in self.moments))
        text = param
        if {param, grad, *moments} != {param}:
            of_moments = f", {' and '.join(moments)} moments" if moments else ""
            text = f"{param}, {grad} gradients{of_moments}"
        optional = RULES[self.rule].optional
        for key in RULES[self.rule].moments[: len(self.moments)]:
            text += f", {optional[key]}" if key in optional else ""
        text += f", {dtype_name(self.ema)} average" if self.ema is not None else ""
        text += f", {dtype_name(self.copy)} copy" if self.copy is not None else ""
        return text

    def __str__(self) -> str:
        return f"{self.in_words}: {self.state_bytes:.3g} bytes of state an element"


# What a state calls a parameter's residual, or its float32 master: Transformer Engine's name.
RESIDUAL = "master_param"


def is_codes(stored: AnyFormat) -> bool:
    """Whether a format, or the dtype of its memory, is of 8-bit codes in blocks with scales."""
    return (stored.dtype if isinstance(stored, Format) else stored) == torch.uint8


def moment_key(moment: str, stored: AnyFormat) -> str:
    """What a state calls a moment that is stored in a format, or in its dtype.

    Codes have a name of their own: who knows the moment's finds nothing, and takes no codes for
    numbers (docs/design.md, NOTE [keys of codes]).
    """
    return codes_of(moment) if is_codes(stored) else moment


def codes_of(moment: str) -> str:
    """What a state calls the codes of an 8-bit moment."""
    return f"{moment}_codes"


def scale_of(moment: str) -> str:
    """What a state calls the scales of its blocks."""
    return f"{moment}_scale"


def one_of(choices: tuple[object, ...]) -> str:
    """``one of 'a', 'b' and 'c'``, for messages."""
    *most, last = map(repr, choices)
    return f"one of {', '.join(most)} and {last}"


def dtype_name(dtype: torch.dtype) -> str:
    """``torch.float32`` -> ``"float32"``."""
    return str(dtype).removeprefix("torch.")


def format_name(any_format: AnyFormat) -> str:
    """The name that kernels have for a format."""
    return any_format.name if isinstance(any_format, Format) else dtype_name(any_format)


def real_dtype(dtype: torch.dtype) -> torch.dtype:
    """The dtype of the numbers that a tensor is made of: its own, or its real part's."""
    return _REAL_OF_COMPLEX.get(dtype, dtype)


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
