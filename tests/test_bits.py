"""The same bits: whatever the threads, the instruction set, the grouping, the cuts, the run."""

import os
import subprocess
import sys

import pytest
import torch
from torch.nn import Parameter

import warpstep
from support.environment import INTERPRETED
from test_conformance import OPTIONS, RECIPES, make, optimizer_for, set_grad

SIZES = (1, 5, 16, 100, 16384, 20011)
INT_OF_SIZE = {8: torch.int64, 4: torch.int32, 2: torch.int16}


def bits(tensor):
    tensor = tensor.detach().cpu()
    tensor = torch.where(tensor.isnan(), torch.full_like(tensor, float("nan")), tensor)
    return tensor.contiguous().view(INT_OF_SIZE[tensor.element_size()])


def assert_same_bits(first, second):
    """Of two optimizers' parameters and states, in order; NaNs count as one value."""
    params = [[p for g in o.param_groups for p in g["params"]] for o in (first, second)]
    for p, q in zip(*params, strict=True):
        assert torch.equal(bits(p), bits(q))
        for key, value in first.state[p].items():
            assert torch.equal(bits(value), bits(second.state[q][key])), key


def train(recipe, options, backend, device, steps=3, sizes=SIZES, groups_of=lambda ps: ps):
    """An optimizer that has taken `steps` steps on data that depend on the arguments only."""
    generator = torch.Generator().manual_seed(0)
    params = [Parameter(make(n, recipe[0], device, generator)) for n in sizes]
    optimizer = optimizer_for(groups_of(params), options, recipe, backend)
    for t in range(steps):
        for param in params:
            # Every magnitude, subnormal numbers and overflow included.
            scale = 10.0 ** torch.randint(-30, 20, (param.numel(),), generator=generator)
            grad = torch.randn(param.numel(), generator=generator) * (scale if t == 1 else 1)
            set_grad(param, grad.to(device, recipe[1]))
        optimizer.step()
    return optimizer


@pytest.mark.parametrize("options", OPTIONS.values(), ids=OPTIONS.keys())
@pytest.mark.parametrize("recipe", RECIPES.values(), ids=RECIPES.keys())
def test_every_backend_gives_the_cpus_bits(backend, device, recipe, options):
    """CUDA and Triton do. torch's operations fuse nothing, nor does the interpreter in float64."""
    mine = train(recipe, options, backend, device)
    if backend == "reference" or (INTERPRETED and recipe[0] == torch.float64):
        again = train(recipe, options, backend, device)
    else:
        again = train(recipe, options, "cpu", "cpu")
    assert_same_bits(mine, again)


def train_tail(recipe, backend, device):
    """Two steps with all that can go into the pass. The inf-norm has the same bits everywhere."""
    generator = torch.Generator().manual_seed(0)
    params = [Parameter(make(n, recipe[0], device, generator)) for n in (0, 3, 1000, 20_011)]
    options = OPTIONS["cautious-decay"]
    optimizer = optimizer_for(params, options, recipe, backend, ema_decay=0.7, stats=True)
    for _ in range(2):
        for param in params:
            set_grad(param, make(param.shape, recipe[1], device, generator))
        optimizer.clip_grad_norm_(1e9)  # whose sums have not
        optimizer.clip_grad_norm_(0.5, float("inf"))
        optimizer.step(zero_grads=True)
        assert all(not param.grad.any() for param in params)
        assert optimizer.statistics().nonfinite.sum() == 0
    return optimizer


@pytest.mark.parametrize("recipe", RECIPES.values(), ids=RECIPES.keys())
def test_the_tail_gives_the_cpus_bits(backend, device, recipe):
    mine = train_tail(recipe, backend, device)
    unfused = backend == "reference" or (INTERPRETED and recipe[0] == torch.float64)
    other = (backend, device) if unfused else ("cpu", "cpu")
    assert_same_bits(mine, train_tail(recipe, *other))


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
    """Pieces begin at other alignments and have other chunks, heads and tails."""
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
import hashlib, torch, warpstep, test_bits
digest = hashlib.sha256()
for recipe in test_bits.RECIPES.values():
    for options in test_bits.OPTIONS.values():
        o = test_bits.train(recipe, options, "cpu", "cpu")
        for p in o.param_groups[0]["params"]:
            for t in (p, *o.state[p].values()):
                digest.update(test_bits.bits(t).numpy().tobytes())
print(warpstep.status().native["CPU code"], digest.hexdigest())
"""


@pytest.mark.not_quick
def test_instruction_sets():
    """Every copy of the CPU kernel that this machine can run, each in a process of its own."""
    digests = {}
    for isa in ("baseline", "avx2", "avx512"):
        environment = {**os.environ, "WARPSTEP_ISA": isa, "PYTHONPATH": os.path.dirname(__file__)}
        run = subprocess.run(
            [sys.executable, "-c", _DIGEST], env=environment, capture_output=True, text=True
        )
        assert run.returncode == 0, run.stderr
        used, digest = run.stdout.split()
        digests[used] = digest  # a set that is missing here falls back to the widest
    assert "baseline" in digests
    assert len(set(digests.values())) == 1, digests
