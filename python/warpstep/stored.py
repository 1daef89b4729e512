"""What a state stores in more than a dtype, as numbers and back: see kernels/blocks.h."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from warpstep.allocation import new_zeros
from warpstep.codecs import BLOCK, decoded, draws, encoded, rounded_stochastic
from warpstep.precision import Precision
from warpstep.recipes import (
    BFLOAT16_STOCHASTIC,
    UE5M3,
    AnyFormat,
    codes_of,
    is_codes,
    moment_key,
    real_dtype,
    scale_of,
)
from warpstep.shards import like_shards, own_part


def real_view(tensor: Tensor) -> Tensor:
    """The numbers that a tensor is made of, complex ones as pairs. A copy where it is lazy."""
    tensor = tensor.resolve_conj().resolve_neg()  # themselves, but for lazily conjugated gradients
    return torch.view_as_real(tensor) if tensor.is_complex() else tensor


def flat_as(stored: Tensor, numbers: Tensor) -> Tensor:
    """``numbers`` in a row, in the order in which ``stored`` has them in memory.

    In the order of their indices where there are gaps, for which no kernel has an order.
    """
    laid_out = torch.empty_like(stored, dtype=numbers.dtype, device=numbers.device)
    return laid_out.copy_(numbers).as_strided((stored.numel(),), (1,))


def shaped_as(stored: Tensor, flat: Tensor) -> Tensor:
    """The other way: numbers in a row, in the shape and the order of ``stored``."""
    return flat.as_strided(stored.shape, torch.empty_like(stored, device="meta").stride())


def has_codes(state: Mapping[str, Any], moment: str) -> bool:
    """Whether a state has a moment in 8 bits."""
    return state.get(codes_of(moment)) is not None


def key_in(state: Mapping[str, Any], moment: str) -> str:
    """What a state calls a moment, by what it has of it: codes or numbers."""
    return codes_of(moment) if has_codes(state, moment) else moment


def moments_in(state: Mapping[str, Any], moments: Iterable[str]) -> dict[str, Any]:
    """What a state has of each of the moments, codes or numbers; None where it lacks it."""
    return {moment: state.get(key_in(state, moment)) for moment in moments}


def can_be_8bit(param: Tensor) -> bool:
    """Whether there are 8-bit moments of such a parameter."""
    return param.is_floating_point() and param.dtype != torch.float64


def new_moment(param: Tensor, moment: str, dtype: torch.dtype) -> dict[str, Any]:
    """What a state has of a moment of zeros; of an 8-bit one with the scales."""
    new: dict[str, Any] = {moment_key(moment, dtype): new_zeros(param, dtype)}
    if is_codes(dtype):
        part, shape = own_part(param), scales_shape(param)
        of_part = (part.shape[0], *shape[1:]) if len(shape) > 1 else scales_shape(part)
        scales = torch.zeros(of_part, dtype=torch.uint8, device=part.device)
        new[scale_of(moment)] = like_shards(param, scales, shape)
    return new


def scales_shape(param: Tensor) -> tuple[int, ...]:
    """The shape of an 8-bit moment's scales: sharded by rows as the parameter is."""
    blocks = -(-param.numel() // BLOCK)
    if param.dim() < 2:
        return (blocks,)
    rows = param.shape[0]
    divides = rows > 0 and param.numel() // rows % BLOCK == 0
    return (rows, blocks // rows) if divides else (blocks,)


def decode_from(state: Mapping[str, Any], moment: str, *, squares: bool) -> Tensor:
    """The numbers of an 8-bit moment, or of this process's shard of it."""
    codes, scales = own_part(state[codes_of(moment)]), own_part(state[scale_of(moment)])
    flat = codes.as_strided((codes.numel(),), (1,), codes.storage_offset())
    return shaped_as(codes, decoded(flat, scales.flatten(), signed=not squares))


def encode_into(state: dict[str, Any], moment: str, numbers: Tensor, *, squares: bool) -> None:
    """Writes numbers into an 8-bit moment, or this process's shard. Not at a step: by no seed."""
    codes, scales = own_part(state[codes_of(moment)]), own_part(state[scale_of(moment)])
    flat = flat_as(codes, numbers.to(torch.float32))
    # The middle of what random bits there are: to nearest.
    middle = torch.full(flat.shape, 0x8000, dtype=torch.int32, device=flat.device)
    new_codes, new_scales = encoded(flat, random=middle if squares else None)
    codes.copy_(shaped_as(codes, new_codes))
    scales.copy_(new_scales.view(scales.shape))


@dataclass(frozen=True)
class Stored:
    """How a parameter and its state are stored, beyond dtypes; and what its random bits are of."""

    precision: Precision = field(default_factory=Precision)
    number: int = 0  # of the parameter among the optimizer's
    first: int = 0  # where its first element is in the whole tensor, if it is a shard
    copy: Tensor | None = None  # gets the parameter's value


@dataclass(frozen=True)
class Encoder:
    """Makes what is stored from numbers. ``step`` is the counter after the step."""

    of: Stored
    step: Tensor | None

    def _random(self, tensor: Tensor, operand: int) -> Tensor:
        assert self.step is not None
        step = self.step.to(tensor.device, torch.float32).reshape(())
        numbers = (self.of.number, operand, self.of.first, tensor.numel())
        return draws(self.of.precision.seed, step, *numbers)

    def rounded(self, tensor: Tensor, numbers: Tensor, one: AnyFormat, operand: int) -> Tensor:
        """Numbers as ``tensor`` has them, rounded."""
        if one != BFLOAT16_STOCHASTIC:
            return numbers.to(real_dtype(tensor.dtype))
        flat = flat_as(tensor, numbers.to(torch.float32))
        flat = rounded_stochastic(flat, self._random(tensor, operand))
        return shaped_as(tensor, flat)

    def stored_moment(
        self, state: dict[str, Tensor], moment: str, numbers: Tensor, one: AnyFormat, operand: int
    ) -> dict[str, Tensor]:
        """What is stored of a moment: itself, or codes and scales."""
        key, scale = moment_key(moment, one), scale_of(moment)
        tensor = state[key]
        if not is_codes(one):
            return {key: self.rounded(tensor, numbers, one, operand)}
        random = self._random(tensor, operand) if one == UE5M3 else None
        codes, scales = encoded(flat_as(tensor, numbers), random=random)
        return {key: shaped_as(tensor, codes), scale: scales.view(state[scale].shape)}


def numbers_of(state: dict[str, Tensor], moment: str, *, squares: bool) -> Tensor:
    """The numbers of a moment; of an 8-bit one, decoded."""
    if has_codes(state, moment):
        return decode_from(state, moment, squares=squares)
    return real_view(state[moment].detach())
