"""Memory for a parameter's new state.

NOTE [distances between operands]
A step reads an element of each operand, one operand after the other, so their lines must find
room in the L1 cache side by side. AMD's processors find a line by a hash of its virtual address,
in which bit 12 is combined with bit 27, 13 with 26, and so on (Lipp et al., "Take A Way", 2020):
of two lines of one set that have the same hash only one can be there. Large tensors are mapped
one after another, each with a page of the allocator's. Tensors of 2^27 bytes are then 2^27 + 2^12
bytes apart, which is such a distance, and operands push one another out at every element: all-
bfloat16 AdamW of 2^26 elements took 0.88 ns an element and thread, and takes 0.52 where they do
not (an EPYC 9004). So a large tensor gets some more pages. With those of the allocator their
number has two bits or more, so that the one bit of a tensor's own size cannot cancel it.
"""

from __future__ import annotations

import torch
from torch import Tensor

# From here on the C library maps each tensor by itself, whatever was freed before.
_LARGE = 2**25
_MORE = 5 * 4096


def new_zeros(param: Tensor, dtype: torch.dtype) -> Tensor:
    """Zeros of ``dtype``, laid out and sharded as ``param``."""
    size = param.numel() * dtype.itemsize
    if size < _LARGE or not param.is_cpu or type(param) not in (Tensor, torch.nn.Parameter):
        return torch.zeros_like(param, dtype=dtype, requires_grad=False)
    like = torch.empty_like(param, device="meta")  # for the strides
    memory = torch.zeros(size + _MORE, dtype=torch.uint8, device=param.device)
    new = torch.empty(0, dtype=dtype, device=param.device)
    return new.set_(memory.untyped_storage(), 0, like.shape, like.stride())
