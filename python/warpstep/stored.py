"""What a state stores in more than a dtype, as numbers and back: see kernels/blocks.h."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from warpstep.codecs import decoded, draws, encoded, rounded_stochastic
from warpstep.precision import Precision
from warpstep.recipes import BFLOAT16_STOCHASTIC, E4M3, UE5M3, AnyFormat, real_dtype, scale_of
from warpstep.shards import own_part


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


def decode_from(state: dict[str, Any], key: str, *, squares: bool) -> Tensor:
    """The numbers of an 8-bit moment, or of this process's shard of it."""
    codes, scales = own_part(state[key]), own_part(state[scale_of(key)])
    flat = codes.as_strided((codes.numel(),), (1,), codes.storage_offset())
    return shaped_as(codes, decoded(flat, scales.flatten(), signed=not squares))


def encode_into(state: dict[str, Any], key: str, numbers: Tensor, *, squares: bool) -> None:
    """Writes numbers into an 8-bit moment, or this process's shard. Not at a step: by no seed."""
    codes, scales = own_part(state[key]), own_part(state[scale_of(key)])
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
        self, state: dict[str, Tensor], key: str, numbers: Tensor, one: AnyFormat, operand: int
    ) -> dict[str, Tensor]:
        """What is stored of a moment: itself, or codes and scales."""
        tensor = state[key]
        if one not in (E4M3, UE5M3):
            return {key: self.rounded(tensor, numbers, one, operand)}
        random = self._random(tensor, operand) if one == UE5M3 else None
        codes, scales = encoded(flat_as(tensor, numbers), random=random)
        return {
            key: shaped_as(tensor, codes),
            scale_of(key): scales.view(state[scale_of(key)].shape),
        }


def numbers_of(state: dict[str, Tensor], key: str, *, squares: bool) -> Tensor:
    """The numbers of a moment; of an 8-bit one, decoded."""
    if state[key].dtype == torch.uint8:
        return decode_from(state, key, squares=squares)
    return real_view(state[key].detach())
