"""8-bit moments on the CPU: blocks in registers (kernels/cpu/eight_bit.h) leave the bits of tiles.

Statistics change no bit and go through tiles, so an optimizer with them is the other one's oracle.
"""

import shutil
import subprocess
from pathlib import Path

import numpy
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.nn import Parameter

import warpstep
from support.bits import raw_bits

BF16, F32 = torch.bfloat16, torch.float32
RECIPES = {
    "float32": (F32, {}),
    "nearest": (BF16, {"rounding": "nearest"}),
    "stochastic": (BF16, {"rounding": "stochastic"}),
    "master": (BF16, {"master": "residual"}),
}
CODES = {"exp_avg_codes": 0x7E, "exp_avg_sq_codes": 0xFE}  # the first that is no number
SCALES = ("exp_avg_scale", "exp_avg_sq_scale")
# Zeros, the least and the largest, and all that is no number: the bits of a bfloat16, or a byte's.
SPECIAL_NUMBERS = (0x0000, 0x8000, 0x0001, 0x8001, 0x7F7F, 0xFF7F, 0x7F80, 0xFF80, 0x7FC0, 0xFFFF)
SPECIAL_CODES = (0x00, 0x01, 0x7D, 0x7E, 0x7F, 0x80, 0x81, 0xFD, 0xFE, 0xFF)
SPECIAL_SCALES = (0, 1, 15, 16, 17, 31, 32, 33, 253, 254, 255)


def numbers(dtype, random, size):
    """Of either sign, over many decades."""
    magnitudes = numpy.exp2(random.uniform(-40, 10, size))
    signs = random.choice((-1.0, 1.0), size)
    return torch.from_numpy(magnitudes * signs).to(dtype)


def put(tensor, specials, choices, random):
    """Writes some of `choices` somewhere into a tensor of numbers or bytes."""
    for _ in range(specials):
        bits = int(random.choice(choices))
        if tensor.dtype != torch.uint8:
            bits = torch.tensor(bits << 16, dtype=torch.uint32).view(torch.float32)
        tensor.view(-1)[int(random.integers(tensor.numel()))] = bits


@pytest.mark.parametrize("recipe", RECIPES)
@settings(deadline=None, max_examples=60)
@given(
    seed=st.integers(0, 2**32 - 1),
    rows=st.integers(64, 72),
    specials=st.fixed_dictionaries(
        {k: st.sampled_from((0, 0, 0, 1, 3)) for k in ("param", "grad", "codes", "scales")}
    ),
    scales=st.sampled_from(((100, 130), (0, 256), (250, 256))),
    options=st.fixed_dictionaries(
        {
            "lr": st.sampled_from((1e-3, 0.0, 10.0, 1e30)),
            "betas": st.sampled_from(((0.9, 0.999), (0.0, 0.0), (0.4, 0.6), (0.99, 0.9999))),
            "eps": st.sampled_from((1e-8, 0.0, 1.0)),
            "weight_decay": st.sampled_from((0.01, 0.0, 0.5, 1e10)),
            "maximize": st.booleans(),
        }
    ),
    sign=st.sampled_from((1, -1)),
    flush=st.booleans(),
)
def test_blocks_in_registers_have_the_bits_of_tiles(
    recipe, seed, rows, specials, scales, options, sign, flush
):
    random = numpy.random.default_rng(seed)
    size = (rows, 64)
    dtype, kept = RECIPES[recipe]
    start = numbers(dtype, random, size)
    twins = []
    for stats in (False, True):
        p = Parameter(start.clone())
        p.grad = torch.zeros_like(p)
        o = warpstep.AdamW([p], state_dtype="8bit", stats=stats, seed=7, **kept, **options)
        o.step()
        twins.append((o, p))
    (mine, p), (other, q) = twins
    state = mine.state[p]
    for step in range(2):
        with torch.no_grad():
            p.grad.copy_(numbers(dtype, random, size))
            put(p.grad, specials["grad"], SPECIAL_NUMBERS, random)
            put(p.data, specials["param"], SPECIAL_NUMBERS, random)
            for name, end in CODES.items():
                state[name].copy_(torch.from_numpy(random.integers(0, end, size)))
                put(state[name], specials["codes"], SPECIAL_CODES, random)
            for name in SCALES:
                state[name].copy_(torch.from_numpy(random.integers(*scales, state[name].shape)))
                put(state[name], specials["scales"], SPECIAL_SCALES, random)
            if "master_param" in state:
                state["master_param"].random_(-(2**15), 2**15)
            q.data.copy_(p.data), q.grad.copy_(p.grad)
            for name, value in state.items():
                other.state[q][name].copy_(value)
        for o in (mine, other):
            o.param_groups[0]["lr"] = sign * options["lr"]  # which AdamW() does not take
        torch.set_flush_denormal(flush)
        try:
            mine.step(), other.step()
        finally:
            torch.set_flush_denormal(False)
        assert torch.equal(raw_bits(p), raw_bits(q)), step
        for name, value in state.items():
            assert torch.equal(raw_bits(value), raw_bits(other.state[q][name])), (name, step)


