"""The rule of SGD with or without momentum: rules/sgd.h, operation by operation, same names."""

from collections import namedtuple

import triton.language as tl

from .arithmetic import device_function
from .decay import read
from .layout import LR, OF_RULE

MOMENTUM, DAMPENING, NESTEROV = (tl.constexpr(OF_RULE.value + i) for i in range(3))

# What the rule needs of a tensor at this step; from float64, each rounded once.
Constants = namedtuple("Constants", "lr kept weight momentum nesterov")


@device_function
def constants_of(hyper, t, T: tl.constexpr):
    """The constants of a tensor; `t` counts the steps, this one among them."""
    lr = read(hyper, LR).to(T)
    momentum = read(hyper, MOMENTUM)
    kept = tl.where(t == 1, 0.0, momentum).to(T)
    weight = tl.where(t == 1, 1.0, 1 - read(hyper, DAMPENING)).to(T)
    nesterov = read(hyper, NESTEROV) != 0
    return Constants(lr, kept, weight, momentum.to(T), nesterov)


@device_function
def update(c, g, moments):
    """What is taken from a block of the parameter beside the decay, and its new moments."""
    if len(moments) == 1:
        b = tl.fma(c.weight, g, c.kept * moments[0])
        g = tl.where(c.nesterov, tl.fma(c.momentum, b, g), b)
        moments = (b,)
    return c.lr * g, moments
