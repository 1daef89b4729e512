"""Low-precision recipes: a step is the float32 step between decoding and encoding, bit for bit."""

import math

import pytest
import torch

import warpstep
from support.bits import assert_same_bits
from support.environment import SLOW
from support.low_precision import (
    BF16,
    LONG,
    RECIPES,
    SHAPES,
    Float32,
    assert_step_is_float32s,
    flat,
    key_in,
    moments_of,
    new_params,
    numbers_of,
)
from support.parameters import random
from support.recipes import set_grad
from warpstep import codecs

OPTIONS = {
    "default": {},
    "amsgrad": {"amsgrad": True},
    "coupled": {"decay_form": "coupled", "weight_decay": 0.1},
    "cautious": {"decay_form": "cautious", "maximize": True},
}
KINDS = {
    "AdamW": (warpstep.AdamW, {"lr": 1e-2}),
    "SGD": (warpstep.SGD, {"lr": 1e-2, "momentum": 0.9, "dampening": 0.1, "nesterov": False}),
}
each_recipe = pytest.mark.parametrize("recipe", RECIPES.values(), ids=RECIPES)
PAIRS = [(recipe, options) for recipe in RECIPES for options in OPTIONS]
if SLOW:  # each recipe, and each option with two of them
    some = ("residual-8bit", "stochastic")
    PAIRS = [(r, o) for r, o in PAIRS if o == "default" or r in some]
each_recipe_with_options = pytest.mark.parametrize(
    ("recipe", "options"),
    [pytest.param(RECIPES[r], OPTIONS[o], id=f"{r}-{o}") for r, o in PAIRS],
)


def grads_of(params, step, dtype=None):
    return [
        random(p.shape, 100 * step + i, p.device).to(dtype or p.dtype) for i, p in enumerate(params)
    ]


def assert_steps(
    kind, recipe, options, backend, device, dtype=BF16, grad_dtype=None, steps=3, shapes=SHAPES
):
    params = new_params(dtype, shapes, device)
    optimizer = kind(params, backend=backend, seed=42, **recipe, **options)
    reference = Float32(kind, backend, device, options)
    for step in range(1, steps + 1):
        assert_step_is_float32s(optimizer, reference, grads_of(params, step, grad_dtype), step)
    if backend != "reference":
        assert "reference" not in str(optimizer.plan)


@each_recipe_with_options
def test_adamw(recipe, options, backend, device):
    assert_steps(warpstep.AdamW, recipe, {"lr": 1e-2, **options}, backend, device)


def test_a_long_vector_and_rows_that_blocks_do_not_divide(backend, device):
    recipe, shapes = RECIPES["residual-8bit"], [LONG, (130, 33)]
    assert_steps(warpstep.AdamW, recipe, {}, backend, device, steps=2, shapes=shapes)


@each_recipe
def test_sgd(recipe, backend, device):
    state_dtype = recipe.get("state_dtype")
    if isinstance(state_dtype, tuple):
        recipe = {**recipe, "state_dtype": state_dtype[0]}
    kind, options = KINDS["SGD"]
    assert_steps(kind, recipe, options, backend, device)


def test_float64_parameters_have_bfloat16_moments_rounded_at_random(backend, device):
    param = torch.nn.Parameter(random((50,), 1, device).double())
    optimizer = warpstep.AdamW([param], state_dtype=BF16, backend=backend)
    exact = warpstep.AdamW([copy := torch.nn.Parameter(param.detach().clone())], backend=backend)
    for _ in range(3):
        param.grad = copy.grad = random((50,), 2, device).double()
        optimizer.step()
        exact.step()
    found = optimizer.state[param]["exp_avg_sq"].double()
    expected = exact.state[copy]["exp_avg_sq"]
    # Three roundings of up to a unit in the last place, 2^-7 of the number at most.
    assert ((found / expected - 1).abs() <= 3 * 2.0**-7).all()


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16], ids=str)
@pytest.mark.parametrize("state_dtype", ["8bit", BF16], ids=str)
def test_parameters_of_other_dtypes(dtype, state_dtype, backend, device):
    options = {"lr": 1e-2, "eps": 1e-3}
    assert_steps(warpstep.AdamW, {"state_dtype": state_dtype}, options, backend, device, dtype)


def test_a_parameter_with_gaps_is_rounded_at_random_too(backend, device):
    """No kernel walks it: the reference does, in the order of its indices."""
    wide = random((6, 64), 1, device).to(BF16)
    params = [torch.nn.Parameter(p) for p in (wide.clone()[:, ::2], wide[:, ::2].contiguous())]
    for param, name in zip(params, (backend, "reference"), strict=True):
        optimizer = warpstep.AdamW([param], lr=1e-2, rounding="stochastic", backend=name)
        param.grad = random(param.shape, 2, device).to(BF16)
        optimizer.step()
    assert torch.equal(*params)


