"""The rules that kernels are built for, by their names: to add one, add it to both functions."""

import triton.language as tl

from . import adamw, sgd
from .arithmetic import device_function


@device_function
def constants_of(hyper, t, RECIPE: tl.constexpr):
    """What the rule needs of a tensor at this step; `t` counts the steps, this one among them."""
    if RECIPE.rule == "adamw":
        c = adamw.constants_of(hyper, t, RECIPE.compute)
    elif RECIPE.rule == "sgd":
        c = sgd.constants_of(hyper, t, RECIPE.compute)
    return c


@device_function
def update(c, g, moments, RECIPE: tl.constexpr):
    """What is taken from a block of the parameter beside the decay, and its new moments."""
    if RECIPE.rule == "adamw":
        u, moments = adamw.update(c, g, moments)
    elif RECIPE.rule == "sgd":
        u, moments = sgd.update(c, g, moments)
    return u, moments
