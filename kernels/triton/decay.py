"""Hyper-parameters as the rules read them, and weight decay: rules/decay.h, under its names."""

from collections import namedtuple

import triton.language as tl

from .arithmetic import device_function, finite_or_zero
from .layout import (
    CAUTIOUS,
    COUPLED,
    DECAY,
    EMA_DECAY,
    FLAGS,
    FLOAT32_ADDRESS,
    FLOAT64_ADDRESS,
    L1,
    L1L2,
    LR,
    MIN,
    NUMBERS,
    WEIGHT_DECAY,
)

# `form`: of the decay, which `d` in decay.h's table goes by.
DecayConstants = namedtuple("DecayConstants", "coupled decay form")
# A row of the Hyper table.
Hyper = namedtuple("Hyper", "numbers ema_decay flags")


@device_function
def hyper_at(row):
    """A row of the Hyper table: all of it at once, so that memory is waited for once."""
    numbers = ()
    for i in tl.static_range(NUMBERS):
        numbers += (tl.load(row + i),)
    ema_decay = tl.load(row + EMA_DECAY).to(tl.float64, bitcast=True)
    return Hyper(numbers, ema_decay, tl.load(row + FLAGS))


@device_function
def flag(hyper, BYTE: tl.constexpr):
    """One byte of the FLAGS."""
    return hyper.flags >> 8 * BYTE & 255


@device_function
def read(hyper, NUMBER: tl.constexpr):
    """A number of a group: its own, or what stands at its address."""
    word = hyper.numbers[NUMBER]
    kind = flag(hyper, NUMBER)
    value = word.to(tl.float64, bitcast=True)
    if kind == FLOAT32_ADDRESS:
        value = tl.load(word.to(tl.pointer_type(tl.float32))).to(tl.float64)
    elif kind == FLOAT64_ADDRESS:
        value = tl.load(word.to(tl.pointer_type(tl.float64)))
    return value


@device_function
def needs_least(hyper):
    """Whether the tensors' smallest magnitudes have to be found before the step."""
    return (flag(hyper, DECAY) == MIN) & (read(hyper, WEIGHT_DECAY) != 0)


@device_function
def decay_of(hyper, least, T: tl.constexpr, SELECTIVE: tl.constexpr):
    """The constants of a tensor's decay.

    SELECTIVE: some group's decay is l1, cautious, l1l2 or min. `least`: the tensor's smallest
    magnitude, float64, or None where no group's decay is min.
    """
    weight_decay = read(hyper, WEIGHT_DECAY)
    form = flag(hyper, DECAY)
    coupled = tl.where(form == COUPLED, weight_decay, 0.0).to(T)
    decays = (form != COUPLED) & (weight_decay != 0)  # no inf * 0
    factor = weight_decay
    if SELECTIVE:
        factor = tl.where(form == L1L2, weight_decay / 2, weight_decay)
    if least is not None:
        factor = tl.where(form == MIN, least, factor)
    decay = tl.where(decays, read(hyper, LR) * factor, 0.0)
    return DecayConstants(coupled, decay.to(T), form)


@device_function
def with_coupled(c, param, grad):
    """The gradient with a coupled decay."""
    return tl.where(c.coupled != 0, tl.fma(c.coupled, param, grad), grad)


@device_function
def decayed(c, param, update, SELECTIVE: tl.constexpr):
    """The parameter after the step. SELECTIVE as in `decay_of`."""
    d = finite_or_zero(param)
    if SELECTIVE:
        sign = tl.where(param > 0, 1.0, tl.where(param < 0, -1.0, 0.0)).to(param.dtype)
        opposed = (c.form == CAUTIOUS) & (sign * update < 0)
        kept = tl.where(opposed, 0.0, d).to(param.dtype)
        is_sign = (c.form == L1) | (c.form == MIN)
        d = tl.where(is_sign, sign, tl.where(c.form == L1L2, kept + sign, kept))
    return param - tl.fma(c.decay, d, update)
