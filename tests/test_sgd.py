"""warpstep.SGD's numbers: every backend, recipe and option against the oracle, with the tail."""

import dataclasses
import math

import numpy as np
import pytest
import torch
from torch.nn import Parameter
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn

import warpstep
from support import oracle
from support.bits import raw_bits
from support.cases import each_recipe, recipes_with
from support.oracle import ROUNDOFF
from support.parameters import set_grads
from support.recipes import (
    BF16,
    EDGES,
    F32,
    F64,
    RECIPES,
    SIZES,
    give_gradients,
    make,
    model,
    set_grad,
)
from support.sgd import (
    KERNELS,
    OPTIONS,
    Options,
    assert_ran_on,
    assert_step,
    check,
    optimizer_for,
    streams_of,
)
from warpstep.recipes import real_dtype

F32S = RECIPES["float32"]
MOMENTUM, NESTEROV = Options(momentum=0.9), OPTIONS["nesterov-coupled-maximize"]


@recipes_with(OPTIONS, KERNELS)
def test_every_recipe_and_option_of_sgd_agrees_with_the_oracle(backend, device, recipe, options):
    params, generator = model(recipe, device, sizes=SIZES)
    optimizer = optimizer_for(params, options, recipe, backend)
    before = [streams_of(optimizer, p) for p in params]
    for _ in range(3):
        assert_step(optimizer, params, lambda _: options, [p.grad for p in params], before)
        before = [streams_of(optimizer, p) for p in params]
        give_gradients(params, recipe, generator)
    assert_ran_on(optimizer, backend, recipe, options)


@pytest.mark.parametrize("options", [Options(), MOMENTUM, NESTEROV], ids=["plain", "b", "nesterov"])
def test_long_tensors(backend, device, options):
    """Several chunks a tensor, some misaligned against their gradients."""
    params, generator = model(F32S, device, sizes=EDGES[-3:])
    base = make(50_001, F32, device, generator)
    params.append(Parameter(base[3:40_004]))
    params[-1].grad = make(40_008, F32, device, generator)[1:40_002]
    kept = base[:3].clone(), base[40_004:].clone()
    optimizer = optimizer_for(params, options, F32S, backend)
    before = [streams_of(optimizer, p) for p in params]
    for _ in range(2):
        assert_step(optimizer, params, lambda _: options, [p.grad for p in params], before)
        before = [streams_of(optimizer, p) for p in params]
    assert_ran_on(optimizer, backend, F32S, options)
    assert torch.equal(base[:3], kept[0])
    assert torch.equal(base[40_004:], kept[1])


def test_groups_have_their_own_options(backend, device):
    """With momentum, without, and each form of decay: one launch a recipe."""
    options = list(OPTIONS.values())
    params, generator = model(F32S, device, sizes=[33] * len(options))
    keys = ("lr", "momentum", "dampening", "weight_decay", "nesterov", "maximize", "decay_form")
    groups = [
        {"params": [p], **{key: getattr(o, key) for key in keys}}
        for p, o in zip(params, options, strict=True)
    ]
    optimizer = warpstep.SGD(groups, backend=backend)
    for group, o in zip(optimizer.param_groups, options, strict=True):
        group["base_lr"] = o.base_lr
    before = [streams_of(optimizer, p) for p in params]
    for _ in range(3):
        grads = [p.grad for p in params]
        assert_step(optimizer, params, options.__getitem__, grads, before)
        before = [streams_of(optimizer, p) for p in params]
        give_gradients(params, F32S, generator)
        options = [dataclasses.replace(o, lr=o.lr / 2) for o in options]
        for group in optimizer.param_groups:  # as a schedule does
            group["lr"] /= 2
    if backend != "reference":
        assert len(optimizer.plan.buckets) == 3  # no buffer; a buffer; and a count of steps


@pytest.mark.parametrize("dtype", [torch.complex64, torch.complex128])
@pytest.mark.parametrize("options", [MOMENTUM, NESTEROV], ids=["momentum", "nesterov"])
def test_complex_parameters_are_pairs_of_real_ones(backend, device, dtype, options):
    params = [Parameter(torch.randn(33, dtype=dtype, device=device)) for _ in range(2)]
    optimizer = optimizer_for(params, options, F32S, backend)
    before = [streams_of(optimizer, p) for p in params]
    for _ in range(2):
        for param in params:
            param.grad = torch.randn(33, dtype=dtype, device=device)
        params[1].grad = params[1].grad.conj()  # lazy: its memory holds other numbers
        grads = [p.grad.resolve_conj() for p in params]
        assert_step(optimizer, params, lambda _: options, grads, before)
        before = [streams_of(optimizer, p) for p in params]


