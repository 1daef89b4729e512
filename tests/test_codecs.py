"""Codecs of low precision against their definitions: exact numbers, and known answers of Philox."""

import math
import shutil
import subprocess
from pathlib import Path

import numpy as np
import pytest
import torch

from warpstep import codecs

# Random123's known answers for Philox4x32 with 7 rounds: counter, key, result.
KNOWN = [
    ((0, 0, 0, 0), (0, 0), (0x5F6FB709, 0x0D893F64, 0x4F121F81, 0x4F730A48)),
    ((0xFFFFFFFF,) * 4, (0xFFFFFFFF,) * 2, (0x5207DDC2, 0x45165E59, 0x4D8EE751, 0x8C52F662)),
    (
        (0x243F6A88, 0x85A308D3, 0x13198A2E, 0x03707344),
        (0xA4093822, 0x299F31D0),
        (0x4DFCCABA, 0x190A87F0, 0xC47362BA, 0xB6B5242A),
    ),
]


def philox(counter, key):
    """From the paper, in Python's integers."""
    c, k = list(counter), list(key)
    for _ in range(7):
        high0, low0 = divmod(0xD2511F53 * c[0], 2**32)
        high1, low1 = divmod(0xCD9E8D57 * c[2], 2**32)
        c = [high1 ^ c[1] ^ k[0], low1, high0 ^ c[3] ^ k[1], low0]
        k = [(k[0] + 0x9E3779B9) % 2**32, (k[1] + 0xBB67AE85) % 2**32]
    return tuple(c)


@pytest.mark.parametrize(("counter", "key", "result"), KNOWN)
def test_the_oracle_gives_the_known_answers(counter, key, result):
    assert philox(counter, key) == result


PROGRAM = r"""
#include <cstdio>

#include "blocks.h"

using namespace warpstep;

// Arguments are the counter and the key, as numbers in the base of 16.
int main(int, char** argument) {
  std::uint32_t c[4], k[2], words[kDrawn / 2];
  for (auto& word : c) std::sscanf(*++argument, "%x", &word);
  for (auto& word : k) std::sscanf(*++argument, "%x", &word);
  const Keys keys(k[0] | std::uint64_t{k[1]} << 32);
  const Draw from(keys, bits_as<float>(c[2]), c[3] / 8, c[3] % 8);
  draw(from, c[0] | std::uint64_t{c[1]} << 32, words);
  for (const std::uint32_t word : words) std::printf("%08x ", word);
}
"""


@pytest.fixture(scope="session")
def draw(tmp_path_factory):
    """The kernels' own draw(), in a program of its own."""
    compiler = shutil.which("c++") or pytest.skip("needs a C++ compiler")
    program = str(tmp_path_factory.mktemp("draw") / "draw")
    kernels = Path(__file__).parents[1] / "kernels"
    command = [compiler, "-std=c++17", f"-I{kernels}", "-xc++", "-", "-o", program]
    subprocess.run(command, input=PROGRAM.encode(), check=True)
    return program


@pytest.mark.parametrize(("counter", "key", "result"), KNOWN)
def test_the_kernels_draws_are_philoxs(draw, counter, key, result):
    arguments = [f"{word:x}" for word in (*counter, *key)]
    run = subprocess.run([draw, *arguments], check=True, capture_output=True, text=True)
    assert tuple(int(word, 16) for word in run.stdout.split()) == result


