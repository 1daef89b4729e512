"""Precision: the dtypes in which an optimizer keeps what it keeps, and how they are rounded."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any, Literal, get_args

import torch
from torch import Tensor

from warpstep.codecs import BLOCK
from warpstep.recipes import (
    BFLOAT16_STOCHASTIC,
    E4M3,
    FORMATS,
    UE5M3,
    AnyFormat,
    dtype_name,
    is_codes,
    one_of,
    real_dtype,
)
from warpstep.rules import Rule
from warpstep.shards import layout_of

StateDtype = torch.dtype | tuple[torch.dtype, torch.dtype] | Literal["8bit"]
Rounding = Literal["nearest", "stochastic"]
Master = Literal["residual"]
Copies = Mapping[Tensor, Tensor] | Iterable[Tensor]

# A parameter has 8-bit moments from so many elements on; flat, from so many.
_LEAST, _LEAST_FLAT = 4096, 65536


def check_seed(seed: int) -> None:
    """Raises TypeError or ValueError for what is no seed of random bits."""
    if isinstance(seed, bool) or not isinstance(seed, int):
        raise TypeError(f"seed should be an integer, but got {seed!r}")
    if not 0 <= seed < 2**64:
        raise ValueError(f"Invalid seed: {seed} is not in [0, 2**64)")


@dataclass(frozen=True)
class Precision:
    """What an optimizer asks of the precision of its states.

    Attributes:
        state_dtype: of new moments, or of the first and the others; None for each parameter's own.
        ema_dtype: of new averages of 16-bit parameters.
        rounding: how what is stored in bfloat16 is rounded; None for what is right.
        seed: of the random bits that ``stochastic`` rounds by.
    """

    state_dtype: StateDtype | None = None
    ema_dtype: torch.dtype | None = None
    rounding: Rounding | None = None
    seed: int = 0

    @property
    def is_of_dtypes(self) -> bool:
        """Whether dtypes alone tell how everything is stored: nothing is rounded at random."""
        return self.rounding is None and (
            self.state_dtype is None
            or (isinstance(self.state_dtype, torch.dtype) and self.state_dtype != torch.bfloat16)
        )

    def check(self) -> None:
        """Raises ValueError or TypeError for what is no choice."""
        dtypes = self.state_dtype if isinstance(self.state_dtype, tuple) else (self.state_dtype,)
        is_pair = not isinstance(self.state_dtype, tuple) or len(dtypes) == 2
        if not is_pair or any(d not in (*FORMATS, None, "8bit") for d in dtypes):
            raise ValueError(
                f"Invalid state_dtype: {self.state_dtype!r}. Choose {one_of((*FORMATS, '8bit'))}, "
                "or a pair of dtypes, of exp_avg and of exp_avg_sq."
            )
        if isinstance(self.state_dtype, tuple) and any(d not in FORMATS for d in dtypes):
            raise ValueError(
                f"Invalid state_dtype: {self.state_dtype!r}. A pair is of {one_of(FORMATS)}; "
                "'8bit' is for both."
            )
        if self.ema_dtype is not None and self.ema_dtype not in FORMATS:
            raise ValueError(f"Invalid ema_dtype: {self.ema_dtype}. Choose {one_of(FORMATS)}.")
        if self.rounding not in (None, *get_args(Rounding)):
            raise ValueError(
                f"Invalid rounding: {self.rounding!r}. Choose {one_of(get_args(Rounding))}, or "
                "None for what is right for the recipe."
            )
        check_seed(self.seed)

    def loaded_dtype(self, which: int) -> torch.dtype | None:
        """The dtype of a moment that is loaded; None for its own."""
        wanted = self.state_dtype[min(which, 1)] if isinstance(self.state_dtype, tuple) else None
        return self.state_dtype if isinstance(self.state_dtype, torch.dtype) else wanted

    def moment_dtype(self, param: Tensor, which: int, has_master: bool) -> torch.dtype:
        """The dtype of a new moment of ``param``, its first (0) or a later one; uint8 for codes.

        Complex parameters have complex moments. With a master, moments are float32 by default.
        """
        if param.is_complex():
            return param.dtype
        wanted = self.state_dtype
        if wanted is None:
            return torch.float32 if has_master else param.dtype
        if isinstance(wanted, tuple):
            return wanted[min(which, 1)]
        if isinstance(wanted, torch.dtype):
            return wanted
        if param.dtype == torch.float64 or param.numel() < _LEAST:
            return param.dtype if param.dtype == torch.float64 else torch.float32
        return torch.uint8 if divides_into_blocks(param) else torch.bfloat16

    def counts_steps(self, rule: Rule, group: dict[str, Any]) -> bool:
        """Whether a group's parameters have step counters: random bits depend on them."""
        return rule.counts_steps(group) or self.rounding == "stochastic"

    def format_of_param(self, param: Tensor, has_master: bool) -> AnyFormat:
        """How a parameter is stored."""
        dtype = real_dtype(param.dtype)
        stochastic = self.rounding == "stochastic" and not has_master
        return BFLOAT16_STOCHASTIC if stochastic and dtype == torch.bfloat16 else dtype

    def format_of_moment(self, rule: Rule, key: str, moment_dtype: torch.dtype) -> AnyFormat:
        """How a moment is stored, by its dtype.

        exp_avg_sq in bfloat16 is rounded at random where bfloat16 was asked for: to nearest it
        cannot decay by 0.1%. Where it is bfloat16 because the parameter is, it is torch's.
        """
        dtype = real_dtype(moment_dtype)
        if is_codes(dtype):
            return UE5M3 if key in rule.squares else E4M3
        asked = self.rounding == "stochastic" or (
            self.rounding is None and self.state_dtype is not None
        )
        stochastic = asked and key in rule.squares and dtype == torch.bfloat16
        return BFLOAT16_STOCHASTIC if stochastic else dtype