SPECIAL = [0.0, -0.0, 1.0, -1.0, 1e-30, 1e20, -1e20, 3e38, math.inf, -math.inf, math.nan]


@pytest.mark.parametrize("arguments", [{}, {"momentum": 0.9}, {"momentum": 0.9, "nesterov": True}])
def test_nan_and_infinity_propagate_as_in_torch(backend, device, arguments):
    """Against torch's for-loop: the same elements are NaN, the same infinite, at every step."""
    values = torch.tensor(SPECIAL)
    start, first, second = (t.flatten() for t in torch.meshgrid(*3 * [values], indexing="ij"))
    mine, theirs = Parameter(start.clone().to(device)), Parameter(start.clone())
    arguments = {"lr": 0.1, "weight_decay": 0.1, **arguments}
    ours = warpstep.SGD([mine], backend=backend, **arguments)
    torchs = torch.optim.SGD([theirs], foreach=False, **arguments)

    def kind(tensor):
        tensor = tensor.detach().cpu()
        return torch.where(tensor.isnan(), 2, torch.where(tensor.isinf(), tensor.sign(), 0))

    for grad in (first, second, torch.ones_like(first)):
        mine.grad, theirs.grad = grad.clone().to(device), grad.clone()
        ours.step()
        torchs.step()
        assert torch.equal(kind(mine), kind(theirs))
        for key, value in torchs.state[theirs].items():
            assert torch.equal(kind(ours.state[mine][key]), kind(value)), key


# ---- The tail


@pytest.mark.parametrize("options", [Options(), MOMENTUM, NESTEROV], ids=["plain", "b", "nesterov"])
@pytest.mark.parametrize("recipe", ["float32", "bfloat16", "bfloat16-grads-moments-float32"])
def test_clipped_and_unscaled_steps_agree_with_the_oracle(backend, device, recipe, options):
    """A scale that is no power of two; the gradients stay as they are."""
    recipe = RECIPES[recipe]
    params, generator = model(recipe, device)
    optimizer = optimizer_for(params, options, recipe, backend)
    before = [streams_of(optimizer, p) for p in params]
    for _ in range(2):
        optimizer.clip_grad_norm_(0.37)
        coef = float(optimizer._clipping.coef)
        exact = min(1.0, 0.37 / (oracle.exact_norm(params) + 1e-6))
        assert abs(coef - exact) <= sum(p.numel() for p in params) * 2**-53 * exact
        optimizer._clipping.grad_scale = torch.tensor(48.0, device=device)
        clipped = dataclasses.replace(options, grad_factor=coef / 48)
        kept = [raw_bits(p.grad) for p in params]
        grads = [p.grad for p in params]
        assert_step(optimizer, params, lambda _, o=clipped: o, grads, before)
        assert all(torch.equal(raw_bits(p.grad), b) for p, b in zip(params, kept, strict=True))
        before = [streams_of(optimizer, p) for p in params]
        give_gradients(params, recipe, generator)
    assert_ran_on(optimizer, backend, recipe, options)


EMAS = [(F32, F32), (F64, F64), (BF16, F32), (BF16, BF16)]


@pytest.mark.parametrize(("dtype", "kept"), EMAS, ids=str)
@pytest.mark.parametrize("options", [Options(), MOMENTUM], ids=["plain", "momentum"])
def test_averages_agree_with_the_oracle(backend, device, dtype, kept, options):
    """Steps are counted for it: it begins as the first leaves the parameter."""
    recipe, decay = (dtype,) * 3, 0.3
    params, generator = model(recipe, device)
    optimizer = optimizer_for(params, options, recipe, backend, ema_decay=decay, ema_dtype=kept)
    old = [np.zeros_like(oracle.wide(p)) for p in params]
    before = [streams_of(optimizer, p) for p in params]
    u = ROUNDOFF[F64 if dtype == F64 else F32]
    for t in range(1, 4):
        assert_step(optimizer, params, lambda _: options, [p.grad for p in params], before)
        before = [streams_of(optimizer, p) for p in params]
        for index, param in enumerate(params):
            average, new = optimizer.ema_parameters()[param], oracle.wide(param)
            assert average.dtype == kept
            d = oracle.WIDE(0 if t == 1 else decay)
            exact = d * old[index] + (1 - d) * new
            # Weight, difference, product and sum, then the format.
            bound = 4 * u * (np.abs(old[index]) + np.abs(new)) + ROUNDOFF[kept] * np.abs(exact)
            check(f"ema {index}", oracle.wide(average), exact, bound * 1.01)
            old[index] = oracle.wide(average)
            assert optimizer.state[param]["step"] == t
        give_gradients(params, recipe, generator)
    assert_ran_on(optimizer, backend, recipe, options, ema=real_dtype(kept))


