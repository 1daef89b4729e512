"""The tail in the step's pass, on every backend: clipping, averages, statistics, zeroing."""

import dataclasses
import math

import numpy as np
import pytest
import torch
from torch.nn import Parameter

import warpstep
from support import oracle
from support.bits import raw_bits
from support.cases import each_recipe
from support.conformance import assert_step, streams_of, zeros_of
from support.oracle import ROUNDOFF, Options
from support.recipes import (
    BF16,
    F16,
    F32,
    F64,
    SIZES,
    give_gradients,
    model,
    optimizer_for,
    set_grad,
)
from warpstep.hypers import DECAY_FORMS
from warpstep.recipes import real_dtype

U = ROUNDOFF[F32]


def assert_relative(found, exact, roundings):
    """`found`, a float32 tensor, is within so many roundings of float32."""
    error = np.abs(oracle.wide(found) - exact)
    assert np.all(error <= roundings * U * np.abs(exact)), (found, exact)


@each_recipe
def test_the_norm_is_exact_and_reads_only(backend, device, recipe):
    params, _ = model(recipe, device)
    params[3].grad = None
    optimizer = optimizer_for(params, Options(), recipe, backend)
    kept = [None if p.grad is None else p.grad.clone() for p in params]
    with_grad = [p for p in params if p.grad is not None]
    for kind in (2.0, float("inf")):
        norm = optimizer.clip_grad_norm_(math.inf, kind)
        assert norm.dtype == F32
        assert norm.shape == ()
        assert norm.device == params[0].device
        # Of float32, sums in float64.
        assert_relative(norm, oracle.exact_norm(with_grad, kind), 1.001)
        assert torch.equal(norm, optimizer.clip_grad_norm_(math.inf, kind))
    for param, grad in zip(params, kept, strict=True):
        assert (param.grad is None) == (grad is None)
        assert grad is None or torch.equal(raw_bits(param.grad), raw_bits(grad))


@pytest.mark.parametrize("kind", [1.0, 3.0, 0.5])
def test_other_norms_agree_with_torch(backend, device, kind):
    params, _ = model((F32, F32, F32), device, sizes=(5, 300))
    optimizer = warpstep.AdamW(params, backend=backend)
    expected = torch.nn.utils.get_total_norm([p.grad for p in params], kind)
    rtol = 0 if device == "cpu" else 4 * U  # where torch sums several gradients in one kernel
    torch.testing.assert_close(optimizer.clip_grad_norm_(1.0, kind), expected, rtol=rtol, atol=0)


@each_recipe
@pytest.mark.parametrize("max_norm", [0.0, 0.37, 1e9])
def test_clipped_steps_agree_with_the_oracle(backend, device, recipe, max_norm):
    params, generator = model(recipe, device, sizes=SIZES)
    optimizer = optimizer_for(params, Options(), recipe, backend)
    before = [zeros_of(p, False) for p in params]
    for t in (1, 2, 3):
        optimizer.clip_grad_norm_(max_norm)
        coef = float(optimizer._clipping.coef)
        exact = min(1.0, max_norm / (oracle.exact_norm(params) + 1e-6))
        assert abs(coef - exact) <= sum(p.numel() for p in params) * 2**-53 * exact
        clipped = Options(grad_factor=coef)
        kept = [raw_bits(p.grad) for p in params]
        grads = [p.grad for p in params]
        assert_step(optimizer, params, t, lambda _, o=clipped: o, grads, before)
        assert all(torch.equal(raw_bits(p.grad), b) for p, b in zip(params, kept, strict=True))
        before = [streams_of(optimizer, p) for p in params]
        give_gradients(params, recipe, generator)


