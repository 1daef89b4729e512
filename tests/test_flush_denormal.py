"""Steps under `torch.set_flush_denormal(True)`: float16's subnormal numbers are none in float32.

They are numbers down to 6e-8 there, and a processor that takes float32's subnormal numbers for zero
must not touch them. What is subnormal in the format of the arithmetic is zero, as in torch.
"""

from contextlib import contextmanager

import numpy as np
import pytest
import torch
from torch.nn import Parameter

import warpstep
from support import oracle
from support.bits import assert_same_bits
from support.cases import each_recipe_with_options
from support.conformance import assert_step, streams_of, zeros_of
from support.oracle import ROUNDOFF, Options
from support.recipes import F16, F32, RECIPES, make, optimizer_for, set_grad

TINIEST = {torch.float64: 2.0**-1074, F32: 2.0**-149, torch.bfloat16: 2.0**-133, F16: 2.0**-24}


@contextmanager
def flushing():
    """The flag, in this thread, which then is the only one."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    if not torch.set_flush_denormal(True):
        pytest.skip("this processor cannot flush subnormal numbers")
    try:
        yield
    finally:
        torch.set_flush_denormal(False)
        torch.set_num_threads(threads)


def small(size, dtype, device, generator, least=2.0**-24):
    """Numbers of every magnitude from ``least`` to 1, of either sign."""
    exponents = torch.rand(size, generator=generator, dtype=torch.float64) * np.log2(least)
    signs = torch.randint(0, 2, (size,), generator=generator) * 2 - 1
    return (signs * 2**exponents).to(device=device, dtype=dtype)


def test_a_small_gradient_moves_its_parameter(backend, device):
    param = Parameter(torch.ones(5, dtype=F16, device=device))
    param.grad = torch.full_like(param, 3e-5)
    optimizer = warpstep.AdamW([param], lr=0.1, weight_decay=0.0, eps=1e-12, backend=backend)
    with flushing():
        optimizer.step()
    assert torch.equal(param.detach().cpu(), torch.full((5,), 0.9, dtype=F16))


def test_every_float16_is_read_and_written_back(backend, device):
    patterns = torch.arange(-(2**15), 2**15, dtype=torch.int32).to(torch.int16)
    values = patterns.view(F16)
    param = Parameter(values.clone().to(device))
    param.grad = torch.zeros_like(param)
    optimizer = warpstep.AdamW([param], lr=0.0, weight_decay=0.0, backend=backend)
    with flushing():
        optimizer.step()
    kept = ~values.isnan()
    assert torch.equal(param.detach().cpu().view(torch.int16)[kept], patterns[kept])
    assert param.detach().cpu()[~kept].isnan().all()


@each_recipe_with_options
def test_the_oracle_is_met_under_the_flag(backend, device, recipe, options):
    """With numbers down to float16's least, every product of the rule is a normal float32."""
    generator = torch.Generator().manual_seed(3)
    params = [Parameter(small(n, recipe[0], device, generator)) for n in (1, 77, 1000)]
    optimizer = optimizer_for(params, options, recipe, backend)
    take = optimizer.step

    def step():
        with flushing():
            take()

    optimizer.step = step
    for t in (1, 2):
        grads = [small(p.numel(), recipe[1], device, generator) for p in params]
        for param, grad in zip(params, grads, strict=True):
            set_grad(param, grad)
        before = [
            streams_of(optimizer, p) if t > 1 else zeros_of(p, options.amsgrad) for p in params
        ]
        assert_step(optimizer, params, t, lambda _: options, grads, before)


HALF = {name: recipe for name, recipe in RECIPES.items() if F16 in recipe}


@pytest.mark.parametrize("recipe", HALF.values(), ids=HALF.keys())
def test_the_flag_changes_no_bit_of_a_tail_in_float16(backend, device, recipe):
    """Clipped, stepped, averaged, counted and zeroed, beside the same without the flag."""

    def train():
        generator = torch.Generator().manual_seed(4)
        params = [Parameter(small(n, recipe[0], device, generator)) for n in (3, 2000)]
        more = {"ema_decay": 0.75, "ema_dtype": F16, "stats": True}
        optimizer = optimizer_for(params, Options(lr=1e-4), recipe, backend, **more)
        for _ in range(3):
            for param in params:
                set_grad(param, small(param.numel(), recipe[1], device, generator))
            optimizer.clip_grad_norm_(1e-3)
            optimizer.step(zero_grads=True)
        return optimizer

    with flushing():
        flushed = train()
    plain = train()
    assert_same_bits(flushed, plain)
    for name in ("grad_norm", "param_norm", "update_norm"):
        found, expected = (getattr(o.statistics(), name) for o in (flushed, plain))
        assert torch.equal(found, expected), name


@pytest.mark.parametrize("kind", [2.0, float("inf")])
def test_the_norm_of_small_gradients(backend, device, kind):
    generator = torch.Generator().manual_seed(5)
    params = [Parameter(torch.zeros(n, dtype=F16, device=device)) for n in (1, 999)]
    for param in params:
        param.grad = (make(param.shape, F32, device, generator) * 1e-5).to(F16)
    optimizer = warpstep.AdamW(params, backend=backend)
    with flushing():
        norm = optimizer.clip_grad_norm_(1.0, kind).item()
    exact = float(oracle.exact_norm(params, kind))
    assert norm == pytest.approx(exact, rel=1.001 * ROUNDOFF[F32])  # sums in float64


@pytest.mark.parametrize("dtype", TINIEST, ids=str)
def test_other_subnormal_numbers_are_what_torch_takes_them_for(backend, device, dtype):
    """Torch's fused step under the flag: the same elements zero, the others as near as ever."""
    arithmetic = torch.float64 if dtype == torch.float64 else F32
    info = torch.finfo(arithmetic)
    some = [0.0, TINIEST[dtype], 77 * TINIEST[dtype], -500 * TINIEST[dtype], 0.5, -2.0]
    values = torch.tensor(some, dtype=torch.float64)
    start, grad, moment = (t.flatten() for t in torch.meshgrid(*3 * [values], indexing="ij"))
    results = []
    for kind, where in ((warpstep.AdamW, device), (torch.optim.AdamW, "cpu")):
        param = Parameter(start.to(where, dtype, copy=True))
        param.grad = grad.to(where, dtype, copy=True)
        more = {"fused": True} if kind is torch.optim.AdamW else {"backend": backend}
        optimizer = kind([param], lr=1e-3, weight_decay=0.5, **more)
        optimizer.state[param] = {
            "step": torch.tensor(5.0, device=where),
            "exp_avg": moment.to(where, dtype, copy=True),
            "exp_avg_sq": moment.abs().to(where, dtype),
        }
        with flushing():
            optimizer.step()
        state = optimizer.state[param]
        results.append([t.detach().cpu() for t in (param, state["exp_avg"], state["exp_avg_sq"])])
    for found, expected in zip(*results, strict=True):
        difference = (found.double() - expected.double()).abs()
        # A few roundings of what is stored and of the update, which is below 1e-3 * sqrt(6);
        # and what is flushed in one order of the operations and not in the other.
        bound = 4 * torch.finfo(dtype).eps * (expected.double().abs() + 1e-2) + 2 * info.tiny
        assert (difference <= bound).all()