def test_averages_are_those_of_torchs_averaged_model(backend, device):
    ours = torch.nn.Linear(7, 5).to(device)
    theirs = torch.nn.Linear(7, 5).to(device)
    theirs.load_state_dict(ours.state_dict())
    arguments = {"lr": 0.1, "momentum": 0.9, "nesterov": True}
    mine = warpstep.SGD(ours.parameters(), ema_decay=0.6, backend=backend, **arguments)
    torchs = torch.optim.SGD(theirs.parameters(), **arguments)
    averaged = AveragedModel(theirs, multi_avg_fn=get_ema_multi_avg_fn(0.6))
    for step in range(5):
        set_grads(list(ours.parameters()), step)
        set_grads(list(theirs.parameters()), step)
        mine.step()
        torchs.step()
        averaged.update_parameters(theirs)
    pairs = zip(mine.ema_parameters().values(), averaged.module.parameters(), strict=True)
    for average, expected in pairs:  # some ten roundings a step of numbers below 8
        torch.testing.assert_close(average, expected, rtol=0, atol=5 * 10 * 8 * 2**-24)


@pytest.mark.parametrize("options", [Options(), MOMENTUM], ids=["plain", "momentum"])
@each_recipe
def test_statistics_and_zeroed_gradients(backend, device, recipe, options):
    """The same step, bit for bit, with both; the statistics as torch's norms."""
    params, _ = model(recipe, device)
    plain = [Parameter(p.detach().clone()) for p in params]
    for param, other in zip(params, plain, strict=True):
        set_grad(other, param.grad.clone())
    params[5].grad[3] = plain[5].grad[3] = math.inf
    mine = optimizer_for(params, options, recipe, backend, stats=True)
    other = optimizer_for(plain, options, recipe, backend)
    old = [oracle.wide(p) for p in params]
    mine.step(zero_grads=True)
    other.step()
    found = mine.statistics()
    # As in test_tail.py.
    roundings = 131 if backend == "cpu" and recipe[0] != F64 else 1.001
    for i, (param, twin) in enumerate(zip(params, plain, strict=True)):
        assert torch.equal(raw_bits(param), raw_bits(twin))
        assert not param.grad.any()
        assert found.nonfinite[i] == (i == 5)
        if i == 5:
            continue
        of = (oracle.wide(twin.grad), oracle.wide(param), oracle.wide(param) - old[i])
        norms = (found.grad_norm, found.param_norm, found.update_norm)
        for norm, values in zip(norms, of, strict=True):
            exact = np.sqrt(np.sum(values * values))
            bound = roundings * ROUNDOFF[F32] * exact
            check(f"norm {i}", oracle.wide(norm[i]), exact, bound)


@pytest.mark.parametrize("found", [0.0, 1.0, math.nan])
@pytest.mark.parametrize("options", [Options(), OPTIONS["dampening"]], ids=["plain", "dampening"])
def test_unscaled_gradients_and_steps_that_are_not_taken(backend, device, found, options):
    params, _ = model(F32S, device, sizes=(3, 20_000))
    optimizer = optimizer_for(params, options, F32S, backend, unscale_grads=True)
    optimizer.step()
    params_before = [raw_bits(p) for p in params]
    states = [
        {k: v.clone() for k, v in optimizer.state[p].items()} if options.momentum else {}
        for p in params
    ]
    grads = [p.grad.clone() for p in params]
    optimizer.grad_scale = torch.tensor(4.0, device=device)
    optimizer.found_inf = torch.tensor(found, device=device)
    optimizer.step()
    for param, bits, state, grad in zip(params, params_before, states, grads, strict=True):
        assert torch.equal(raw_bits(param), bits) == (found != 0)
        assert torch.equal(param.grad, grad / 4)
        for key, value in state.items():
            assert torch.equal(optimizer.state[param][key], value) == (found != 0)
    assert all(s["step"] == (2 if found == 0 else 1) for s in optimizer.state.values())


