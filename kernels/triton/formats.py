"""Codecs of the kernels: elements in memory to numbers in registers and back."""

from collections import namedtuple

import triton.language as tl

from .arithmetic import device_function

# NOTE [bfloat16 in the interpreter]
# Triton's interpreter truncates where the compiled kernel rounds to nearest even, and garbles
# subnormal numbers. So there, and only there, bfloat16 is read and written as the bits it is. (What
# blocks.py rounds is written as bits everywhere.)

# A format of layout.h, by its name there, and Triton's type of its elements in memory.
Format = namedtuple("Format", "name dtype stochastic in_blocks", defaults=(False, False))


@device_function
def pointers(address, first, offsets, FORMAT: tl.constexpr, ALIGNED: tl.constexpr):
    """Pointers to elements of a format; ALIGNED promises that `first` is at a 16-byte boundary."""
    base = address.to(tl.pointer_type(FORMAT.dtype)) + first
    if ALIGNED:
        base = tl.multiple_of(base, 16)
    return base + offsets


@device_function
def numbers(x, T: tl.constexpr):
    """Elements as numbers to compute with."""
    if x.dtype == tl.uint16:
        x = (x.to(tl.uint32) << 16).to(tl.float32, bitcast=True)
    return x.to(T)


@device_function
def elements(x, FORMAT: tl.constexpr):
    """Numbers as elements of a format, rounded to nearest, ties to even."""
    if tl.uint16 == FORMAT.dtype:
        bits = x.to(tl.float32).to(tl.uint32, bitcast=True)
        x = tl.where(x != x, 0x7FFF, (bits + 0x7FFF + (bits >> 16 & 1)) >> 16)
    return x.to(FORMAT.dtype)


@device_function
def load(pointer, mask, T: tl.constexpr):
    """Elements in memory as numbers to compute with."""
    return numbers(tl.load(pointer, mask=mask), T)
