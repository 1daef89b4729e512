"""Memory for a parameter's state, where it is made or loaded.

NOTE [distances between operands]
A step reads an element of each operand, one operand after the other, so their lines must find
room in the L1 cache side by side. AMD's processors find a line by a hash of its virtual address,
in which bit 12 is combined with bit 27, 13 with 26, and so on (Lipp et al., "Take A Way", 2020):
of two lines of one set that have the same hash only one can be there. Large tensors are mapped
one after another, each with a page of the allocator's. Tensors of 2^27 bytes are then 2^27 + 2^12
bytes apart, which is such a distance, and operands push one another out at every element: all-
bfloat16 AdamW of 2^26 elements took 0.88 ns an element and thread, and takes 0.52 where they do
not (an EPYC 9004). So a large tensor gets some more pages. With those of the allocator their
number has two bits or more, which the one bit of a tensor's own size seldom cancels.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from warpstep import modes

# From here on the C library maps each tensor by itself, whatever was freed before.
_LARGE = 2**25
_MORE = 5 * 4096


def new_zeros(param: Tensor, dtype: torch.dtype) -> Tensor:
    """Zeros of ``dtype``, laid out and sharded as ``param``, on its device."""
    if param.is_cpu and _is_large(param, dtype):
        return _with_more(torch.zeros, param, dtype)
    return torch.zeros_like(param, dtype=dtype, requires_grad=False)


def new_copy(tensor: Tensor, device: torch.device, dtype: torch.dtype) -> Tensor:
    """A copy of ``tensor`` on ``device`` and in ``dtype``, laid out and sharded as it is."""
    tensor = tensor.detach()
    if device.type == "cpu" and _is_large(tensor, dtype):
        return _with_more(torch.empty, tensor, dtype).copy_(tensor)
    return tensor.to(device, dtype, copy=True)


def _is_large(like: Tensor, dtype: torch.dtype) -> bool:
    """Whether it is, and has memory of its own: what a transform or a mode stands for has none."""
    is_large = like.numel() * dtype.itemsize >= _LARGE
    return is_large and type(like) in (Tensor, torch.nn.Parameter) and not modes.are_active()


def _with_more(make: Callable[..., Tensor], like: Tensor, dtype: torch.dtype) -> Tensor:
    laid_out = torch.empty_like(like, device="meta")  # for the strides
    size = like.numel() * dtype.itemsize + _MORE
    memory = make(size, dtype=torch.uint8, device="cpu").untyped_storage()
    new = torch.empty(0, dtype=dtype, device="cpu")
    return new.set_(memory, 0, laid_out.shape, laid_out.stride())