# ---- The exact master


def test_a_master_is_a_float32_models_run_for_a_thousand_steps(backend, device):
    """Bit for bit, the parameter being its nearest bfloat16, ties away from zero, at every step."""
    shapes = [(33, 65), (7,)]
    steps = 1000 if backend == "cpu" else 20
    ours = new_params(BF16, shapes, device)
    theirs = [torch.nn.Parameter(p.detach().float()) for p in ours]
    optimizer = warpstep.AdamW(ours, lr=1e-3, master="residual", backend=backend)
    exact = warpstep.AdamW(theirs, lr=1e-3, backend=backend)
    for step in range(steps):
        for i, (mine, other) in enumerate(zip(ours, theirs, strict=True)):
            mine.grad = random(mine.shape, 100 * step + i, device).to(BF16)
            other.grad = mine.grad.float()
        optimizer.step()
        exact.step()
        if step % 100 == 0 or step == steps - 1:
            for mine, other in zip(ours, theirs, strict=True):
                master = optimizer.master_parameters()[mine]
                assert torch.equal(master.view(torch.int32), other.detach().view(torch.int32))
                high, _ = codecs.split(other.detach().cpu())
                assert torch.equal(mine.detach().cpu(), high)
                for key in ("exp_avg", "exp_avg_sq"):
                    assert torch.equal(optimizer.state[mine][key], exact.state[other][key])


@pytest.mark.parametrize("then", ["nothing", "another-master-set", "averages-swapped"])
def test_what_is_written_to_a_parameter_wins_over_its_residual(then, backend, device):
    """Also where something else writes to parameters before the residual is looked at."""
    params = new_params(BF16, [(100,), (100,)], device)
    options = {"ema_decay": 0.9} if then == "averages-swapped" else {}
    optimizer = warpstep.AdamW(params, lr=1e-2, master="residual", backend=backend, **options)
    for p in params:
        p.grad = random(p.shape, 7, device).to(BF16)
    optimizer.step()
    assert all(optimizer.state[p]["master_param"].any() for p in params)
    kept = optimizer.master_parameters()[params[1]].clone()
    written = random((100,), 8, device).to(BF16)
    with torch.no_grad():
        params[0].copy_(written)
    if then == "another-master-set":
        kept = random((100,), 9, device)
        optimizer.set_master_parameters({params[1]: kept})
    elif then == "averages-swapped":
        with optimizer.swap_ema():
            pass
    masters = optimizer.master_parameters()
    assert torch.equal(masters[params[0]], written.float())
    assert torch.equal(masters[params[1]], kept)
    for p in params:
        p.grad.zero_()
    for group in optimizer.param_groups:
        group["lr"] = 0.0
    optimizer.step()
    masters = optimizer.master_parameters()
    assert torch.equal(masters[params[0]], written.float())
    assert torch.equal(masters[params[1]], kept)


def test_masters_are_written_in_float32(backend, device):
    params = new_params(BF16, [(100,), (5, 5)], device)
    optimizer = warpstep.AdamW(params, lr=0.0, master="residual", backend=backend)
    masters = {p: random(p.shape, 30 + i, device) for i, p in enumerate(params)}
    optimizer.set_master_parameters(masters)
    for p, master in masters.items():
        assert torch.equal(optimizer.master_parameters()[p], master)
        p.grad = torch.zeros_like(p)
    optimizer.step()
    for p, master in masters.items():
        assert torch.equal(optimizer.master_parameters()[p], master)
        assert torch.equal(p.detach().cpu(), codecs.split(master.cpu())[0])


@pytest.mark.parametrize(("dtype", "master"), [(BF16, "residual"), (torch.float32, None)], ids=str)
def test_masters_are_read_as_copies(dtype, master):
    (param,) = new_params(dtype, [(100,)])
    optimizer = warpstep.AdamW([param], master=master)
    before = param.detach().clone()
    optimizer.master_parameters()[param].fill_(7)
    assert torch.equal(param, before)