@pytest.mark.parametrize("first", [0, 3, 8 * 2**32 - 8, 2**40 + 5])
def test_draws_are_philoxs(first):
    seed, step, number, operand, count = 0x123456789ABCDEF0, 7.0, 11, 2, 40
    found = codecs.draws(seed, torch.tensor(step), number, operand, first, count)
    bits = int(np.float32(step).view(np.uint32))
    for i in range(count):
        index, which = divmod(first + i, 8)
        counter = (index % 2**32, index >> 32, bits, number * 8 + operand)
        word = philox(counter, (seed % 2**32, seed >> 32))[which // 2]
        assert found[i].item() == word >> 16 * (which % 2) & 0xFFFF


def special_numbers():
    numbers = [0.0, -0.0, 1.0, math.inf, -math.inf, math.nan, 1e-45, -1e-45, 2.0**-126, 3.4e38]
    bits = torch.tensor([0x7FFFFFFF, 0x7F7FFFFF, 0x3F808000, 0x3F818000, 0x00007FFF])
    bits = bits.to(torch.int32).view(torch.float32)
    return torch.cat([torch.tensor(numbers), bits, torch.randn(1000) * 10.0 ** torch.randn(1000)])


def test_a_master_is_two_halves_and_nothing_is_lost():
    numbers = special_numbers()
    high, low = codecs.split(numbers)
    again = codecs.joined(high, low)
    is_nan = numbers.isnan()
    assert torch.equal(again[~is_nan].view(torch.int32), numbers[~is_nan].view(torch.int32))
    assert again[is_nan].isnan().all()
    assert high[is_nan].isnan().all()  # Transformer Engine's would be -0.0 for 0x7fffffff


def test_the_parameter_is_the_nearest_bfloat16_of_its_master():
    numbers = special_numbers()
    numbers = numbers[numbers.isfinite() & (numbers.abs() < 3e38)]
    high, low = codecs.split(numbers)
    exact, half = numbers.double(), high.double()
    below = (high.view(torch.int16) - 1).view(torch.bfloat16).double()
    above = (high.view(torch.int16) + 1).view(torch.bfloat16).double()
    for other in (below, above):
        closer = (exact - other).abs() < (exact - half).abs()
        assert not (closer & other.isfinite() & (half != 0)).any()
    tie = low == -0x8000  # exactly half-way: to the larger magnitude
    assert tie.any()
    assert (half[tie].abs() > exact[tie].abs()).all()


def test_stochastic_rounding_goes_up_as_often_as_is_right():
    every = torch.arange(2**16, dtype=torch.int32)
    for low in (0, 1, 0x4000, 0x8000, 0xFFFF):
        number = torch.tensor(0x3F800000 + low, dtype=torch.int32).view(torch.float32)
        rounded = codecs.rounded_stochastic(number.expand(2**16), every)
        ups = (rounded.view(torch.int16) == 0x3F81).sum().item()
        assert ups == low  # of 65,536
        assert ups + (rounded == 1).sum().item() == 2**16


def test_stochastic_rounding_keeps_nans_infinities_and_what_is_exact():
    numbers = torch.tensor([math.nan, math.inf, -math.inf, 0.0, -0.0, 1.5, -2.0])
    for random in (0, 0xFFFF):
        rounded = codecs.rounded_stochastic(numbers, torch.full((7,), random, dtype=torch.int32))
        assert rounded[0].isnan()
        assert torch.equal(rounded[1:].float(), numbers[1:])
        assert torch.equal(rounded[1:].signbit(), numbers[1:].signbit())


# ---- 8 bits

KINDS = {"e4m3": (True, 15), "ue5m3": (False, 31)}
each_kind = pytest.mark.parametrize(("signed", "reach"), KINDS.values(), ids=KINDS)


def number_of(code, scale, signed, reach):
    """By the definition in kernels/blocks.h, in float64."""
    last = 0x7F if signed else 0xFF
    sign, code = (-1.0 if code > last else 1.0), code & last
    if code == 0:
        return sign * 0.0
    if code >= last - 1:
        return sign * (math.inf if code == last - 1 else math.nan)
    return sign * (1 + code % 8 / 8) * 2.0 ** (code // 8 - reach + scale - 127)


@each_kind
@pytest.mark.parametrize("scale", [0, 1, 40, 127, 254])
def test_every_code_is_the_number_that_it_is_defined_to_be(signed, reach, scale):
    codes = torch.arange(256).to(torch.uint8)
    found = codecs.decoded(codes, torch.full((4,), scale, dtype=torch.uint8), signed=signed)
    least = max(scale, reach + 1)  # so that every code is a normal float32
    expected = torch.tensor([number_of(int(c), least, signed, reach) for c in codes])
    beyond = expected.abs() > torch.finfo(torch.float32).max
    exact = torch.tensor([number_of(int(c), least, signed, reach) for c in codes]).double()
    assert torch.equal(found.isnan(), expected.isnan())
    fine = ~expected.isnan() & (exact.abs() <= torch.finfo(torch.float32).max)
    assert torch.equal(found[fine].double(), exact[fine])
    assert (scale < 254) or beyond.any() or fine.any()


def spread_numbers(signed, decades):
    numbers = torch.randn(640) * 10.0 ** (decades * (torch.rand(640) - 1))
    return numbers if signed else numbers.abs()


def encoded(numbers, signed, random=None):
    if not signed and random is None:
        random = torch.randint(0, 2**16, numbers.shape, dtype=torch.int32)
    return codecs.encoded(numbers, random=None if signed else random)


@each_kind
@pytest.mark.parametrize("decades", [0, 3, 8, 30])
def test_a_number_becomes_one_of_its_two_neighbours(signed, reach, decades):
    numbers = spread_numbers(signed, decades)
    codes, scales = encoded(numbers, signed)
    last = 0x7D if signed else 0xFD
    for block in range(10):
        scale = int(scales[block])
        table = np.array([number_of(c, scale, signed, reach) for c in range(last + 1)])
        of_block = slice(64 * block, 64 * block + 64)
        pairs = zip(numbers[of_block].double(), codes[of_block], strict=True)
        for number, code in pairs:
            magnitude, found = abs(number.item()), abs(number_of(int(code), scale, signed, reach))
            below = table[table <= magnitude].max()
            above = table[table >= magnitude].min()  # there is one: nothing is cut off
            assert found in (below, above)
            if signed:
                if magnitude < 1.125 * (least := 2.0 ** (scale - reach - 127)):
                    assert found == (0 if magnitude < 1.0625 * least else 1.125 * least)
                else:
                    assert abs(found - magnitude) <= min(magnitude - below, above - magnitude)
                assert number == 0 or found == 0 or (int(code) > 0x7F) == (number < 0)
            assert signed or (found > 0) == (magnitude > 0)


@each_kind
def test_the_scale_is_the_least_that_takes_the_largest_number(signed, reach):
    for largest, exponent in ((1.0, 127), (1.624, 127), (1.625, 128), (1.99, 128), (3e-3, 118)):
        numbers = torch.full((64,), largest / 4)
        numbers[7] = largest
        assert encoded(numbers, signed)[1].tolist() == [exponent]


@each_kind
def test_nan_and_infinities_stay_and_their_block_keeps_its_scale(signed, reach):
    numbers = spread_numbers(signed, 2)
    odd = numbers.clone()
    odd[5], odd[70], odd[71] = math.nan, math.inf, (-math.inf if signed else -1.0)
    _, scales = encoded(numbers, signed)
    codes, odd_scales = encoded(odd, signed)
    found = codecs.decoded(codes, odd_scales, signed=signed)
    assert found[5].isnan()
    assert found[70] == math.inf
    assert found[71] == -math.inf if signed else found[71].isnan()
    assert found.isfinite().sum() == 637
    assert (odd_scales.int() <= scales.int()).all()


def test_ue5m3_is_right_in_the_mean():
    """Over all random bits the mean is the number, to the 2^-17 that 16 of 20 bits leave."""
    numbers = torch.rand(64) + 0.5
    every = torch.arange(2**16, dtype=torch.int32)
    total = torch.zeros(64, dtype=torch.float64)
    for random in every.split(256):
        block = numbers.expand(256, 64).reshape(-1)
        codes, scales = codecs.encoded(block, random=random.repeat_interleave(64))
        total += codecs.decoded(codes, scales, signed=False).view(256, 64).double().sum(0)
    ulp = 2.0**-3
    assert ((total / 2**16 - numbers.double()).abs() <= ulp * 2.0**-17).all()


@each_kind
def test_positive_numbers_never_become_zero_beside_a_large_one(signed, reach):
    numbers = torch.full((64,), 1e-30)
    numbers[0] = 1.0
    codes, scales = encoded(numbers, signed)
    found = codecs.decoded(codes, scales, signed=signed)
    assert (found[1:] == 0).all() if signed else (found[1:] > 0).all()
    assert encoded(torch.zeros(64), signed)[0].tolist() == [0] * 64


@each_kind
def test_a_last_block_may_be_short(signed, reach):
    numbers = spread_numbers(signed, 1)[:70]
    random = torch.randint(0, 2**16, (128,), dtype=torch.int32)
    codes, scales = encoded(numbers, signed, random[:70])
    padded, padded_scales = encoded(torch.cat([numbers, torch.zeros(58)]), signed, random)
    assert torch.equal(codes, padded[:70])
    assert torch.equal(scales, padded_scales)
    decoded = codecs.decoded(codes, scales, signed=signed)
    assert torch.equal(decoded, codecs.decoded(padded, scales, signed=signed)[:70])


def test_a_negative_number_among_squares_is_nan_and_no_part_of_the_scale():
    """As the kernels have it: only a state from elsewhere, or a beta beyond one, has such."""
    numbers = torch.full((64,), 0.25)
    numbers[3], numbers[9] = -1000.0, -0.0
    codes, scales = encoded(numbers, signed=False)
    assert scales.tolist() == [125]
    found = codecs.decoded(codes, scales, signed=False)
    assert found.isnan().nonzero().flatten().tolist() == [3]
    assert found[9] == 0
    assert (found[10:] == 0.25).all()
