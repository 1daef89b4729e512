"""unscale_grads=True: the step leaves gradients as torch would have: unscaled and clipped."""

import copy
import pickle

import numpy as np
import pytest
import torch
from torch.nn import Parameter
from torch.nn.utils import clip_grad_norm_

import warpstep
from support import oracle
from support.bits import raw_bits
from support.cases import each_recipe
from support.oracle import ROUNDOFF, Options
from support.recipes import BF16, F32, F64, SIZES, give_gradients, model, optimizer_for, set_grad

SCALE = 48.0  # no power of two: its reciprocal is rounded


def scaler_on(device):
    scaler = torch.amp.GradScaler(device, init_scale=SCALE)
    scaler.scale(torch.ones((), device=device))  # makes the scale, as scaling a loss does
    return scaler


def give_same(params, twins):
    for param, twin in zip(params, twins, strict=True):
        set_grad(twin, param.grad.clone())


def assert_left(grads, before, factor):
    """In the format's one rounding, after two of the factor and one of the product."""
    for grad, old in zip(grads, before, strict=True):
        u = ROUNDOFF[F64 if grad.dtype == F64 else F32]
        exact = old * oracle.WIDE(factor)
        finest = torch.finfo(grad.dtype).smallest_normal * torch.finfo(grad.dtype).eps
        bound = (3.01 * u + ROUNDOFF[grad.dtype]) * np.abs(exact) + finest / 2
        assert np.all(np.abs(oracle.wide(grad) - exact) <= bound)


@each_recipe
@pytest.mark.parametrize("maximize", [False, True])
@pytest.mark.parametrize("max_norm", [None, 0.37])
def test_left_unscaled_and_clipped(backend, device, recipe, max_norm, maximize):
    """And the step is the same, bit for bit, as one that only reads them."""
    params, generator = model(recipe, device, sizes=SIZES)
    twins = [Parameter(p.detach().clone()) for p in params]
    options = Options(maximize=maximize)
    mine = optimizer_for(params, options, recipe, backend, unscale_grads=True, fused=True)
    plain = optimizer_for(twins, options, recipe, backend, fused=True)
    for _ in range(2):
        give_gradients(params, recipe, generator, scale=SCALE)
        give_same(params, twins)
        before = [oracle.wide(p.grad) for p in params]
        factor = oracle.WIDE(1) / SCALE
        if max_norm is not None:
            factor *= min(1, max_norm / (oracle.exact_norm(params) / SCALE + 1e-6))
        for optimizer in (mine, plain):
            scaler = scaler_on(device)
            if max_norm is not None:
                optimizer.clip_grad_norm_(max_norm, scaler=scaler)
            scaler.step(optimizer)
        assert_left([p.grad for p in params], before, factor)
        for param, twin, old in zip(params, twins, before, strict=True):
            assert torch.equal(raw_bits(param), raw_bits(twin))
            assert np.array_equal(oracle.wide(twin.grad), old)


@pytest.mark.parametrize("fused", [None, True])
@pytest.mark.parametrize("is_inf", [False, True])
@pytest.mark.parametrize("max_norm", [None, 0.5])
@pytest.mark.parametrize("dtype", [F32, BF16], ids=str)
def test_left_as_torchs_sequence_leaves_them(backend, device, fused, is_inf, max_norm, dtype):
    """Also where the step is skipped: who reads them cannot know whether it was."""
    params, _ = model((dtype, dtype, dtype), device, sizes=(5, 2049))
    theirs = [Parameter(p.detach().clone()) for p in params]
    for param in params:
        param.grad *= SCALE
    if is_inf:
        params[0].grad[2] = float("inf")
    give_same(params, theirs)
    kept = [raw_bits(p) for p in params]
    optimizer = warpstep.AdamW(params, backend=backend, unscale_grads=True, fused=fused)
    torchs, scalers = torch.optim.AdamW(theirs), [scaler_on(device) for _ in range(2)]
    scalers[1].unscale_(torchs)
    if max_norm is not None:
        optimizer.clip_grad_norm_(max_norm, scaler=scalers[0])
        clip_grad_norm_(theirs, max_norm)
    for scaler, one in zip(scalers, (optimizer, torchs), strict=True):
        scaler.step(one)
    for param, their, old in zip(params, theirs, kept, strict=True):
        # torch rounds to the format after each factor.
        rtol = 3 * torch.finfo(dtype).eps
        torch.testing.assert_close(param.grad, their.grad, rtol=rtol, atol=0, equal_nan=True)
        assert torch.equal(raw_bits(param), old) == is_inf


def test_left_alone_where_there_is_nothing_to_undo(backend, device):
    params, _ = model((F32, F32, F32), device, sizes=(5, 2049))
    kept = [(raw_bits(p.grad), p.grad._version) for p in params]
    optimizer = warpstep.AdamW(params, backend=backend, unscale_grads=True)
    for _ in range(2):
        optimizer.step()
    assert all(torch.equal(raw_bits(p.grad), k) for p, (k, _) in zip(params, kept, strict=True))
    assert [p.grad._version for p in params] == [version for _, version in kept]
    optimizer.clip_grad_norm_(0.1)
    optimizer.step()
    for param, (_, version) in zip(params, kept, strict=True):
        assert param.grad._version > version  # autograd is told