def test_averages_are_of_the_master(backend, device):
    params = new_params(BF16, [(300,)], device)
    options = {"lr": 1e-2, "ema_decay": 0.9}
    optimizer = warpstep.AdamW(params, master="residual", backend=backend, **options)
    theirs = [torch.nn.Parameter(p.detach().float()) for p in params]
    exact = warpstep.AdamW(theirs, backend=backend, **options)
    for step in range(4):
        params[0].grad = random((300,), step, device).to(BF16)
        theirs[0].grad = params[0].grad.float()
        optimizer.step()
        exact.step()
    assert torch.equal(optimizer.state[params[0]]["ema"], exact.state[theirs[0]]["ema"])
    before = optimizer.master_parameters()[params[0]].clone()
    with optimizer.swap_ema():
        assert not torch.equal(params[0].float(), before)
    assert torch.equal(optimizer.master_parameters()[params[0]], before)
    params[0].grad.zero_()
    optimizer.param_groups[0]["lr"] = 0.0
    optimizer.step()
    assert torch.equal(optimizer.master_parameters()[params[0]], before)


# ---- What low precision must not lose


def test_exp_avg_sq_decays_where_nothing_comes(backend, device):
    """After n steps without gradients it is 0.999^n of itself, and to nearest it stays.

    One rounding at random has a variance of at most a quarter of a squared unit in the last place,
    2^-8 of the number in bfloat16 (2^-4 in ue5m3) at most: the mean of k numbers after n steps is
    within 5 standard deviations of what it is to be: relatively, 5 * 2^-8 / 2 * sqrt(n / k).
    """
    rows, steps = (1024, 2000) if backend == "cpu" else (128, 50)
    count = 64 * rows
    for state_dtype, unit in ((BF16, 2.0**-8), ("8bit", 2.0**-4)):
        param = torch.nn.Parameter(torch.zeros((rows, 64), dtype=BF16, device=device))
        options = {"state_dtype": state_dtype, "betas": (0.9, 0.999), "backend": backend}
        optimizer = warpstep.AdamW([param], **options)
        param.grad = random((rows, 64), 1, device).to(BF16)
        optimizer.step()
        before = numbers_of(param, optimizer.state[param])["exp_avg_sq"].double().mean()
        param.grad = torch.zeros_like(param)
        for _ in range(steps):
            optimizer.step()
        after = numbers_of(param, optimizer.state[param])["exp_avg_sq"].double().mean()
        expected = 0.999**steps
        off = abs((after / before).item() / expected - 1)
        # The largest of normal squares weigh most: their mean of squares is 3 times the mean's.
        assert off <= 5 * unit / 2 * math.sqrt(3 * steps / count)


def test_nearest_bfloat16_does_not_decay():
    """What rounding=None avoids, and all-bfloat16 has in common with torch."""
    param = torch.nn.Parameter(torch.zeros(1000, dtype=BF16))
    optimizer = warpstep.AdamW([param], betas=(0.9, 0.999))
    param.grad = torch.ones_like(param)
    optimizer.step()
    before = optimizer.state[param]["exp_avg_sq"].clone()
    param.grad = torch.zeros_like(param)
    for _ in range(100):
        optimizer.step()
    assert torch.equal(optimizer.state[param]["exp_avg_sq"], before)


@pytest.mark.parametrize("decades", [0, 2, 4, 6])
def test_the_update_keeps_its_size_where_gradients_spread_over_decades(decades, backend, device):
    """With blocks whose gradients have scales decades apart, as the exact update's largest."""
    shape = (64, 64)
    generator = torch.Generator().manual_seed(3)
    scale = (10.0 ** (decades * torch.rand(shape, generator=generator) - decades)).to(device)
    params = [torch.nn.Parameter(torch.zeros(shape, device=device)) for _ in range(2)]
    options = {"lr": 1.0, "weight_decay": 0.0, "eps": 1e-12, "backend": backend}
    low = warpstep.AdamW(params[:1], state_dtype="8bit", **options)
    exact = warpstep.AdamW(params[1:], **options)
    assert low.precision.moment_dtype(params[0], 0, False) == torch.uint8
    largest = [0.0, 0.0]
    for step in range(60):
        grad = scale * (0.1 + random(shape, step, device))
        for which, (param, optimizer) in enumerate(zip(params, (low, exact), strict=True)):
            param.grad = grad.clone()
            param.data.zero_()
            optimizer.step()
            largest[which] = max(largest[which], param.detach().abs().max().item())
    assert largest[0] <= 1.5 * largest[1]


