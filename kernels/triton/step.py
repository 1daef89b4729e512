"""The Triton kernel of the step: every tensor of a recipe on a device in one launch.

A program takes one chunk: it works out the constants of the chunk's tensor, then walks the elements
block by block. The constants need float64: where a device has none (some Intel GPUs) the kernel
does not compile, and another backend has to serve.
"""

from collections import namedtuple

import triton
import triton.language as tl

from .arithmetic import device_function
from .blocks import DRAWN, Draw, decoded, encoded, joined, rounded, split
from .decay import hyper_at
from .formats import elements, load, numbers, pointers
from .layout import (
    BLOCK as IN_BLOCK,
)
from .layout import (
    CHUNK_HALVES,
    CHUNK_INDEX,
    CHUNK_TENSOR,
    COPY,
    EMA,
    FIRST,
    GROUP_AND_CHUNKS,
    HEAD_AND_NUMBER,
    HYPER_WORDS,
    MOMENT,
    NUMEL,
    PARAM,
    RESIDUAL,
    ROW_WORDS,
    SCALE,
    STATISTICS,
    STEP,
    UPPER,
)
from .tail import Sums, averaged, constants_of, counted, leave, leave_none, stepped, take_step

# A rule's name, the operands' formats (formats.py) and the type computed in. `moments` has as many
# as the rule; there may be no residual, average or copy: None. `granule` is in elements: with whole
# ones every operand has whole 16-byte vectors, or whole blocks.
# `draws`: something is rounded at random.
Recipe = namedtuple("Recipe", "rule param grad moments residual ema copy compute granule draws")
# Addresses of a tensor's operands, and which element is the chunk's first.
Operands = namedtuple("Operands", "param grad moments scales residual ema copy first")


@device_function
def address_of(row, OPERAND: tl.constexpr, FORMAT: tl.constexpr):
    """The address of an operand that there may be, else 0."""
    return tl.load(row + OPERAND) if FORMAT is not None else tl.cast(0, tl.int64)


