"""Codecs in plain PyTorch: kernels/blocks.h, bit for bit.

The reference steps with them, and states are converted with them. Numbers are float32 and flat, in
the order in which the operand has them in memory.
"""

from __future__ import annotations

import torch
from torch import Tensor

BLOCK = 64  # numbers that share a scale
_DRAWN = 8  # elements that share a value of the generator's counter


def joined(high: Tensor, residual: Tensor) -> Tensor:
    """The float32 that a bfloat16 and its int16 residual make."""
    bits = (high.view(torch.int16).to(torch.int32) << 16) + residual.to(torch.int32)
    return bits.view(torch.float32)


def split(numbers: Tensor) -> tuple[Tensor, Tensor]:
    """The nearest bfloat16 of each float32, ties away from zero, and the residual. A NaN is one."""
    bits = numbers.contiguous().view(torch.int32)
    bits = torch.where(numbers.isnan(), 0x7FFF0000, bits)
    high = (bits + 0x8000 >> 16).to(torch.int16).view(torch.bfloat16)
    return high, bits.to(torch.int16)


def draws(seed: int, step: Tensor, number: int, operand: int, first: int, count: int) -> Tensor:
    """16 random bits for each of the elements [first, first + count), as int32.

    Philox4x32 with 7 rounds: ``seed`` is its key; the element's index, the float32 ``step`` after
    the step, the parameter's ``number`` and the ``operand`` are its counter.

    Source: Salmon et al., Parallel random numbers: as easy as 1, 2, 3 (2011).
    """
    begin, end = first // _DRAWN, -(-(first + count) // _DRAWN)
    index = torch.arange(begin, end, dtype=torch.int64, device=step.device)
    c0, c1 = index & 0xFFFFFFFF, index >> 32
    c2 = (step.view(torch.int32).to(torch.int64) & 0xFFFFFFFF).expand_as(index)
    c3 = torch.full_like(index, (number * 8 + operand) & 0xFFFFFFFF)
    k0, k1 = seed & 0xFFFFFFFF, seed >> 32 & 0xFFFFFFFF
    for _ in range(7):
        high0, low0 = _product(0xD2511F53, c0)
        high1, low1 = _product(0xCD9E8D57, c2)
        c0, c1, c2, c3 = high1 ^ c1 ^ k0, low1, high0 ^ c3 ^ k1, low0
        k0, k1 = (k0 + 0x9E3779B9) & 0xFFFFFFFF, (k1 + 0xBB67AE85) & 0xFFFFFFFF
    words = torch.stack([c0, c1, c2, c3], dim=1)
    halves = torch.stack([words & 0xFFFF, words >> 16], dim=2).flatten()
    past = first - begin * _DRAWN
    return halves[past : past + count].to(torch.int32)


def _product(a: int, b: Tensor) -> tuple[Tensor, Tensor]:
    """The upper and the lower 32 bits of a product of two numbers of 32 bits."""
    low = a * (b & 0xFFFF)
    high = a * (b >> 16) + (low >> 16)
    return high >> 16, (high << 16 | low & 0xFFFF) & 0xFFFFFFFF


def rounded_stochastic(numbers: Tensor, random: Tensor) -> Tensor:
    """One of the two neighbouring bfloat16 of each float32, right in the mean."""
    bits = (numbers.contiguous().view(torch.int32) + random) >> 16
    return torch.where(numbers.isnan(), 0x7FFF, bits).to(torch.int16).view(torch.bfloat16)


def decoded(codes: Tensor, scales: Tensor, *, signed: bool) -> Tensor:
    """The numbers of uint8 codes in blocks: e4m3 if ``signed``, else ue5m3."""
    nan, reach = (0x7F, 15) if signed else (0xFF, 31)
    base = ((scales.to(torch.int32) - reach).clamp(min=1) << 23).repeat_interleave(BLOCK)
    codes = codes.to(torch.int32)
    code = codes & nan
    bits = torch.where(code == 0, 0, (code << 20) + base[: len(code)])
    bits = torch.where(code < nan - 1, bits, 0x7F800000 | (code & 1) << 22)
    numbers = bits.view(torch.float32)
    return torch.where(codes > nan, -numbers, numbers)


def encoded(numbers: Tensor, *, random: Tensor | None) -> tuple[Tensor, Tensor]:
    """Codes and scales: e4m3 rounded to nearest, or with ``random`` bits ue5m3, by them."""
    signed = random is None
    nan, reach = (0x7F, 15) if signed else (0xFF, 31)
    bits = numbers.contiguous().view(torch.int32)
    magnitude = bits & 0x7FFFFFFF
    if not signed:
        magnitude = torch.where(numbers >= 0, magnitude, 0x7FFFFFFF)
    finite = torch.where(magnitude < 0x7F800000, magnitude, 0)
    padded = torch.nn.functional.pad(finite, (0, -len(finite) % BLOCK))
    largest = padded.view(-1, BLOCK).amax(dim=1)
    scales = ((largest + 0x300000) >> 23).clamp(min=reach + 1)
    base = ((scales - reach) << 23).repeat_interleave(BLOCK)[: len(magnitude)]
    if random is None:
        code = (magnitude - base + 0x80000 >> 20).clamp(min=0)
    else:
        code = magnitude - base + 8 + (random << 4) >> 20
        code = torch.maximum(code, magnitude.clamp(max=1))
    code = torch.where(magnitude > 0x7F800000, nan, code)
    code = torch.where(magnitude == 0x7F800000, nan - 1, code)
    if signed:
        code = code | (bits >> 24 & 0x80)
    return code.to(torch.uint8), scales.to(torch.uint8)