@pytest.mark.parametrize("found", [None, 0.0, 1.0])
def test_scaled_and_clipped_steps_agree_with_the_oracle(backend, device, found):
    """A scale that is no power of two: its reciprocal is rounded."""
    recipe = (F32, F32, F32)
    params, _ = model(recipe, device)
    optimizer = optimizer_for(params, Options(), recipe, backend)
    optimizer.clip_grad_norm_(5.0)
    optimizer._clipping.coef = torch.tensor(5.0 / (17.0 + 1e-6), dtype=F64, device=device)
    optimizer._clipping.grad_scale = torch.tensor(48.0, device=device)
    optimizer.found_inf = None if found is None else torch.tensor(found, device=device)
    if found:
        kept = [raw_bits(p) for p in params]
        optimizer.step()
        assert all(torch.equal(raw_bits(p), b) for p, b in zip(params, kept, strict=True))
        return
    options = Options(grad_factor=5.0 / (17.0 + 1e-6) / 48.0)
    before = [zeros_of(p, False) for p in params]
    grads = [p.grad for p in params]
    assert_step(optimizer, params, 1, lambda _: options, grads, before)


def test_a_norm_that_is_not_finite_acts_as_in_torch(backend, device):
    """NaN makes all gradients NaN; infinity makes finite ones zero, and the infinite one NaN."""
    for bad in (float("nan"), float("inf")):
        params, _ = model((F32, F32, F32), device, sizes=(3, 40))
        theirs = [Parameter(p.detach().clone()) for p in params]
        params[1].grad[7] = bad
        for mine, their in zip(params, theirs, strict=True):
            their.grad = mine.grad.clone()
        optimizer = warpstep.AdamW(params, backend=backend)
        torchs = torch.optim.AdamW(theirs, foreach=False)
        norm = optimizer.clip_grad_norm_(1.0)
        expected = torch.nn.utils.clip_grad_norm_(theirs, 1.0)
        assert torch.equal(norm, expected) or (norm.isnan() and expected.isnan())
        optimizer.step()
        torchs.step()
        for mine, their in zip(params, theirs, strict=True):
            assert torch.equal(mine.isnan(), their.isnan())


EMAS = [(F32, None, F32), (F64, None, F64), (BF16, None, F32), (BF16, BF16, BF16), (F16, None, F32)]


@pytest.mark.parametrize(("dtype", "asked", "kept"), EMAS, ids=str)
@pytest.mark.parametrize("decay", [0.0, 0.3, 0.999, 1.0])
def test_averages_agree_with_the_oracle(backend, device, dtype, asked, kept, decay):
    recipe = (dtype, dtype, dtype)
    params, generator = model(recipe, device)
    optimizer = optimizer_for(
        params, Options(lr=0.1), recipe, backend, ema_decay=decay, ema_dtype=asked
    )
    averages = [np.zeros_like(oracle.wide(p)) for p in params]
    u = ROUNDOFF[F64 if dtype == F64 else F32]
    for t in range(1, 4):
        optimizer.step()
        for index, (param, old) in enumerate(zip(params, averages, strict=True)):
            average = optimizer.ema_parameters()[param]
            assert average.dtype == kept
            # The average of what is stored, beginning as the first step leaves it.
            new = oracle.wide(param)
            d = oracle.WIDE(0 if t == 1 else decay)
            exact = d * old + (1 - d) * new
            # Weight, difference, product and sum, then the format.
            bound = 4 * u * (np.abs(old) + np.abs(new)) + ROUNDOFF[kept] * np.abs(exact)
            assert np.all(np.abs(oracle.wide(average) - exact) <= bound * 1.01), (t, index)
            averages[index] = oracle.wide(average)
        give_gradients(params, recipe, generator)
    if backend != "reference":
        assert [b.backend for b in optimizer.plan.buckets] == [backend]
        assert real_dtype(optimizer.plan.buckets[0].recipe.ema) == kept