@device_function
def scales_at(at, block, INDEX: tl.constexpr, RECIPE: tl.constexpr):
    """Pointers to the scales of a moment's blocks, which are counted from the chunk's first on."""
    return pointers(at.scales[INDEX], at.first // IN_BLOCK, block, RECIPE.moments[INDEX], False)


@device_function
def step_range(
    c,
    at,
    draw,
    sums,
    taken,
    begin,
    end,
    COUNT: tl.constexpr,
    RECIPE: tl.constexpr,
    TAIL: tl.constexpr,
    ALIGNED: tl.constexpr,
):
    """The step of a chunk's [begin, end), COUNT elements at a time.

    ALIGNED operands: 0 none, 1 all but grad, 2 all. Returns `sums` with what this range adds.
    """
    T: tl.constexpr = RECIPE.compute
    MOMENTS: tl.constexpr = len(RECIPE.moments)
    start = tl.cast(begin, tl.int32)
    while start < end:  # range() of a tensor fails in Triton 3.6's interpreter with NumPy 2.4
        offsets = start + tl.arange(0, COUNT)
        mask = offsets < end
        # All is asked for before any is written: later it would be waited for alone.
        param_at = pointers(at.param, at.first, offsets, RECIPE.param, ALIGNED > 0)
        grad_at = pointers(at.grad, at.first, offsets, RECIPE.grad, ALIGNED > 1)
        before = load(param_at, mask, T)
        if RECIPE.residual is not None:
            residual_at = pointers(at.residual, at.first, offsets, RECIPE.residual, ALIGNED > 0)
            before = joined(before, tl.load(residual_at, mask=mask))
        grad = load(grad_at, mask, T)
        moments_at, moments = (), ()
        block = start // IN_BLOCK + tl.arange(0, max(COUNT // IN_BLOCK, 1))
        for i in tl.static_range(MOMENTS):
            address = at.moments[i]
            moments_at += (pointers(address, at.first, offsets, RECIPE.moments[i], ALIGNED > 0),)
            if RECIPE.moments[i].in_blocks:
                scales = tl.load(scales_at(at, block, i, RECIPE), mask=block * IN_BLOCK < end)
                codes = tl.load(moments_at[i], mask=mask)
                moments += (decoded(codes, scales, RECIPE.moments[i]),)
            else:
                moments += (load(moments_at[i], mask, T),)
        if RECIPE.ema is not None:
            ema_at = pointers(at.ema, at.first, offsets, RECIPE.ema, ALIGNED > 0)
            average = load(ema_at, mask, T)

        param, moments = stepped(c, before, grad, moments, RECIPE, TAIL)
        written = mask
        blocks_written = block * IN_BLOCK < end
        if TAIL.skippable:
            written = tl.where(taken, mask, offsets < 0)
            blocks_written = tl.where(taken, blocks_written, block < 0)
        if RECIPE.residual is not None:
            param, residual = split(param)
            tl.store(residual_at, residual, mask=written)
            after = joined(numbers(param, T), residual)
        else:
            param = rounded(param, draw, start, PARAM, RECIPE.param, COUNT, ALIGNED > 0)
            after = numbers(param, T)
        tl.store(param_at, param, mask=written)
        for i in tl.static_range(MOMENTS):
            x = moments[i]
            if RECIPE.moments[i].in_blocks:
                x, scales = encoded(
                    x, mask, draw, start, MOMENT + i, RECIPE.moments[i], ALIGNED > 0
                )
                tl.store(scales_at(at, block, i, RECIPE), scales, mask=blocks_written)
            else:
                x = rounded(x, draw, start, MOMENT + i, RECIPE.moments[i], COUNT, ALIGNED > 0)
            tl.store(moments_at[i], x, mask=written)

        if TAIL.skippable:
            after = tl.where(taken, after, before)
        if RECIPE.ema is not None:
            average = averaged(c.tail, average, after)
            tl.store(ema_at, elements(average, RECIPE.ema), mask=written)
        if RECIPE.copy is not None:
            copy_at = pointers(at.copy, at.first, offsets, RECIPE.copy, ALIGNED > 0)
            tl.store(copy_at, elements(after, RECIPE.copy), mask=written)
        if TAIL.zero_grads:
            tl.store(grad_at, tl.zeros((COUNT,), RECIPE.grad.dtype), mask=mask)
        if TAIL.unscale_grads:
            left = elements(grad * c.tail.grad_left, RECIPE.grad)
            tl.store(grad_at, left, mask=mask)
        if TAIL.statistics:
            sums = counted(sums, before, grad, after, mask, written)
        start += COUNT
    return sums


# What is read or written an element at a time, wherever it is.
SCALARS = ["grad_scale", "found_inf", "clip_coef", "statistics", "least"]


@triton.jit(do_not_specialize=["chunk_size", "seed"], do_not_specialize_on_alignment=SCALARS)
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
    chunk_size,  # elements, a multiple of the recipe's granule
    seed: tl.uint64,  # of random bits
    RECIPE: tl.constexpr,
    TAIL: tl.constexpr,
    BLOCK: tl.constexpr,  # elements that a program takes at a time
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
    step = take_step(counter, arrivals + tensor, group_and_chunks >> UPPER, taken)
    group = group_and_chunks.to(tl.uint32)
    hyper = hyper_at(hypers + group * HYPER_WORDS)
    smallest = None
    if least is not None:
        smallest = tl.load(least + tensor)
    c = constants_of(hyper, step, smallest, grad_scale, clip_coef, RECIPE, TAIL)

    first = tl.load(chunk + CHUNK_INDEX).to(tl.int64) * chunk_size
    size = tl.minimum(tl.load(row + NUMEL) - first, chunk_size).to(tl.int32)
    param = tl.load(row + PARAM)
    residual = address_of(row, RESIDUAL, RECIPE.residual)
    ema, copy = address_of(row, EMA, RECIPE.ema), address_of(row, COPY, RECIPE.copy)
    moments, scales = (), ()
    boundaries = param | residual | ema | copy
    for i in tl.static_range(len(RECIPE.moments)):
        moment = tl.load(row + MOMENT + i)
        moments += (moment,)
        scales += (tl.load(row + SCALE + i),)
        boundaries |= moment
    at = Operands(param, grad, moments, scales, residual, ema, copy, first)
    number = (tl.load(row + HEAD_AND_NUMBER) >> UPPER).to(tl.uint32)
    in_whole = tl.load(row + FIRST) + first
    past = (in_whole % DRAWN).to(tl.int32)
    draw = Draw(seed, (step + 1).to(tl.uint32, bitcast=True), number, in_whole // DRAWN, past)
    aligned = boundaries & 15 == 0
    if RECIPE.draws:
        aligned &= past == 0
    zero = tl.full((), 0, tl.float64)
    sums = Sums(zero, zero, zero, zero)

    # NOTE [alignment]
    # A vector access takes a proof that address and mask come in whole vectors (a chunk is whole
    # vectors). So each loop makes its own promise, and goes as far as that holds: not at all where
    # an address does not, and over whole granules. What they leave, and operands that begin
    # anywhere, go one element at a time. Gradients have their own loop: views into a bucket are
    # often misaligned. A shard that begins where eight elements share random bits goes as what
    # begins anywhere.
    body = tl.where(aligned, size, 0) // RECIPE.granule * RECIPE.granule
    with_grad = tl.where(at.grad & 15 == 0, body, 0)
    sums = step_range(c, at, draw, sums, taken, 0, with_grad, BLOCK, RECIPE, TAIL, 2)
    sums = step_range(c, at, draw, sums, taken, with_grad, body, BLOCK, RECIPE, TAIL, 1)
    # Half a block: blocks of one shape get one layout; here neighbours go to neighbours.
    sums = step_range(c, at, draw, sums, taken, body, size, BLOCK // 2, RECIPE, TAIL, 0)

    if TAIL.statistics:
        leave(sums, c.tail.unscale, statistics + program.to(tl.int64) * STATISTICS)