def test_left_zero_where_that_is_asked_for(backend, device):
    params, _ = model((F32, F32, F32), device, sizes=(5, 2049))
    optimizer = warpstep.AdamW(params, backend=backend, unscale_grads=True)
    optimizer.clip_grad_norm_(0.1)
    optimizer.step(zero_grads=True)
    assert all(p.grad.eq(0).all() for p in params)


def strided(device):
    param = Parameter(torch.randn(6, 10, device=device))
    param.grad = torch.randn(10, 6, device=device).t()
    return [param]


def expanded(device):
    param = Parameter(torch.randn(6, 10, device=device))
    param.grad = torch.randn(10, device=device).expand(6, 10)
    return [param]


def with_gaps(device):
    param = Parameter(torch.randn(6, 10, device=device)[:, ::2])
    param.grad = torch.randn(5, device=device).expand(6, 5)
    return [param]


def one_number(device):
    param = Parameter(torch.randn((), device=device))
    param.grad = torch.randn((), device=device)
    return [param]


def conjugated(device):
    param = Parameter(torch.randn(5, dtype=torch.complex64, device=device))
    param.grad = torch.randn(5, dtype=torch.complex64, device=device).conj()
    return [param]


def shared(device):
    params = [Parameter(torch.randn(2000, device=device)) for _ in range(2)]
    params[0].grad = params[1].grad = torch.randn(2000, device=device)
    return params


def off_alignment(device):
    base = torch.randn(3000, device=device)
    param = Parameter(base[3:2003])
    param.grad = torch.randn(3000, device=device)[5:2005]
    return [param]


def requiring_grad(device):
    (param,) = strided(device)
    param.grad.requires_grad_()
    return [param]


ODD = [strided, expanded, with_gaps, one_number, conjugated, shared, off_alignment, requiring_grad]


@pytest.mark.parametrize("kind", ODD)
@pytest.mark.parametrize("taken", [True, False])
def test_gradients_of_other_layouts(backend, device, kind, taken):
    """Each is multiplied once, after all have been read."""

    def made():  # twins have the same layout, so that the same backend steps both
        torch.manual_seed(0)
        params = [*kind(device), Parameter(torch.randn(300, device=device))]
        params[-1].grad = torch.randn(300, device=device)
        return params

    params, twins = made(), made()
    mine = warpstep.AdamW(params, backend=backend, unscale_grads=True)
    plain = warpstep.AdamW(twins, backend=backend)
    for optimizer in (mine, plain):
        optimizer.grad_scale = torch.tensor(4.0, device=device)
        optimizer.found_inf = torch.tensor(float(not taken), device=device)
        optimizer.step()
    for param, twin in zip(params, twins, strict=True):
        assert torch.equal(param.grad, twin.grad / 4)
        assert torch.equal(param, twin)


def test_memory_beside_the_gradients_stays(backend, device):
    base = torch.full((3000,), 8.0, device=device)
    param = Parameter(torch.randn(2000, device=device))
    param.grad = base[5:2005]
    optimizer = warpstep.AdamW([param], backend=backend, unscale_grads=True)
    optimizer.grad_scale = torch.tensor(4.0, device=device)
    optimizer.step()
    assert param.grad.eq(2).all()
    assert base[:5].eq(8).all()
    assert base[2005:].eq(8).all()


def test_of_a_parameter_mentioned_twice(backend, device):
    param = Parameter(torch.zeros(40, device=device))
    param.grad = torch.full((40,), 8.0, device=device)
    optimizer = warpstep.AdamW(
        [{"params": [param, param]}], betas=(0.5, 0.5), backend=backend, unscale_grads=True
    )
    optimizer.grad_scale = torch.tensor(4.0, device=device)
    optimizer.step()
    assert param.grad.eq(2).all()
    assert optimizer.state[param]["exp_avg"].eq(1.5).all()  # 1, and half way to 2 again


def test_copies_and_pickles_keep_the_option(backend, device):
    (param, *_) = one_number(device)
    optimizer = warpstep.Adam([param], backend=backend, unscale_grads=True)
    for twin in (copy.deepcopy(optimizer), pickle.loads(pickle.dumps(optimizer))):
        assert twin.unscale_grads
    assert not warpstep.Adam([param]).unscale_grads


def test_statistics_are_of_the_gradients_before_clipping(backend, device):
    param = Parameter(torch.zeros(4000, device=device))
    param.grad = torch.full((4000,), 8.0, device=device)
    optimizer = warpstep.AdamW([param], backend=backend, unscale_grads=True, stats=True)
    scaler = torch.amp.GradScaler(device, init_scale=4.0)
    scaler.scale(torch.ones((), device=device))
    optimizer.clip_grad_norm_(1.0, scaler=scaler)
    scaler.step(optimizer)
    torch.testing.assert_close(
        optimizer.statistics().grad_norm[0].cpu(), torch.tensor(2 * 4000**0.5), rtol=1e-5, atol=0
    )
    torch.testing.assert_close(param.grad.norm().cpu(), torch.tensor(1.0), rtol=1e-4, atol=0)