@each_recipe
def test_statistics_agree_with_the_oracle(backend, device, recipe):
    params, generator = model(recipe, device)
    optimizer = optimizer_for(params, Options(lr=0.1), recipe, backend, stats=True)
    # The CPU kernel adds a tile's 1,024 squares in float32, with at least four sums side by side:
    # 256 additions, two roundings of the square, of which the root leaves half; then the result's.
    roundings = 131 if backend == "cpu" and recipe[0] != F64 else 1.001
    for _ in range(2):
        give_gradients(params, recipe, generator)
        params[2].grad = None
        params[5].grad[3] = float("inf")
        params[6].grad[:5] = float("nan")
        optimizer.grad_scale = torch.tensor(8.0, device=device)
        before = [oracle.wide(p) for p in params]
        optimizer.step()
        found = optimizer.statistics()
        assert found.nonfinite.dtype == torch.int64
        at = {id(param): i for i, param in enumerate(found.params)}
        for index, (param, old) in enumerate(zip(params, before, strict=True)):
            i = at.get(id(param))
            if param.grad is None:
                assert i is None or found.nonfinite[i] == -1
                continue
            expected = {2: -1, 5: 1, 6: 5}.get(index, 0)
            assert found.nonfinite[i] == expected
            if expected:
                continue
            new = oracle.wide(param)
            grad = oracle.wide(param.grad) / 8
            for norm, values in (
                (found.grad_norm, grad),
                (found.param_norm, new),
                (found.update_norm, new - old),
            ):
                assert_relative(norm[i], np.sqrt(np.sum(values * values)), roundings)


@pytest.mark.parametrize("dtype", [F32, BF16], ids=str)
@pytest.mark.parametrize("magnitude", [1e-25, 1e25])
def test_statistics_of_numbers_whose_squares_leave_float32(backend, device, dtype, magnitude):
    params = [Parameter(torch.zeros(n, device=device).to(dtype)) for n in (1, 65, 2049)]
    for param in params:
        param.grad = torch.full_like(param, magnitude)
    optimizer = warpstep.SGD(params, lr=1.0, stats=True, backend=backend)
    optimizer.step()
    found = optimizer.statistics()
    expected = torch.stack([p.grad.double().square().sum().sqrt() for p in params]).float()
    for norm in (found.grad_norm, found.param_norm, found.update_norm):
        torch.testing.assert_close(norm, expected, rtol=1e-6, atol=0)


def test_statistics_of_a_skipped_step(backend, device):
    """What made it skip is what one wants to see."""
    params, _ = model((F32, F32, F32), device)
    params[3].data.flatten()[0] = float("inf")  # which changes by nothing too
    optimizer = warpstep.AdamW(params, stats=True, backend=backend)
    params[4].grad[10:20] = float("nan")
    optimizer.grad_scale = torch.tensor(2.0, device=device)
    optimizer.found_inf = torch.tensor(1.0, device=device)
    kept = [raw_bits(p) for p in params]
    optimizer.step()
    assert all(torch.equal(raw_bits(p), b) for p, b in zip(params, kept, strict=True))
    assert all(s["step"] == 0 for s in optimizer.state.values())
    found = optimizer.statistics()
    assert found.nonfinite.sum() == 10
    assert found.update_norm.eq(0).all()
    norms = torch.stack([p.detach().norm() for p in params])
    torch.testing.assert_close(found.param_norm, norms, rtol=1e-5, atol=0)


@each_recipe
def test_gradients_are_left_zero(backend, device, recipe):
    """The same step, bit for bit; and memory beside the gradients is not touched."""
    params, _ = model(recipe, device, sizes=(5, 64, 2049))
    plain = [Parameter(p.detach().clone()) for p in params]
    bases = []
    for param, other in zip(params, plain, strict=True):
        set_grad(other, param.grad.clone())
        base = torch.full((param.numel() + 11,), 7.0, dtype=recipe[1], device=device)
        base[3 : 3 + param.numel()] = param.grad
        param.grad = base[3 : 3 + param.numel()]
        bases.append(base)
    zeroing = optimizer_for(params, Options(), recipe, backend)
    keeping = optimizer_for(plain, Options(), recipe, backend)
    zeroing.step(zero_grads=True)
    keeping.step()
    for param, other, base in zip(params, plain, bases, strict=True):
        assert torch.equal(raw_bits(param), raw_bits(other))
        assert param.grad.eq(0).all()
        assert base[:3].eq(7).all()
        assert base[3 + param.numel() :].eq(7).all()
    version = params[0].grad._version
    give_gradients(params, recipe, torch.Generator().manual_seed(3))
    zeroing.step(zero_grads=True)
    assert all(p.grad.eq(0).all() for p in params)
    assert params[0].grad._version > 0 or version > 0