# ---- What cannot be stepped


def bad_gradient(param):
    param.grad = param.grad.to_sparse()


def bad_state(what):
    def spoil(optimizer, param):
        is_here = isinstance(what, torch.Tensor) and what.device.type == "cpu"
        optimizer.state[param]["momentum_buffer"] = what.to(param.device) if is_here else what

    return spoil


SPOILT = {
    # Without statistics the step is torch's own.
    "sparse": (lambda o, p: bad_gradient(p) or setattr(o, "stats", True), "sparse gradients"),
    "shape": (bad_state(torch.zeros(4)), "momentum_buffer.*shape"),
    "no-tensor": (bad_state(7), "momentum_buffer.*7"),
    "integers": (bad_state(torch.zeros(5, dtype=torch.int64)), "momentum_buffer.*int64"),
    "complex": (bad_state(torch.zeros(5, dtype=torch.complex64)), "momentum_buffer.*complex64"),
    "device": (bad_state(torch.zeros(5, device="meta")), "momentum_buffer.*meta"),
    "freed": (bad_state(torch.zeros(5)), "momentum_buffer.*freed"),
    "expanded": (lambda o, p: p.set_(p.new_zeros(1).expand(5)), "is an expanded tensor"),
    "momentum": (lambda o, p: o.param_groups[0].update(momentum="high"), "Invalid momentum value"),
    "dampening": (lambda o, p: o.param_groups[0].update(dampening=None), "Invalid dampening"),
    "nesterov": (lambda o, p: o.param_groups[0].update(nesterov="yes"), "Invalid nesterov"),
    "missing": (lambda o, p: o.param_groups[0].pop("momentum"), "'momentum' is missing"),
    "form": (lambda o, p: o.param_groups[0].update(decay_form="l2"), "Invalid decay_form"),
}


@pytest.mark.parametrize("case", SPOILT)
@pytest.mark.parametrize("begun", [True, False], ids=["later", "at first"])
def test_what_cannot_be_stepped_is_named_and_nothing_is_changed(backend, device, case, begun):
    params = [Parameter(torch.randn(5, device=device)) for _ in range(2)]
    named = [("first", params[0]), ("second", params[1])]
    optimizer = warpstep.SGD(named, lr=0.1, momentum=0.9, backend=backend)
    for param in params:
        param.grad = torch.randn_like(param)
    if begun:
        optimizer.step()
    spoil, message = SPOILT[case]
    with torch.no_grad():
        spoil(optimizer, params[1])
    if case == "freed":
        optimizer.state[params[1]]["momentum_buffer"].untyped_storage().resize_(0)
    of_group = case in ("momentum", "dampening", "nesterov", "missing", "form")
    bits = [raw_bits(p) for p in params if case != "expanded" or p is params[0]]
    state = dict(optimizer.state[params[0]])
    kept = {key: value.clone() for key, value in state.items()}
    where = "group 0" if of_group else r"parameter 1 of group 0 \('second'\)"
    with pytest.raises((RuntimeError, TypeError, ValueError), match=message) as caught:
        optimizer.step()
    assert caught.match(where)
    for param, old in zip(params, bits, strict=False):
        assert torch.equal(raw_bits(param), old)
    assert optimizer.state[params[0]] == state
    assert all(torch.equal(state[key], value) for key, value in kept.items())


def test_layouts_that_kernels_do_not_walk_go_to_the_reference(backend, device):
    """A parameter with gaps is stepped, and a buffer of other strides is laid out as it is."""
    base = torch.randn(6, 8, device=device)
    theirs = Parameter(base[:, ::2].clone())
    mine = Parameter(base[:, ::2])
    ours = warpstep.SGD([mine], lr=0.1, momentum=0.9, backend=backend)
    torchs = torch.optim.SGD([theirs], lr=0.1, momentum=0.9)
    others = base[:, 1::2].clone()
    for step in range(3):
        set_grads([mine, theirs], step)
        theirs.grad = mine.grad.clone()
        ours.step()
        torchs.step()
    torch.testing.assert_close(mine, theirs, rtol=0, atol=3 * 8 * 2**-24 * 8)
    assert torch.equal(base[:, 1::2], others)
    assert len(ours.plan.python_only) == 1
