"""The Triton kernel of the step: every tensor of a recipe on a device in one launch.

A program takes one chunk: it works out the constants of the chunk's tensor, then walks the elements
block by block. The constants need float64: where a device has none (some Intel GPUs) the kernel
does not compile, and another backend has to serve.
"""

from collections import namedtuple

import triton
import triton.language as tl

from .arithmetic import device_function
from .decay import hyper_at
from .formats import elements, load, numbers, pointers
from .layout import (
    CHUNK_HALVES,
    CHUNK_INDEX,
    CHUNK_TENSOR,
    CHUNKS_SHIFT,
    EMA,
    GROUP_AND_CHUNKS,
    HYPER_WORDS,
    MOMENT,
    NUMEL,
    PARAM,
    ROW_WORDS,
    STATISTICS,
    STEP,
)
from .tail import Sums, averaged, constants_of, counted, leave, leave_none, stepped, take_step

GRANULE = tl.constexpr(16)  # elements: whole 16-byte vectors in every format

# A rule's name, Triton's types of the operands and the type computed in. `moments` has as many as
# the rule, `ema` is None where no averages are kept.
Recipe = namedtuple("Recipe", "rule param grad moments ema compute")
# Addresses of a tensor's operands, and which element is the chunk's first.
Operands = namedtuple("Operands", "param grad moments ema first")


@device_function
def step_range(
    c,
    at,
    sums,
    taken,
    begin,
    end,
    BLOCK: tl.constexpr,
    RECIPE: tl.constexpr,
    TAIL: tl.constexpr,
    ALIGNED: tl.constexpr,
):
    """The step of a chunk's [begin, end). ALIGNED operands: 0 none, 1 all but grad, 2 all.

    Returns `sums` with what this range adds to them.
    """
    T: tl.constexpr = RECIPE.compute
    MOMENTS: tl.constexpr = len(RECIPE.moments)
    start = tl.cast(begin, tl.int32)
    while start < end:  # range() of a tensor fails in Triton 3.6's interpreter with NumPy 2.4
        offsets = start + tl.arange(0, BLOCK)
        mask = offsets < end
        param_at = pointers(at.param, at.first, offsets, RECIPE.param, ALIGNED > 0)
        grad_at = pointers(at.grad, at.first, offsets, RECIPE.grad, ALIGNED > 1)
        moments_at = ()
        for i in tl.static_range(MOMENTS):
            address = at.moments[i]
            moments_at += (pointers(address, at.first, offsets, RECIPE.moments[i], ALIGNED > 0),)

        before = load(param_at, mask, T)
        grad = load(grad_at, mask, T)
        moments = ()
        for i in tl.static_range(MOMENTS):
            moments += (load(moments_at[i], mask, T),)
        if RECIPE.ema is not None:  # asked for with the others: later it would be waited for alone
            ema_at = pointers(at.ema, at.first, offsets, RECIPE.ema, ALIGNED > 0)
            average = load(ema_at, mask, T)

        param, moments = stepped(c, before, grad, moments, RECIPE, TAIL)
        param = elements(param, RECIPE.param)
        written = mask
        if TAIL.skippable:
            written = tl.where(taken, mask, offsets < 0)
        tl.store(param_at, param, mask=written)
        for i in tl.static_range(MOMENTS):
            tl.store(moments_at[i], elements(moments[i], RECIPE.moments[i]), mask=written)

        after = numbers(param, T)
        if TAIL.skippable:
            after = tl.where(taken, after, before)
        if RECIPE.ema is not None:
            average = averaged(c.tail, average, after)
            tl.store(ema_at, elements(average, RECIPE.ema), mask=written)
        if TAIL.zero_grads:
            tl.store(grad_at, tl.zeros((BLOCK,), RECIPE.grad), mask=mask)
        if TAIL.unscale_grads:
            tl.store(grad_at, elements(grad * c.tail.grad_left, RECIPE.grad), mask=mask)
        if TAIL.statistics:
            sums = counted(sums, before, grad, after, mask)
        start += BLOCK
    return sums