@pytest.mark.parametrize("taken", [True, False])
def test_gradients_of_other_strides_and_of_skipped_steps_are_left_zero(backend, device, taken):
    params = [Parameter(torch.randn(*shape, device=device)) for shape in ((6, 10), (300,), (3,))]
    params[0].grad = torch.randn(10, 6, device=device).t()
    for param in params[1:]:
        param.grad = torch.randn_like(param)
    kept = [raw_bits(param) for param in params]
    optimizer = warpstep.AdamW(params, backend=backend)
    optimizer.found_inf = torch.tensor(float(not taken), device=device)
    optimizer.step(zero_grads=True)
    for param, before in zip(params, kept, strict=True):
        assert param.grad.eq(0).all()
        assert torch.equal(raw_bits(param), before) != taken


def test_everything_at_once_is_the_sum_of_its_parts(backend, device):
    """Scaled, clipped, averaged, counted, zeroed, amsgrad and maximize, in views off alignment."""
    recipe, generator = (F32, F32, F32), torch.Generator().manual_seed(5)
    base = torch.randn(50_000, generator=generator).to(device)
    params = [Parameter(base[3:20_003]), Parameter(base[20_006:20_080])]
    options = Options(amsgrad=True, maximize=True, decay_form="cautious", lr=0.1)
    optimizer = optimizer_for(params, options, recipe, backend, ema_decay=0.5, stats=True)
    before = [zeros_of(p, True) for p in params]
    for t in (1, 2, 3):
        give_gradients(params, recipe, generator, scale=64.0)
        scaler = torch.amp.GradScaler(device, init_scale=64.0)
        scaler.scale(torch.ones((), device=device))
        total = optimizer.clip_grad_norm_(3.0, scaler=scaler)
        factor = 3.0 / (float(total) + 1e-6) / 64
        clipped = dataclasses.replace(options, grad_factor=factor)
        grads = [p.grad for p in params]
        kept = [raw_bits(g) for g in grads]
        old = [optimizer.state[p]["ema"].clone() if t > 1 else None for p in params]
        assert_step(optimizer, params, t, lambda _, o=clipped: o, grads, before)
        assert all(torch.equal(raw_bits(g), k) for g, k in zip(grads, kept, strict=True))
        for param, average in zip(params, old, strict=True):
            expected = param.detach() if average is None else average.lerp(param.detach(), 0.5)
            bound = 4 * U * float(param.detach().abs().max())
            torch.testing.assert_close(optimizer.state[param]["ema"], expected, rtol=0, atol=bound)
        assert optimizer.statistics().nonfinite.eq(0).all()
        before = [streams_of(optimizer, p) for p in params]


@pytest.mark.parametrize("place", [0, 1])
@pytest.mark.parametrize("form", DECAY_FORMS)
def test_forms_of_decay_by_group(backend, device, form, place):
    """Each group has its own; Adam and AdamW take any."""
    params = [Parameter(torch.randn(40, device=device)) for _ in range(2)]
    for param in params:
        param.grad = torch.randn_like(param)
    groups = [{"params": [param]} for param in params]
    groups[place]["decay_form"] = form
    optimizer = warpstep.AdamW(groups, lr=0.1, weight_decay=0.2, backend=backend)
    before = [zeros_of(p, False) for p in params]
    with_form = Options(lr=0.1, weight_decay=0.2, decay_form=form, base_lr=0.1)
    options = [Options(lr=0.1, weight_decay=0.2)] * 2
    options[place] = with_form
    grads = [p.grad for p in params]
    assert_step(optimizer, params, 1, options.__getitem__, grads, before)
    if form == "independent":  # the schedule's multiple, and not lr, scales the decay
        assert optimizer.param_groups[place]["base_lr"] == 0.1
