"""The rule of AdamW: rules/adamw.h, operation by operation and under its names."""

from collections import namedtuple

import triton.language as tl

from .arithmetic import (
    device_function,
    divide,
    finite_or_zero,
    lerp,
    maximum,
    negated,
    power,
    square_root,
)
from .decay import read
from .layout import LR, OF_RULE

BETA1, BETA2, EPS = (tl.constexpr(OF_RULE.value + i) for i in range(3))

# What the rule needs of a tensor at this step; from float64, each rounded once.
Constants = namedtuple("Constants", "step_size eps_hat root_scale weight1 weight2 beta1 beta2")


@device_function
def constants_of(hyper, t, T: tl.constexpr):
    """The constants of a tensor; `t` counts the steps, this one among them."""
    lr = read(hyper, LR)
    beta1 = read(hyper, BETA1)
    beta2 = read(hyper, BETA2)
    given_eps = read(hyper, EPS)
    bias_correction1 = 1 - power(beta1, t)
    bias_correction2_sqrt = tl.sqrt(1 - power(beta2, t))
    eps_hat = given_eps * bias_correction2_sqrt
    eps = given_eps.to(T).to(tl.float64)  # as torch adds it to a T
    least_normal = 2.2250738585072014e-308 if tl.float64 == T else 1.1754943508222875e-38
    scales_root = (eps != 0) & (tl.abs(eps_hat) < least_normal)
    scale = 281474976710656.0  # 2^48

    step_size = lr / bias_correction1 * tl.where(scales_root, scale, bias_correction2_sqrt)
    eps_hat = tl.where(scales_root, eps * scale, eps_hat).to(T)
    root_scale = tl.where(scales_root, scale / bias_correction2_sqrt, 1.0).to(T)
    of_root = (step_size.to(T), eps_hat, root_scale)
    betas = ((1 - beta1).to(T), (1 - beta2).to(T), beta1.to(T), beta2.to(T))
    return Constants(*of_root, *betas)


@device_function
def update(c, g, moments):
    """What is taken from a block of the parameter beside the decay, and its new moments."""
    m = lerp(moments[0], g, c.weight1, c.beta1)
    v = moments[1]
    kept = tl.fma(negated(c.weight2), finite_or_zero(v), v)
    kept = tl.where(c.weight2 < 0.5, kept, c.beta2 * v)
    v = tl.fma(c.weight2 * g, g, kept)
    if len(moments) == 3:  # amsgrad: with the running maximum of v
        peak = maximum(moments[2], v)
        moments = (m, v, peak)
    else:
        peak = v
        moments = (m, v)
    return c.step_size * divide(m, tl.fma(square_root(peak), c.root_scale, c.eps_hat)), moments
