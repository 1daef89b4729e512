"""The same bits: whatever the threads, the instruction set, the grouping, the cuts, the run."""

import math
import os
from pathlib import Path

import pytest
import torch
from torch.nn import Parameter

import warpstep
from support import programs
from support.bits import assert_same_bits, bits, train, train_tail
from support.cases import each_recipe, each_recipe_with_options
from support.environment import INTERPRETED
from support.recipes import OPTIONS, RECIPES, make


@each_recipe_with_options
def test_every_backend_gives_the_cpus_bits(backend, device, recipe, options):
    """CUDA and Triton do. torch's operations fuse nothing, nor does the interpreter in float64."""
    mine = train(recipe, options, backend, device)
    if backend == "reference" or (INTERPRETED and recipe[0] == torch.float64):
        again = train(recipe, options, backend, device)
    else:
        again = train(recipe, options, "cpu", "cpu")
    assert_same_bits(mine, again)


@each_recipe
def test_the_tail_gives_the_cpus_bits(backend, device, recipe):
    mine = train_tail(recipe, backend, device)
    unfused = backend == "reference" or (INTERPRETED and recipe[0] == torch.float64)
    other = (backend, device) if unfused else ("cpu", "cpu")
    assert_same_bits(mine, train_tail(recipe, *other))


@pytest.mark.parametrize("maximize", [False, True])
@pytest.mark.parametrize("betas", [(0.0, 0.0), (0.9, 0.99)])
def test_zeros_have_the_cpus_signs(backend, device, betas, maximize):
    """Of gradients, moments and a coefficient of clipping, and with factors that are zero."""
    signed = torch.tensor([0.0, -0.0, 1.0, -1.0])
    optimizers = []
    for where, kind in ((device, backend), ("cpu", "cpu")):
        params = [Parameter(signed.repeat(4).to(where)) for _ in range(2)]
        options = {"betas": betas, "maximize": maximize, "ema_decay": 0.0}
        optimizers.append(warpstep.Adam(params[:1], backend=kind, **options))
        sgd = warpstep.SGD(params[1:], momentum=0.9, maximize=maximize, backend=kind)
        optimizers.append(sgd)
        for max_norm in (1.0, 0.0, 0.0, 1.0):
            for param, optimizer in zip(params, optimizers[-2:], strict=True):
                param.grad = signed.repeat_interleave(4).to(where)
                optimizer.clip_grad_norm_(max_norm, math.inf)
                optimizer.step()
    if backend != "reference":
        assert_same_bits(optimizers[0], optimizers[2])
        assert_same_bits(optimizers[1], optimizers[3])


@pytest.mark.parametrize("threads", [1, 2, 3, 8])
def test_threads(threads):
    before = torch.get_num_threads()
    baseline = train(RECIPES["float32"], OPTIONS["default"], "cpu", "cpu")
    torch.set_num_threads(threads)
    try:
        other = train(RECIPES["float32"], OPTIONS["default"], "cpu", "cpu")
    finally:
        torch.set_num_threads(before)
    assert_same_bits(baseline, other)


def test_grouping(backend, device):
    one_group = train(RECIPES["float32"], OPTIONS["default"], backend, device)
    many = train(
        RECIPES["float32"],
        OPTIONS["default"],
        backend,
        device,
        groups_of=lambda params: [{"params": [p]} for p in params],
    )
    assert_same_bits(one_group, many)


@pytest.mark.parametrize("cut", [1, 3, 1000, 16384, 25000])
def test_a_tensor_in_two_pieces(backend, device, cut):
    """Pieces begin at other alignments and have other chunks, heads and rests."""
    generator = torch.Generator().manual_seed(0)
    size = 40_000
    start, *grads = (make(size, torch.float32, device, generator) for _ in range(4))
    whole = Parameter(start.clone())
    base = start.clone()
    pieces = [Parameter(base[:cut]), Parameter(base[cut:])]
    optimizers = [warpstep.AdamW(ps, backend=backend) for ps in ([whole], pieces)]
    for grad in grads:
        whole.grad = grad.clone()
        pieces[0].grad, pieces[1].grad = grad[:cut].clone(), grad[cut:].clone()
        for optimizer in optimizers:
            optimizer.step()
    assert torch.equal(bits(whole), bits(base))


