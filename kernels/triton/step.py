"""The Triton kernel of the step: every tensor of a recipe on a device in one launch.

The rule is rule.h's, operation by operation and under the same names. Hyper-parameters are read as
tables.h has them; the rows of the tensor table are TensorTable's own.
A program takes one chunk: it works out the constants of the chunk's tensor, then walks the elements
block by block. The constants need float64: where a device has none (some Intel GPUs) the kernel
does not compile, and another backend has to serve.
"""

from collections import namedtuple
from typing import Any

import triton
import triton.language as tl

INTERPRETED = bool(triton.knobs.runtime.interpret)

GRANULE = tl.constexpr(16)  # elements: whole 16-byte vectors in every format
ROW_WORDS = tl.constexpr(9)  # a row of TensorTable.rows
HYPER_WORDS = tl.constexpr(7)  # sizeof(Hyper) / 8
STATISTICS = tl.constexpr(4)  # kStatistics of tables.h

# What the rule needs of a tensor at this step; from float64, each rounded once.
CONSTANTS = (
    "grad_factor grad_left coupled_decay decay step_size eps_hat root_scale weight1 weight2 "
    "beta1 beta2 "
    "unscale ema_weight ema_kept form"
)
Constants = namedtuple("Constants", CONSTANTS)
# Addresses of a tensor's streams, and which element is the chunk's first.
Streams = namedtuple("Streams", "param grad exp_avg exp_avg_sq max_exp_avg_sq ema first")
# Triton's types of a recipe's streams, the type computed in, and whether there is amsgrad. `ema` is
# None where no averages are kept.
Formats = namedtuple("Formats", "param grad moment compute amsgrad ema")
# Which parts of the tail there are, beside an average: what a kernel is compiled for. `selective`:
# the form of some group's decay is l1 or cautious. `skippable`: a step that is not taken has
# something to do all the same.
Tail = namedtuple("Tail", "statistics zero_grads unscale_grads selective skippable")
NO_TAIL = Tail(False, False, False, False, False)
# Decay in tables.h
COUPLED, L1, CAUTIOUS = (tl.constexpr(form) for form in (0, 3, 4))


def device_function(fn: Any) -> Any:
    """`triton.jit` for functions that kernels call.

    The interpreter patches the whole language anew at each call of a jitted function, 240 us where
    an operation takes 20. Called as plain Python, a function finds the language patched.
    """
    return fn if INTERPRETED else triton.jit(fn)


@device_function
def power(base, exponent):
    """base^exponent as pow() has it: whole exponents by squaring, parts of one by roots."""
    magnitude = tl.abs(exponent)
    finite = magnitude < 9223372036854775808.0  # 2^63: 0, 1 or infinite for every base
    whole = tl.where(finite, magnitude, 9223372036854775808.0).to(tl.uint64)
    part = tl.where(finite, magnitude - whole.to(tl.float64), 0.0)
    result = tl.full((), 1, tl.float64)
    factor = base
    while whole != 0:
        result = tl.where(whole & 1 != 0, result * factor, result)
        factor = factor * factor
        whole = whole >> 1
    root = base
    digits = tl.full((), 52, tl.int32)
    while (part != 0) & (digits != 0):
        root = tl.sqrt(root)
        part = part * 2
        result = tl.where(part >= 1, result * root, result)
        part = tl.where(part >= 1, part - 1, part)
        digits = digits - 1
    result = tl.where(exponent < 0, 1 / result, result)
    return tl.where(exponent != exponent, exponent, result)


@device_function
def read(word, kind):
    """A hyper-parameter: the word is a number or the address of one (`Scalar` in tables.h)."""
    value = word.to(tl.float64, bitcast=True)
    if kind == 1:
        value = tl.load(word.to(tl.pointer_type(tl.float32))).to(tl.float64)
    elif kind == 2:
        value = tl.load(word.to(tl.pointer_type(tl.float64)))
    return value


