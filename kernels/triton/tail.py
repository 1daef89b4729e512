"""The step of a block: a rule, and around it the tail; kernels/tail.h, under its names."""

from collections import namedtuple

import triton.language as tl

from . import rules
from .arithmetic import device_function, is_finite, lerp, negated
from .decay import decay_of, decayed, flag, with_coupled
from .layout import MAXIMIZE, STATISTICS

# Which parts of the tail there are, beside an average: what a kernel is compiled for. `selective`:
# some group's decay is l1, cautious, l1l2 or min. `skippable`: a step that is not taken has
# something to do all the same.
Tail = namedtuple("Tail", "statistics zero_grads unscale_grads selective skippable")
NO_TAIL = Tail(False, False, False, False, False)

# What the tail needs of a tensor at this step; from float64, each rounded once (but for unscale).
TailConstants = namedtuple("TailConstants", "grad_factor grad_left unscale ema_weight ema_kept")
# All that is worked out once a tensor and step.
Constants = namedtuple("Constants", "rule decay tail")
# Sums over elements that Tail::statistics are made of, in float64.
Sums = namedtuple("Sums", "grad param change not_finite")

# What a tensor without a step counter is taken to have behind it.
UNCOUNTED = tl.constexpr(1)


@device_function
def take_step(address, arrivals, chunks, taken):
    """Reads the step counter; the last of the tensor's programs to have read it advances it."""
    step = tl.full((), UNCOUNTED, tl.float32)
    if address != 0:
        counter = address.to(tl.pointer_type(tl.float32))
        step = tl.load(counter, volatile=True)
        tl.debug_barrier()  # each thread reads for itself, and none may come after the write
        if taken:
            if chunks == 1:
                tl.store(counter, step + 1)
            elif tl.atomic_add(arrivals, 1, sem="acq_rel") == chunks - 1:
                tl.store(arrivals, 0)
                tl.store(counter, step + 1)
    return step


@device_function
def constants_of(
    hyper, step, least, grad_scale, clip_coef, RECIPE: tl.constexpr, TAIL: tl.constexpr
):
    """The constants of a tensor; `step` is what its counter said before this step.

    `least` is as decay_of takes it.
    """
    T: tl.constexpr = RECIPE.compute
    t = (step + 1).to(tl.float64)
    unscale = tl.full((), 1, tl.float64)
    if grad_scale is not None:
        unscale = unscale / tl.load(grad_scale).to(tl.float64)
    grad_left = unscale
    if clip_coef is not None:
        grad_left = tl.load(clip_coef) * unscale
    grad_factor = tl.where(flag(hyper, MAXIMIZE) != 0, negated(grad_left), grad_left).to(T)
    kept = tl.where(t == 1, 0.0, hyper.ema_decay)  # the first step begins the average
    ema = ((1 - kept).to(T), kept.to(T))
    tail = TailConstants(grad_factor, grad_left.to(T), unscale, *ema)
    decay = decay_of(hyper, least, T, TAIL.selective)
    return Constants(rules.constants_of(hyper, t, RECIPE), decay, tail)


@device_function
def stepped(c, param, grad, moments, RECIPE: tl.constexpr, TAIL: tl.constexpr):
    """The parameter and the moments after the step; `grad` is as it was found."""
    g = with_coupled(c.decay, param, grad * c.tail.grad_factor)
    update, moments = rules.update(c.rule, g, moments, RECIPE)
    return decayed(c.decay, param, update, TAIL.selective), moments


@device_function
def averaged(c, average, param):
    """The average after the step; `param` is the parameter as it is stored."""
    return lerp(average, param, c.ema_weight, c.ema_kept)


@device_function
def sum_of_squares(x, mask):
    """In float64, over the elements of the mask."""
    x = tl.where(mask, x.to(tl.float64), 0.0)
    return tl.sum(x * x, 0)


@device_function
def counted(sums, before, grad, after, mask, written):
    """`sums` with what the elements of a block add to them; only what is written has changed."""
    change = after.to(tl.float64) - before.to(tl.float64)
    not_finite = tl.where(mask & (is_finite(grad) == 0), 1.0, 0.0).to(tl.float64)
    return Sums(
        sums.grad + sum_of_squares(grad, mask),
        sums.param + sum_of_squares(after, mask),
        sums.change + sum_of_squares(change, written),
        sums.not_finite + tl.sum(not_finite, 0),
    )


@device_function
def leave(sums, unscale, to):
    """Leaves a chunk's statistics; the gradients were summed up as they were."""
    tl.store(to, sums.grad * unscale * unscale)
    tl.store(to + 1, sums.param)
    tl.store(to + 2, sums.change)
    tl.store(to + 3, sums.not_finite)


@device_function
def leave_none(to):
    """Leaves the statistics of a chunk that has no gradient."""
    for i in tl.static_range(STATISTICS):
        tl.store(to + i, -1.0 if i == 3 else 0.0)