@pytest.mark.parametrize("code", [0, 1], ids=["zero", "least"])
@pytest.mark.parametrize("grad", [0.0, 1e-21, 1e-16], ids=["none", "subnormal", "small"])
def test_moments_that_have_decayed_to_the_least_number(code, grad, backend, device):
    """Beside squares of gradients that are less still, or a little more: the CPU's bits."""
    optimizers = []
    for name, where in ((backend, device), ("cpu", "cpu")):
        param = torch.nn.Parameter(random((64, 64), 1).to(where, BF16))
        options = {"state_dtype": "8bit", "rounding": "stochastic", "betas": (0.9, 0.95)}
        optimizer = warpstep.AdamW([param], lr=1e-2, backend=name, **options)
        param.grad = torch.zeros_like(param)
        optimizer.step()
        state = optimizer.state[param]
        state["step"].fill_(5000)
        state["exp_avg_sq_codes"].fill_(code)
        state["exp_avg_sq_scale"].fill_(32)  # as low as there is
        param.grad.fill_(grad)
        optimizer.step()
        assert state["exp_avg_sq_codes"].eq(0).all() == (code == 0 and grad == 0)
        optimizers.append(optimizer)
    assert_same_bits(*optimizers)


@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf], ids=str)
@each_recipe
def test_nan_and_infinity_reach_what_float32_lets_them_reach(recipe, value, backend, device):
    """The same elements become not finite, and no other of their block."""
    params = new_params(BF16, [(64, 64)], device)
    theirs = [torch.nn.Parameter(p.detach().float()) for p in params]
    optimizer = warpstep.AdamW(params, backend=backend, **recipe)
    exact = warpstep.AdamW(theirs, backend=backend)
    for step in range(3):
        grad = random((64, 64), step, device).to(BF16)
        if step == 1:
            grad[3, 5] = value
        params[0].grad, theirs[0].grad = grad, grad.float()
        optimizer.step()
        exact.step()
    found, expected = numbers_of(params[0], optimizer.state[params[0]]), exact.state[theirs[0]]
    assert torch.equal(params[0].detach().isnan(), theirs[0].detach().isnan())
    for key in ("exp_avg", "exp_avg_sq"):
        assert torch.equal(found[key].isnan(), flat(expected[key]).isnan()), key
        assert torch.equal(found[key].isinf(), flat(expected[key]).isinf()), key


# ---- Copies


@pytest.mark.parametrize("dtype", [BF16, torch.float16], ids=str)
@pytest.mark.parametrize("grad_dtype", [torch.float32, BF16], ids=str)
@pytest.mark.parametrize("stats", [False, True], ids=["", "stats"])
def test_copies_are_the_parameters_after_the_step(stats, dtype, grad_dtype, backend, device):
    shapes = [(100, 3), (16_384 + 5,), (), (0,)]
    params = new_params(torch.float32, shapes, device)
    alone = new_params(torch.float32, shapes, device)
    copies = [torch.full_like(p, 7, dtype=dtype) for p in params]
    optimizer = warpstep.AdamW(params, lr=1e-2, copies=copies, stats=stats, backend=backend)
    other = warpstep.AdamW(alone, lr=1e-2, backend=backend)
    for step in range(3):
        for p, q, grad in zip(params, alone, grads_of(params, step, grad_dtype), strict=True):
            set_grad(p, grad)
            q.grad = grad.float()
        optimizer.step()
        other.step()
        for p, q, copy in zip(params, alone, copies, strict=True):
            assert torch.equal(p, q)
            assert torch.equal(copy, p.detach().to(dtype))


# ---- What is kept in what


@pytest.mark.parametrize(("numel", "dtype"), [(65_535, BF16), (65_536, torch.uint8)])
def test_a_vector_has_8_bits_from_65536_elements_on(numel, dtype):
    param = torch.nn.Parameter(torch.ones(numel))
    optimizer = warpstep.AdamW([param], state_dtype="8bit")
    param.grad = torch.ones_like(param)
    optimizer.step()
    state = optimizer.state[param]
    assert {state[key_in(state, moment)].dtype for moment in moments_of(state)} == {dtype}


def test_bytes_of_state(backend, device):
    params = new_params(BF16, [(128, 64), (10,)], device)
    optimizer = warpstep.AdamW(params, master="residual", state_dtype="8bit", backend=backend)
    assert optimizer.state_bytes() == {}
    for p in params:
        p.grad = torch.zeros_like(p)
    optimizer.step()
    assert optimizer.state_bytes() == {
        "step": 8,
        "master_param": 2 * (128 * 64 + 10),
        "exp_avg": 4 * 10,
        "exp_avg_codes": 128 * 64,
        "exp_avg_scale": 128,
        "exp_avg_sq": 4 * 10,
        "exp_avg_sq_codes": 128 * 64,
        "exp_avg_sq_scale": 128,
    }
    if backend != "reference":
        assert "e4m3 and ue5m3 moments: 4.03 bytes of state an element" in str(optimizer.plan)
        assert "float32 moments: 10 bytes of state an element" in str(optimizer.plan)