@device_function
def constants_of(hyper, step, grad_scale, clip_coef, T: tl.constexpr):
    """The constants of a tensor; `step` counts the steps taken before this one."""
    word = tl.load(hyper + 6)  # a byte each: kinds of lr, beta1, beta2; form of decay; maximize
    lr = read(tl.load(hyper), word & 255)
    beta1 = read(tl.load(hyper + 1), word >> 8 & 255)
    beta2 = read(tl.load(hyper + 2), word >> 16 & 255)
    form = word >> 24 & 255
    eps = tl.load(hyper + 3).to(tl.float64, bitcast=True)
    weight_decay = tl.load(hyper + 4).to(tl.float64, bitcast=True)
    ema_decay = tl.load(hyper + 5).to(tl.float64, bitcast=True)
    t = (step + 1).to(tl.float64)
    bias_correction1 = 1 - power(beta1, t)
    bias_correction2_sqrt = tl.sqrt(1 - power(beta2, t))
    unscale = tl.full((), 1, tl.float64)
    if grad_scale is not None:
        unscale = unscale / tl.load(grad_scale).to(tl.float64)
    grad_left = unscale
    if clip_coef is not None:
        grad_left = tl.load(clip_coef) * unscale
    grad_factor = tl.where((word >> 32 & 255) != 0, -grad_left, grad_left).to(T)
    coupled = tl.where(form == COUPLED, weight_decay, 0).to(T)
    decays = (form != COUPLED) & (weight_decay != 0)  # no inf * 0
    decay = tl.where(decays, lr * weight_decay, 0.0)
    eps_hat = eps * bias_correction2_sqrt
    least_normal = 2.2250738585072014e-308 if tl.float64 == T else 1.1754943508222875e-38
    eps = eps.to(T).to(tl.float64)  # as torch adds it to a T
    scales_root = (eps != 0) & (tl.abs(eps_hat) < least_normal)
    scale = 281474976710656.0  # 2^48
    step_size = lr / bias_correction1 * tl.where(scales_root, scale, bias_correction2_sqrt)
    eps_hat = tl.where(scales_root, eps * scale, eps_hat).to(T)
    root_scale = tl.where(scales_root, scale / bias_correction2_sqrt, 1.0).to(T)
    of_root = (step_size.to(T), eps_hat, root_scale)
    betas = ((1 - beta1).to(T), (1 - beta2).to(T), beta1.to(T), beta2.to(T))
    kept = tl.where(t == 1, 0, ema_decay)  # the first step begins the average
    ema = ((1 - kept).to(T), kept.to(T))
    factors = (grad_factor, grad_left.to(T))
    return Constants(*factors, coupled, decay.to(T), *of_root, *betas, unscale, *ema, form)


@device_function
def divide(a, b):
    """a / b as IEEE rounds it, which Triton's plain operator does in float64 only."""
    return a / b if a.dtype == tl.float64 else tl.div_rn(a, b)


@device_function
def square_root(a):
    """The root as IEEE rounds it, which Triton's plain function does in float64 only."""
    return tl.sqrt(a) if a.dtype == tl.float64 else tl.sqrt_rn(a)


@device_function
def lerp(start, end, weight, complement):
    """(1 - weight) * start + weight * end, written from the nearer end as torch.lerp is."""
    difference = end - start
    near = tl.abs(weight) < 0.5
    return tl.fma(tl.where(near, weight, -complement), difference, tl.where(near, start, end))


@device_function
def finite_or_zero(x):
    """x, or 0 where x is infinite or NaN: keeps inf - inf out of forms where torch's has none."""
    return tl.where(tl.abs(x) < float("inf"), x, 0)


@device_function
def maximum(a, b):
    """The larger, NaN if either is (as torch.maximum)."""
    return tl.where((a > b) | (a != a), a, b)


@device_function
def decay_of(form, param, update):
    """What the decay takes from: d in rule.h's table."""
    sign = tl.where(param > 0, 1.0, tl.where(param < 0, -1.0, 0.0)).to(param.dtype)
    opposed = (form == CAUTIOUS) & (sign * update < 0)
    d = tl.where(opposed, 0.0, finite_or_zero(param)).to(param.dtype)
    return tl.where(form == L1, sign, d)


@device_function
def adamw_rule(c, param, grad, m, v, peak, AMSGRAD: tl.constexpr, SELECTIVE: tl.constexpr):
    """One step of a block: the new parameter, exp_avg, exp_avg_sq and max_exp_avg_sq."""
    g = grad * c.grad_factor
    g = tl.where(c.coupled_decay != 0, tl.fma(c.coupled_decay, param, g), g)

    m = lerp(m, g, c.weight1, c.beta1)
    kept = tl.fma(-c.weight2, finite_or_zero(v), v)
    kept = tl.where(c.weight2 < 0.5, kept, c.beta2 * v)
    v = tl.fma(c.weight2 * g, g, kept)
    peak = maximum(peak, v) if AMSGRAD else v

    update = c.step_size * divide(m, tl.fma(square_root(peak), c.root_scale, c.eps_hat))
    d = decay_of(c.form, param, update) if SELECTIVE else finite_or_zero(param)
    return param - tl.fma(c.decay, d, update), m, v, peak


# NOTE [bfloat16 in the interpreter]
# Triton's interpreter truncates where the compiled kernel rounds to nearest even, and garbles
# subnormal numbers. So there, and only there, bfloat16 is read and written as the bits it is.


