"""Codecs beyond formats.py: kernels/blocks.h, operation by operation and under its names.

Blocks of numbers with one scale, of numbers and of random bits are the inner dimension of tensors
that are reshaped: with eight consecutive elements a thread none of it leaves a warp.
"""

from collections import namedtuple

import triton.language as tl

from .arithmetic import device_function
from .formats import elements
from .layout import BLOCK as IN_BLOCK  # that share a scale

# What the random bits of a tensor at one step are a function of, beside operand and element:
# `index` is that of the chunk's first element over DRAWN, and `past` what the division leaves.
Draw = namedtuple("Draw", "seed step number index past")

DRAWN = tl.constexpr(8)  # elements that share one value of the generator's counter
ROUNDS = tl.constexpr(7)
MAGNITUDE_OF_ZERO = tl.constexpr(0x00800000)


@device_function
def joined(high, residual):
    """The float32 that a bfloat16, as a float32, and its residual make."""
    return (high.to(tl.int32, bitcast=True) + residual.to(tl.int32)).to(tl.float32, bitcast=True)


@device_function
def split(x):
    """The bits of the nearest bfloat16, ties away from zero, and the residual."""
    bits = tl.where(x != x, 0x7FFF0000, x.to(tl.uint32, bitcast=True))
    return ((bits + 0x8000) >> 16).to(tl.uint16), bits.to(tl.uint16).to(tl.int16, bitcast=True)


@device_function
def random_words(draw, index, OPERAND: tl.constexpr):
    """Four words for each value of the counter, in the order of the elements."""
    of_operand = draw.number * 8 + OPERAND
    halves = (index.to(tl.uint32), (index >> 32).to(tl.uint32))
    return tl.philox(draw.seed, *halves, draw.step, of_operand, ROUNDS)


@device_function
def shifted(past, a, b, c, d, e, f, g, h):
    """Four of eight words, from the `past`th half on."""
    by_two = past & 4 != 0  # words
    a, b, c = tl.where(by_two, c, a), tl.where(by_two, d, b), tl.where(by_two, e, c)
    d, e, f = tl.where(by_two, f, d), tl.where(by_two, g, e), tl.where(by_two, h, f)
    by_one = past & 2 != 0
    a, b, c = tl.where(by_one, b, a), tl.where(by_one, c, b), tl.where(by_one, d, c)
    d, e = tl.where(by_one, e, d), tl.where(by_one, f, e)
    by_half = past & 1 != 0
    a = tl.where(by_half, a >> 16 | b << 16, a)
    b = tl.where(by_half, b >> 16 | c << 16, b)
    c = tl.where(by_half, c >> 16 | d << 16, c)
    d = tl.where(by_half, d >> 16 | e << 16, d)
    return a, b, c, d


@device_function
def drawn(draw, start, OPERAND: tl.constexpr, COUNT: tl.constexpr, ALIGNED: tl.constexpr):
    """16 random bits for each of COUNT elements of a chunk; `start` is a multiple of DRAWN.

    ALIGNED: so is the chunk's first element in the whole tensor.
    """
    index = draw.index + start // DRAWN + tl.arange(0, COUNT // DRAWN)
    a, b, c, d = random_words(draw, index, OPERAND)
    if not ALIGNED and draw.past != 0:  # eight elements have two values of the counter
        following = random_words(draw, index + 1, OPERAND)
        a, b, c, d = shifted(draw.past, a, b, c, d, *following)
    words = tl.join(tl.join(a, c), tl.join(b, d))
    return tl.reshape(tl.join(words & 0xFFFF, words >> 16), (COUNT,))


@device_function
def rounded(
    x,
    draw,
    start,
    OPERAND: tl.constexpr,
    FORMAT: tl.constexpr,
    COUNT: tl.constexpr,
    ALIGNED: tl.constexpr,
):
    """Numbers as elements of a format that is not in blocks: at random, or to nearest."""
    if FORMAT.stochastic:
        x = x.to(tl.float32)
        bits = x.to(tl.uint32, bitcast=True) + drawn(draw, start, OPERAND, COUNT, ALIGNED)
        x = tl.where(x != x, 0x7FFF, bits >> 16).to(tl.uint16)
    else:
        x = elements(x, FORMAT)
    return x


@device_function
def spread(x, COUNT: tl.constexpr):
    """What there is one of for so many consecutive elements, for each of COUNT elements."""
    SHAPE: tl.constexpr = (x.shape[0], COUNT // x.shape[0])
    return tl.reshape(tl.broadcast_to(x[:, None], SHAPE), (COUNT,))


@device_function
def decoded(codes, scales, FORMAT: tl.constexpr):
    """The numbers of codes."""
    SIGNED: tl.constexpr = FORMAT.name == "e4m3"
    NAN: tl.constexpr = 0x7F if SIGNED else 0xFF
    REACH: tl.constexpr = 15 if SIGNED else 31
    base = spread(tl.maximum(scales.to(tl.int32) - REACH, 1) << 23, codes.shape[0])
    code = codes.to(tl.int32) & NAN
    bits = tl.where(code == 0, 0, (code << 20) + base)
    past_numbers = (code << 22) + (0x7FC00000 - (NAN << 22))  # infinity's bits, and a NaN's
    bits = tl.where(code < NAN - 1, bits, past_numbers)
    if SIGNED:
        bits |= (codes.to(tl.int32) & 0x80) << 24
    return bits.to(tl.float32, bitcast=True)


@device_function
def encoded(
    x,
    mask,
    draw,
    start,
    OPERAND: tl.constexpr,
    FORMAT: tl.constexpr,
    ALIGNED: tl.constexpr,
):
    """The codes of numbers, and the scale of each block; what is masked counts for nothing."""
    SIGNED: tl.constexpr = FORMAT.name == "e4m3"
    NAN: tl.constexpr = 0x7F if SIGNED else 0xFF
    REACH: tl.constexpr = 15 if SIGNED else 31
    COUNT: tl.constexpr = x.shape[0]
    bits = x.to(tl.int32, bitcast=True)
    magnitude = bits & 0x7FFFFFFF
    counts = (magnitude if SIGNED else bits) + MAGNITUDE_OF_ZERO
    if not ALIGNED:  # whole blocks are masked, or none
        counts = tl.where(mask, counts, MAGNITUDE_OF_ZERO)
    largest = tl.max(tl.reshape(counts, (COUNT // IN_BLOCK, IN_BLOCK)), 1)
    exponents = (tl.maximum(largest, MAGNITUDE_OF_ZERO) - MAGNITUDE_OF_ZERO + 0x300000) >> 23
    scales = tl.maximum(exponents, REACH + 1)
    base = (scales - REACH) << 23
    if SIGNED:
        code = tl.maximum((magnitude - spread(base - 0x80000, COUNT)) >> 20, 0)
    else:  # no positive number becomes zero
        magnitude = tl.where(x >= 0, magnitude, 0x7FFFFFFF)
        random = drawn(draw, start, OPERAND, COUNT, True).to(tl.int32)  # no shard cuts a block
        code = (magnitude - spread(base - 8, COUNT) + (random << 4)) >> 20
        code = tl.maximum(code, tl.minimum(magnitude, 1))
    past_numbers = tl.minimum(magnitude - 0x7F800000 + (NAN - 1), NAN)
    code = tl.where(magnitude >= 0x7F800000, past_numbers, code)
    if SIGNED:
        code |= bits >> 24 & 0x80
    return code.to(tl.uint8), scales.to(tl.uint8)