_DIGEST = """
import hashlib, itertools, sys, torch, warpstep
sys.path.insert(0, sys.argv[1])
from functools import partial
from torch.nn import Parameter
from support import low_precision
from support.bits import bits, raw_bits, train
from support.cases import covering_pairs
from support.parameters import random
from support.recipes import KERNELS, OPTIONS, RECIPES
digest = hashlib.sha256()
for recipe, options in covering_pairs(OPTIONS, KERNELS):
    o = train(RECIPES[recipe], OPTIONS[options], "cpu", "cpu")
    for p in o.param_groups[0]["params"]:
        for t in (p, *o.state[p].values()):
            digest.update(bits(t).numpy().tobytes())
tails = ({}, {"amsgrad": True, "ema_decay": 0.9, "stats": True})
for recipe, tail in itertools.product(low_precision.RECIPES.values(), tails):
    params = low_precision.new_params()
    o = warpstep.AdamW(params, seed=5, **tail, **recipe)
    for step in range(3):
        for i, p in enumerate(params):
            p.grad = random(p.shape, 100 * step + i).to(p.dtype)
        o.step()
    for p in params:
        for t in (p, *o.state[p].values()):
            digest.update(raw_bits(t.flatten()).numpy().tobytes())
# All bits that there are, NaN and subnormal numbers among them.
def any_bits(size):
    return torch.randint(-(2**15), 2**15, (size,), dtype=torch.int16).view(torch.bfloat16)
torch.manual_seed(0)
rules = {
    "adamw": warpstep.AdamW,
    "amsgrad": partial(warpstep.AdamW, amsgrad=True),
    "l1": partial(warpstep.AdamW, decay_form="l1"),
    "sgd": warpstep.SGD,
    "momentum": partial(warpstep.SGD, momentum=0.9),
    "nesterov": partial(warpstep.SGD, momentum=0.9, nesterov=True),
    "stochastic": partial(warpstep.AdamW, rounding="stochastic"),
    "residual": partial(warpstep.AdamW, master="residual", state_dtype=torch.bfloat16),
}
for flush, new, size in itertools.product((False, True), rules.values(), (33, 5000)):
    torch.set_flush_denormal(flush)
    p = Parameter(any_bits(size))
    o = new([p], lr=0.1)
    for step in range(3):
        p.grad = any_bits(size)
        o.step()
        for name, t in o.state[p].items():
            digest.update(raw_bits(t).numpy().tobytes())
            if t.dtype == torch.bfloat16:
                t.copy_(any_bits(size).abs() if name.endswith("sq") else any_bits(size))
        digest.update(raw_bits(p).numpy().tobytes())
        p.data.copy_(any_bits(size))
print(warpstep.status().native["CPU code"], digest.hexdigest())
"""


@pytest.mark.not_quick
def test_instruction_sets():
    """Every copy of the CPU kernel that this machine can run, each in a process of its own."""
    digests = {}
    for isa in ("baseline", "avx2", "avx512", "avx512_bf16"):
        run = programs.run(_DIGEST, os.path.dirname(__file__), WARPSTEP_ISA=isa)
        assert run.returncode == 0, run.stderr
        used, digest = run.stdout.split()
        digests[used] = digest  # a set that is missing here falls back to the widest
    flags = Path("/proc/cpuinfo").read_text() if os.path.exists("/proc/cpuinfo") else ""
    here = {"avx2", "avx512_bf16"} & set(flags.split())
    assert digests.keys() >= {"baseline", *here}
    assert len(set(digests.values())) == 1, digests
