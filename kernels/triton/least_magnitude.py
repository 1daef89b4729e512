"""The Triton kernel that finds the smallest magnitude of each tensor, for decay min."""

import triton
import triton.language as tl

from .arithmetic import device_function, minimum
from .decay import hyper_at, needs_least
from .formats import load, pointers
from .layout import (
    CHUNK_HALVES,
    CHUNK_INDEX,
    CHUNK_TENSOR,
    GROUP_AND_CHUNKS,
    HYPER_WORDS,
    NUMEL,
    PARAM,
    ROW_WORDS,
    UPPER,
)


@device_function
def smallest_of(x):
    """The smallest of float64 magnitudes, NaN if any is: their bits are in the same order."""
    bits = tl.where(x != x, -1, x.to(tl.int64, bitcast=True))  # of a NaN, and below all others
    return tl.min(bits, 0).to(tl.float64, bitcast=True)


@triton.jit(do_not_specialize=["chunk_size"], do_not_specialize_on_alignment=["least", "shares"])
def least_magnitude_kernel(
    rows,  # as step_kernel's
    chunks,
    arrivals,
    hypers,
    grads,
    least,  # float64[tensors]: the result, where a tensor has a gradient and its group needs it
    shares,  # float64[programs]: scratch
    chunk_size,
    FORMAT: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """The smallest magnitude of each tensor; the last of its programs picks it from shares."""
    program = tl.program_id(0)
    chunk = chunks + CHUNK_HALVES * program
    tensor = tl.load(chunk + CHUNK_TENSOR)
    row = rows + tensor * ROW_WORDS
    group_and_chunks = tl.load(row + GROUP_AND_CHUNKS)
    hyper = hyper_at(hypers + group_and_chunks.to(tl.uint32) * HYPER_WORDS)
    if tl.load(grads + tensor) == 0:
        return
    if needs_least(hyper) == 0:
        return

    index = tl.load(chunk + CHUNK_INDEX)
    first = index.to(tl.int64) * chunk_size
    size = tl.minimum(tl.load(row + NUMEL) - first, chunk_size).to(tl.int32)
    param = tl.load(row + PARAM)
    share = tl.full((), float("inf"), tl.float64)
    start = tl.cast(0, tl.int32)
    while start < size:
        offsets = start + tl.arange(0, BLOCK)
        mask = offsets < size
        x = tl.abs(load(pointers(param, first, offsets, FORMAT, False), mask, tl.float64))
        share = minimum(share, smallest_of(tl.where(mask, x, float("inf"))))
        start += BLOCK

    count = (group_and_chunks >> UPPER).to(tl.int32)
    if count == 1:
        tl.store(least + tensor, share)
    else:
        tl.store(shares + program, share)
        tl.debug_barrier()
        if tl.atomic_add(arrivals + tensor, 1, sem="acq_rel") == count - 1:
            tl.store(arrivals + tensor, 0)
            of_tensor = shares + (program - index)
            share = tl.full((), float("inf"), tl.float64)
            start = tl.cast(0, tl.int32)
            while start < count:
                offsets = start + tl.arange(0, BLOCK)
                mask = offsets < count
                x = tl.load(of_tensor + offsets, mask=mask, other=float("inf"), volatile=True)
                share = minimum(share, smallest_of(x))
                start += BLOCK
            tl.store(least + tensor, share)