def divides_into_blocks(param: Tensor) -> bool:
    """Whether blocks of 64 elements straddle no shard, however a parameter is sharded by its rows.

    Rows are what the first dimension counts. A flat parameter has rows of one element: it is taken
    for a buffer that whoever made it has cut, and is divided from 65,536 elements on. Decided by
    the whole parameter, never by a shard of it, so that every sharding has the same precision; only
    shards by another dimension have none.
    """
    layout = layout_of(param)
    if layout is not None and (
        param.dim() == 1 or any(p.is_shard() and p.dim != 0 for p in layout[1])
    ):
        return False
    if param.dim() < 2:
        return param.numel() >= _LEAST_FLAT
    return param.numel() // max(param.shape[0], 1) % BLOCK == 0


def check_master(master: Any, where: str) -> None:
    """Raises ValueError for a ``master`` of a group that is no choice."""
    if master not in (None, *get_args(Master)):
        raise ValueError(f"Invalid master: {master!r}{where}. Choose 'residual', or None.")


def check_has_master(name: str, param: Tensor) -> None:
    """Raises TypeError for a parameter that cannot have a residual."""
    if param.dtype == torch.bfloat16:
        return
    if param.dtype in (torch.float32, torch.float64):
        why = "it needs no master: its own precision is kept"
    elif param.dtype == torch.float16:
        why = (
            "a float16 has a smaller range than float32, so that 16 more bits do not make every "
            "float32 of it: use bfloat16"
        )
    else:
        why = "only real parameters have one"
    raise TypeError(
        f"{name} is {dtype_name(param.dtype)}: master='residual' is for bfloat16 parameters; {why}"
        ". Or put it in a parameter group of its own with 'master': None."
    )


def paired_copies(groups: list[dict[str, Any]], copies: Copies) -> dict[Tensor, Tensor]:
    """The copies by parameter. Raises where they are no tensors, or of other parameters."""
    if not isinstance(copies, Iterable) or isinstance(copies, Tensor):
        raise TypeError(
            f"copies is of type {type(copies).__name__}, expected a list of tensors, one for each "
            "parameter, or a dict of those parameters that have one"
        )
    params = [p for group in groups for p in group["params"]]
    if isinstance(copies, Mapping):
        found = dict(copies)
        known = set(params)
        for param in found:
            if param not in known:
                raise ValueError("copies has a key that is no parameter of this optimizer")
    else:
        given = list(copies)
        if len(given) != len(params):
            raise ValueError(
                f"copies has {len(given)} tensors, and there are {len(params)} parameters: give "
                "one for each, in their order, or a dict of those that have one"
            )
        found = dict(zip(params, given, strict=True))
    for index, copy in enumerate(found.values()):
        if not isinstance(copy, Tensor):
            raise TypeError(f"copy {index} of copies is {copy!r}, expected a tensor")
    return found