@device_function
def pointers(address, first, offsets, FORMAT: tl.constexpr, ALIGNED: tl.constexpr):
    """Pointers to elements of a format; ALIGNED promises that `first` is at a 16-byte boundary."""
    base = address.to(tl.pointer_type(FORMAT)) + first
    if ALIGNED:
        base = tl.multiple_of(base, 16)
    return base + offsets


@device_function
def numbers(x, T: tl.constexpr):
    """Elements of a format as numbers to compute with."""
    if x.dtype == tl.uint16:
        x = (x.to(tl.uint32) << 16).to(tl.float32, bitcast=True)
    return x.to(T)


@device_function
def elements(x, FORMAT: tl.constexpr):
    """Numbers as elements of a format, rounded to nearest, ties to even."""
    if tl.uint16 == FORMAT:
        bits = x.to(tl.float32).to(tl.uint32, bitcast=True)
        x = tl.where(x != x, 0x7FFF, (bits + 0x7FFF + (bits >> 16 & 1)) >> 16)
    return x.to(FORMAT)


@device_function
def load(pointer, mask, T: tl.constexpr):
    """Elements in memory as numbers to compute with."""
    return numbers(tl.load(pointer, mask=mask), T)


@device_function
def sum_of_squares(x, mask):
    """In float64, over the elements of the mask."""
    x = tl.where(mask, x.to(tl.float64), 0.0)
    return tl.sum(x * x, 0)


@device_function
def step_range(
    c,
    at,
    sums,
    taken,
    begin,
    end,
    BLOCK: tl.constexpr,
    FORMATS: tl.constexpr,
    TAIL: tl.constexpr,
    ALIGNED: tl.constexpr,
):
    """The step of a chunk's [begin, end). ALIGNED streams: 0 none, 1 all but grad, 2 all.

    Returns `sums` (Tail::statistics in tables.h) with what this range adds to them.
    """
    squares, params, changes, not_finite = sums
    start = tl.cast(begin, tl.int32)
    while start < end:  # range() of a tensor fails in Triton 3.6's interpreter with NumPy 2.4
        offsets = start + tl.arange(0, BLOCK)
        mask = offsets < end
        param_at = pointers(at.param, at.first, offsets, FORMATS.param, ALIGNED > 0)
        grad_at = pointers(at.grad, at.first, offsets, FORMATS.grad, ALIGNED > 1)
        m_at = pointers(at.exp_avg, at.first, offsets, FORMATS.moment, ALIGNED > 0)
        v_at = pointers(at.exp_avg_sq, at.first, offsets, FORMATS.moment, ALIGNED > 0)
        peak_at = pointers(at.max_exp_avg_sq, at.first, offsets, FORMATS.moment, ALIGNED > 0)

        before = load(param_at, mask, FORMATS.compute)
        grad = load(grad_at, mask, FORMATS.compute)
        m = load(m_at, mask, FORMATS.compute)
        v = load(v_at, mask, FORMATS.compute)
        peak = load(peak_at, mask, FORMATS.compute) if FORMATS.amsgrad else v
        if FORMATS.ema is not None:  # asked for with the others: later it would be waited for alone
            ema_at = pointers(at.ema, at.first, offsets, FORMATS.ema, ALIGNED > 0)
            average = load(ema_at, mask, FORMATS.compute)
        param, m, v, peak = adamw_rule(c, before, grad, m, v, peak, FORMATS.amsgrad, TAIL.selective)
        param = elements(param, FORMATS.param)
        written = mask
        if TAIL.skippable:
            written = tl.where(taken, mask, offsets < 0)
        tl.store(param_at, param, mask=written)
        tl.store(m_at, elements(m, FORMATS.moment), mask=written)
        tl.store(v_at, elements(v, FORMATS.moment), mask=written)
        if FORMATS.amsgrad:
            tl.store(peak_at, elements(peak, FORMATS.moment), mask=written)

        after = numbers(param, FORMATS.compute)
        if TAIL.skippable:
            after = tl.where(taken, after, before)
        if FORMATS.ema is not None:
            average = lerp(average, after, c.ema_weight, c.ema_kept)
            tl.store(ema_at, elements(average, FORMATS.ema), mask=written)
        if TAIL.zero_grads:
            tl.store(grad_at, tl.zeros((BLOCK,), FORMATS.grad), mask=mask)
        if TAIL.unscale_grads:
            tl.store(grad_at, elements(grad * c.grad_left, FORMATS.grad), mask=mask)
        if TAIL.statistics:
            squares += sum_of_squares(grad, mask)
            params += sum_of_squares(after, mask)
            changes += sum_of_squares(after.to(tl.float64) - before.to(tl.float64), mask)
            finite = tl.abs(grad) < float("inf")
            not_finite += tl.sum(tl.where(mask & (finite == 0), 1.0, 0.0).to(tl.float64), 0)
        start += BLOCK
    return squares, params, changes, not_finite


