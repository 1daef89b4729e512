"""Arithmetic of the kernels: kernels/arithmetic.h, operation by operation and of the same bits."""

from typing import Any

import triton
import triton.language as tl

INTERPRETED = bool(triton.knobs.runtime.interpret)


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
def divide(a, b):
    """a / b as IEEE rounds it, which Triton's plain operator does in float64 only."""
    return a / b if a.dtype == tl.float64 else tl.div_rn(a, b)


@device_function
def square_root(a):
    """The root as IEEE rounds it, which Triton's plain function does in float64 only."""
    return tl.sqrt(a) if a.dtype == tl.float64 else tl.sqrt_rn(a)


@device_function
def negated(x):
    """-x. Triton's own minus subtracts from 0, and 0 - 0 is 0 where -0 is asked for."""
    return x * -1.0


@device_function
def lerp(start, end, weight, complement):
    """(1 - weight) * start + weight * end, written from the nearer end as torch.lerp is."""
    difference = end - start
    near = tl.abs(weight) < 0.5
    factor = tl.where(near, weight, negated(complement))
    return tl.fma(factor, difference, tl.where(near, start, end))


@device_function
def is_finite(x):
    """Whether x is neither infinite nor NaN."""
    return tl.abs(x) < float("inf")


@device_function
def finite_or_zero(x):
    """x, or 0 where x is infinite or NaN: keeps inf - inf out of forms where torch's has none."""
    return tl.where(is_finite(x), x, 0)


@device_function
def maximum(a, b):
    """The larger, NaN if either is (as torch.maximum)."""
    return tl.where((a > b) | (a != a), a, b)


@device_function
def minimum(a, b):
    """The smaller, NaN if either is (as torch.minimum)."""
    return tl.where((a < b) | (a != a), a, b)