@pytest.mark.parametrize("recipe", ["stochastic", "master"])
@pytest.mark.parametrize("first", [0, 64, 2**35 - 1024, 2**38 - 64])
def test_ranges_have_the_bits_of_their_blocks(recipe, first):
    """Ranges of a parameter, by blocks in registers and each block alone, which goes through tiles.

    At 2^35 elements the index of random bits takes a second word.
    """
    random = numpy.random.default_rng(0)
    size = 4096
    operands = {
        "params": numbers(BF16, random, size),
        "grads": numbers(BF16, random, size),
        "exp_avgs": torch.from_numpy(random.integers(0, 0x7E, size).astype("uint8")),
        "exp_avg_sqs": torch.from_numpy(random.integers(0, 0xFE, size).astype("uint8")),
        "exp_avg_scales": torch.full((size // 64,), 120, dtype=torch.uint8),
        "exp_avg_sq_scales": torch.full((size // 64,), 110, dtype=torch.uint8),
    }
    if recipe == "master":
        operands["residuals"] = torch.zeros(size, dtype=torch.int16)

    def stepped(pieces):
        mine = {name: value.clone() for name, value in operands.items()}
        cut = {name: mine[name].chunk(pieces) for name in mine}
        warpstep.functional.adamw_(
            **{name: list(parts) for name, parts in cut.items()},
            max_exp_avg_sqs=[],
            state_steps=[torch.tensor(3.0) for _ in range(pieces)],
            param_indices=[5] * pieces,
            first_elements=[first + i * size // pieces for i in range(pieces)],
            lr=1e-3,
            beta1=0.9,
            beta2=0.999,
            eps=1e-8,
            weight_decay=0.1,
            rounding="stochastic" if recipe == "stochastic" else None,
            seed=3,
        )
        return mine

    whole, alone = stepped(1), stepped(size // 64)
    for name, value in whole.items():
        assert torch.equal(raw_bits(value), raw_bits(alone[name])), name
        assert name == "grads" or not torch.equal(raw_bits(value), raw_bits(operands[name]))


@pytest.mark.not_quick
def test_groups_of_avx512_have_the_bits_of_tiles_on_any_machine(tmp_path):
    """Their code is compared where it cannot run, by stand-ins for the processor's instructions."""
    if (compiler := shutil.which("c++")) is None:
        pytest.skip("needs a C++ compiler")
    emulation = Path(__file__).parent / "emulation"
    folders = [f"-I{emulation / 'avx512'}", f"-I{emulation.parent.parent / 'kernels'}"]
    flags = ["-std=c++17", "-O1", "-w", "-ffp-contract=off", *folders]
    program = tmp_path / "blocks"
    subprocess.run([compiler, *flags, emulation / "blocks.cpp", "-o", program], check=True)
    run = subprocess.run([program, "1400"], capture_output=True, text=True, check=True)
    differ, by_vectors = map(int, run.stdout.split())
    assert differ == 0
    # But for a first beta of 0, and random bits whose index begins with one word and ends with two.
    assert by_vectors > 1400 / 3
