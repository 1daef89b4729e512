"""What a state stores in more than a dtype, as numbers and back: see kernels/blocks.h."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from warpstep.codecs import decoded, encoded
from warpstep.recipes import scale_of
from warpstep.shards import own_part


def flat_as(stored: Tensor, numbers: Tensor) -> Tensor:
    """``numbers`` in a row, in the order in which the dense ``stored`` has them in memory."""
    laid_out = torch.empty_strided(
        stored.shape, stored.stride(), dtype=numbers.dtype, device=numbers.device
    )
    return laid_out.copy_(numbers).as_strided((stored.numel(),), (1,))


def shaped_as(stored: Tensor, flat: Tensor) -> Tensor:
    """The other way: numbers in a row, in the shape and the order of ``stored``."""
    return flat.as_strided(stored.shape, stored.stride())


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
