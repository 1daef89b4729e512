"""The Triton kernel of the gradients' norm: every gradient of a recipe read once, in one launch."""

import triton
import triton.language as tl

from .arithmetic import device_function, maximum
from .formats import load, pointers
from .layout import CHUNK_HALVES, CHUNK_INDEX, CHUNK_TENSOR, NUMEL, ROW_WORDS

# Shares that a thread of the last program asks for before it waits, for each element that it takes
# at a time: alone on the device, that program has nothing else to hide memory's latency behind.
LAST = tl.constexpr(4)


@device_function
def largest_of(x):
    """The largest of float64 magnitudes, NaN if any is: their bits are in the same order."""
    return tl.max(x.to(tl.int64, bitcast=True), 0).to(tl.float64, bitcast=True)


@triton.jit(do_not_specialize=["chunk_size"], do_not_specialize_on_alignment=["out"])
def grad_norm_kernel(
    rows,  # as step_kernel's
    chunks,
    grads,
    out,  # float64[2 + programs]: the result, a count of programs done (zero), a share each
    chunk_size,
    FORMAT: tl.constexpr,
    LARGEST: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """The sum of squares, or the largest magnitude, of all gradients; the same bits each time."""
    program = tl.program_id(0)
    chunk = chunks + CHUNK_HALVES * program
    tensor = tl.load(chunk + CHUNK_TENSOR)
    grad = tl.load(grads + tensor)
    first = tl.load(chunk + CHUNK_INDEX).to(tl.int64) * chunk_size
    size = tl.minimum(tl.load(rows + tensor * ROW_WORDS + NUMEL) - first, chunk_size).to(tl.int32)
    size = tl.where(grad == 0, 0, size)
    share = tl.full((), 0, tl.float64)
    start = tl.cast(0, tl.int32)
    while start < size:
        offsets = start + tl.arange(0, BLOCK)
        mask = offsets < size
        x = load(pointers(grad, first, offsets, FORMAT, False), mask, tl.float64)
        x = tl.where(mask, x, 0.0)
        if LARGEST:
            share = maximum(share, largest_of(tl.abs(x)))
        else:
            share += tl.sum(x * x, 0)
        start += BLOCK
    tl.store(out + 2 + program, share)
    tl.debug_barrier()
    done = tl.atomic_add((out + 1).to(tl.pointer_type(tl.int32)), 1, sem="acq_rel")
    programs = tl.num_programs(0)
    if done == programs - 1:
        total = tl.full((), 0, tl.float64)
        start = tl.cast(0, tl.int32)
        while start < programs:
            offsets = start + tl.arange(0, LAST * BLOCK)
            mask = offsets < programs
            shares = tl.load(out + 2 + offsets, mask=mask, other=0.0, volatile=True)
            if LARGEST:
                total = maximum(total, largest_of(shares))
            else:
                total += tl.sum(shares, 0)
            start += LAST * BLOCK
        tl.store(out, total)