# What is read or written an element at a time, wherever it is.
SCALARS = ["grad_scale", "found_inf", "clip_coef", "statistics", "least"]


@triton.jit(do_not_specialize=["chunk_size"], do_not_specialize_on_alignment=SCALARS)
def step_kernel(
    rows,  # int64[tensors, ROW_WORDS]: `TensorRow` in layout.h
    chunks,  # int32[programs, CHUNK_HALVES]: `Chunk`
    arrivals,  # int32[tensors], zeros: programs that have read the step counter
    hypers,  # int64[groups, HYPER_WORDS]: `Hyper`
    grads,  # int64[tensors]: addresses, 0 for a tensor to leave alone
    grad_scale,  # float32[1] or None
    found_inf,  # float32[1] or None
    clip_coef,  # float64[1] or None
    statistics,  # float64[programs, STATISTICS] or None
    least,  # float64[tensors] or None: smallest magnitudes, of least_magnitude_kernel
    chunk_size,  # elements, a multiple of GRANULE
    RECIPE: tl.constexpr,
    TAIL: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """The step of one chunk."""
    program = tl.program_id(0)
    chunk = chunks + CHUNK_HALVES * program
    tensor = tl.load(chunk + CHUNK_TENSOR)
    grad = tl.load(grads + tensor)
    if grad == 0:
        if TAIL.statistics:
            leave_none(statistics + program.to(tl.int64) * STATISTICS)
        return
    taken = tl.full((), 1, tl.int1)
    if found_inf is not None:
        taken = tl.load(found_inf) == 0
        if not TAIL.skippable and taken == 0:
            return

    row = rows + tensor * ROW_WORDS
    group_and_chunks = tl.load(row + GROUP_AND_CHUNKS)
    counter = tl.load(row + STEP)
    step = take_step(counter, arrivals + tensor, group_and_chunks >> CHUNKS_SHIFT, taken)
    group = group_and_chunks.to(tl.uint32)
    hyper = hyper_at(hypers + group * HYPER_WORDS)
    smallest = None
    if least is not None:
        smallest = tl.load(least + tensor)
    c = constants_of(hyper, step, smallest, grad_scale, clip_coef, RECIPE, TAIL)

    first = tl.load(chunk + CHUNK_INDEX).to(tl.int64) * chunk_size
    size = tl.minimum(tl.load(row + NUMEL) - first, chunk_size).to(tl.int32)
    param, ema = tl.load(row + PARAM), tl.load(row + EMA)
    moments = ()
    boundaries = param | ema
    for i in tl.static_range(len(RECIPE.moments)):
        moment = tl.load(row + MOMENT + i)
        moments += (moment,)
        boundaries |= moment
    at = Operands(param, grad, moments, ema, first)
    zero = tl.full((), 0, tl.float64)
    sums = Sums(zero, zero, zero, zero)

    # NOTE [alignment]
    # A vector access takes a proof that address and mask come in whole vectors (a chunk is whole
    # vectors). So the address is looked at here and the promise made in the branch, and whole
    # granules have a bound of their own; what they leave, and operands that begin anywhere, go one
    # element at a time. Gradients have their own case: views into a bucket are often misaligned.
    if boundaries & 15 == 0:
        body = size // GRANULE * GRANULE
        if at.grad & 15 == 0:
            sums = step_range(c, at, sums, taken, 0, body, BLOCK, RECIPE, TAIL, 2)
        else:
            sums = step_range(c, at, sums, taken, 0, body, BLOCK, RECIPE, TAIL, 1)
        sums = step_range(c, at, sums, taken, body, size, GRANULE, RECIPE, TAIL, 0)
    else:
        # Half a block: blocks of one shape get one layout; here neighbours go to neighbours.
        sums = step_range(c, at, sums, taken, 0, size, BLOCK // 2, RECIPE, TAIL, 0)

    if TAIL.statistics:
        leave(sums, c.tail.unscale, statistics + program.to(tl.int64) * STATISTICS)