@device_function
def take_step(counter, arrivals, chunks, taken):
    """Reads the step counter; the last of the tensor's programs to have read it advances it."""
    step = tl.load(counter, volatile=True)
    tl.debug_barrier()  # each thread reads for itself, and none may come after the write
    if taken:
        if chunks == 1:
            tl.store(counter, step + 1)
        elif tl.atomic_add(arrivals, 1, sem="acq_rel") == chunks - 1:
            tl.store(arrivals, 0)
            tl.store(counter, step + 1)
    return step


# What is read or written an element at a time, wherever it is.
SCALARS = ["grad_scale", "found_inf", "clip_coef", "statistics"]


@triton.jit(do_not_specialize=["chunk_size"], do_not_specialize_on_alignment=SCALARS)
def adamw_kernel(
    rows,  # int64[tensors, ROW_WORDS]: param, exp_avg, exp_avg_sq, max_exp_avg_sq, ema, step, ...
    chunks,  # int32[programs, 2]: tensor, index of the chunk within it
    arrivals,  # int32[tensors], zeros: programs that have read the step counter
    hypers,  # int64[groups, HYPER_WORDS]: `Hyper` in tables.h
    grads,  # int64[tensors]: addresses, 0 for a tensor to leave alone
    grad_scale,  # float32[1] or None
    found_inf,  # float32[1] or None
    clip_coef,  # float64[1] or None
    statistics,  # float64[programs, STATISTICS] or None
    chunk_size,  # elements, a multiple of GRANULE
    FORMATS: tl.constexpr,
    TAIL: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """The step of one chunk."""
    program = tl.program_id(0)
    chunk = chunks + 2 * program
    tensor = tl.load(chunk)
    grad = tl.load(grads + tensor)
    if grad == 0:
        if TAIL.statistics:
            for i in tl.static_range(STATISTICS):
                none = -1.0 if i == 3 else 0.0
                tl.store(statistics + program.to(tl.int64) * STATISTICS + i, none)
        return
    taken = tl.full((), 1, tl.int1)
    if found_inf is not None:
        taken = tl.load(found_inf) == 0
        if not TAIL.skippable and taken == 0:
            return

    row = rows + tensor * ROW_WORDS
    counter = tl.load(row + 5).to(tl.pointer_type(tl.float32))
    step = take_step(counter, arrivals + tensor, tl.load(row + 8), taken)
    hyper = hypers + tl.load(row + 7) * HYPER_WORDS
    c = constants_of(hyper, step, grad_scale, clip_coef, FORMATS.compute)

    first = tl.load(chunk + 1).to(tl.int64) * chunk_size
    size = tl.minimum(tl.load(row + 6) - first, chunk_size).to(tl.int32)
    moments = (tl.load(row + 1), tl.load(row + 2), tl.load(row + 3))
    at = Streams(tl.load(row), grad, *moments, tl.load(row + 4), first)
    zero = tl.full((), 0, tl.float64)
    sums = (zero, zero, zero, zero)

    # NOTE [alignment]
    # A vector access takes a proof that address and mask come in whole vectors (a chunk is whole
    # vectors). So the address is looked at here and the promise made in the branch, and whole
    # granules have a bound of their own; what they leave, and streams that begin anywhere, go one
    # element at a time. Gradients have their own case: views into a bucket are often misaligned.
    if (at.param | at.exp_avg | at.exp_avg_sq | at.max_exp_avg_sq | at.ema) & 15 == 0:
        body = size // GRANULE * GRANULE
        if at.grad & 15 == 0:
            sums = step_range(c, at, sums, taken, 0, body, BLOCK, FORMATS, TAIL, 2)
        else:
            sums = step_range(c, at, sums, taken, 0, body, BLOCK, FORMATS, TAIL, 1)
        sums = step_range(c, at, sums, taken, body, size, GRANULE, FORMATS, TAIL, 0)
    else:
        # Half a block: blocks of one shape get one layout; here neighbours go to neighbours.
        sums = step_range(c, at, sums, taken, 0, size, BLOCK // 2, FORMATS, TAIL, 0)

    if TAIL.statistics:
        squares, params, changes, not_finite = sums
        to = statistics + program.to(tl.int64) * STATISTICS
        tl.store(to, squares * c.unscale * c.unscale)
        tl.store(to + 1, params)
        tl.store(to + 2, changes)
        tl.store(to + 3, not_finite)
