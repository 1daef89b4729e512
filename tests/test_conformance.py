"""The conformance suite: every backend, recipe and option against the oracle, step by step.

Each step's oracle starts from the bits that the step before left, so that bounds stay at a few
roundings and nothing hides behind accumulated error.
"""

import itertools

import numpy as np
import pytest
import torch
from torch.nn import Parameter

import warpstep
from support import oracle
from support.cases import each_options, each_recipe
from support.conformance import assert_step, streams_of, zeros_of
from support.environment import INTERPRETED
from support.oracle import Options
from support.recipes import F32, RECIPES, SIZES, make, optimizer_for, set_grad
from warpstep.recipes import Recipe

# At the edges of the backends' chunks.
LONG = (16383, 16384, 16385, 32768 + 5, 50001)


def assert_ran_on(optimizer, backend, recipe, amsgrad):
    """That the step went through the backend's kernel, and not through the fallback."""
    if backend == "reference":
        assert not optimizer.plan.buckets
    else:
        assert [b.backend for b in optimizer.plan.buckets] == [backend]
        param, grad, moment = recipe
        moments = (moment,) * (3 if amsgrad else 2)
        assert optimizer.plan.buckets[0].recipe == Recipe("adamw", param, grad, moments)
        assert not optimizer.plan.python_only


@each_options
@each_recipe
def test_every_recipe_and_option_agrees_with_the_oracle(backend, device, recipe, options):
    generator = torch.Generator().manual_seed(0)
    params = [Parameter(make(n, recipe[0], device, generator)) for n in SIZES]
    optimizer = optimizer_for(params, options, recipe, backend)
    before = [zeros_of(p, options.amsgrad) for p in params]
    for t in range(1, 4):
        grads = [make(n, recipe[1], device, generator, scale=0.1 * t) for n in SIZES]
        for param, grad in zip(params, grads, strict=True):
            set_grad(param, grad)
        assert_step(optimizer, params, t, lambda _: options, grads, before)
        before = [streams_of(optimizer, p) for p in params]
    assert_ran_on(optimizer, backend, recipe, options.amsgrad)


@pytest.mark.parametrize("recipe", [RECIPES["float32"], RECIPES["bfloat16-moments-float32"]])
def test_long_tensors_and_late_steps(backend, device, recipe):
    """Several chunks a tensor, all reading the step counter that the launch itself advances."""
    generator = torch.Generator().manual_seed(1)
    params = [Parameter(make(n, recipe[0], device, generator)) for n in LONG]
    optimizer = optimizer_for(params, Options(), recipe, backend)
    for param in params:
        set_grad(param, torch.zeros_like(param, dtype=recipe[1]))
    optimizer.step()
    for late in (1.0, 7.0, 99_999.0, 2.0**23):
        for param in params:
            optimizer.state[param]["step"].fill_(late)
        before = [streams_of(optimizer, p) for p in params]
        grads = [make(n, recipe[1], device, generator) for n in LONG]
        for param, grad in zip(params, grads, strict=True):
            set_grad(param, grad)
        assert_step(optimizer, params, int(late) + 1, lambda _: Options(), grads, before)


@pytest.mark.parametrize("recipe", [RECIPES["float32"], RECIPES["bfloat16"]], ids=["f32", "bf16"])
def test_views_at_every_offset(backend, device, recipe):
    """Streams that are misaligned against each other, and neighbours that must not be touched."""
    generator = torch.Generator().manual_seed(2)
    size, margin = 77, 8
    cases = list(itertools.product(range(margin), (0, 1, 3)))
    bases = [make(size + 2 * margin, recipe[0], device, generator) for _ in cases]
    originals = [base.clone() for base in bases]
    params, grads = [], []
    for base, (at, grad_at) in zip(bases, cases, strict=True):
        params.append(Parameter(base[at : at + size]))
        grads.append(make(size + margin, recipe[1], device, generator)[grad_at : grad_at + size])
        set_grad(params[-1], grads[-1])
    options = Options(lr=0.1)
    optimizer = optimizer_for(params, options, recipe, backend)
    before = [zeros_of(p, False) for p in params]
    assert_step(optimizer, params, 1, lambda _: options, grads, before)
    assert_ran_on(optimizer, backend, recipe, False)
    for base, original, (at, _) in zip(bases, originals, cases, strict=True):
        assert torch.equal(base[:at], original[:at])
        assert torch.equal(base[at + size :], original[at + size :])
        assert not torch.equal(base, original)


@pytest.mark.parametrize("offset", [1, 2, 3, 5])
def test_long_tensors_whose_streams_all_begin_off_the_boundary(backend, device, offset):
    """A head before the first vector, and chunks that all begin that much later."""
    generator = torch.Generator().manual_seed(7)
    size = 40_001

    def view_of(values):
        base = torch.zeros(size + 8, device=device)
        base[offset : offset + size] = values.to(device)
        return base[offset : offset + size]

    numbers = [make(size, F32, "cpu", generator) for _ in range(4)]
    numbers[3].square_()
    param = Parameter(view_of(numbers[0]))
    param.grad = view_of(numbers[1])
    optimizer = warpstep.AdamW([param], backend=backend)
    optimizer.state[param] = {
        "step": torch.tensor(2.0, device=device),
        "exp_avg": view_of(numbers[2]),
        "exp_avg_sq": view_of(numbers[3]),
    }
    before = [streams_of(optimizer, param)]
    assert_step(optimizer, [param], 3, lambda _: Options(), [param.grad], before)
    assert_ran_on(optimizer, backend, (F32, F32, F32), False)


def test_groups_have_their_own_hyper_parameters(backend, device):
    """More groups than the arguments of one CUDA launch hold, each different."""
    generator = torch.Generator().manual_seed(3)
    count = 40 if INTERPRETED else 700
    options = [Options(lr=1e-3 * (i + 1), weight_decay=i / count) for i in range(count)]
    params = [Parameter(make(5, F32, device, generator)) for _ in range(count)]
    groups = [
        {"params": [p], "lr": o.lr, "weight_decay": o.weight_decay}
        for p, o in zip(params, options, strict=True)
    ]
    optimizer = warpstep.AdamW(groups, backend=backend)
    before = [zeros_of(p, False) for p in params]
    for t in (1, 2):
        grads = [make(5, F32, device, generator) for _ in params]
        for param, grad in zip(params, grads, strict=True):
            param.grad = grad
        assert_step(optimizer, params, t, options.__getitem__, grads, before)
        before = [streams_of(optimizer, p) for p in params]
        options = [Options(lr=o.lr / 2, weight_decay=o.weight_decay) for o in options]
        for group, o in zip(optimizer.param_groups, options, strict=True):
            group["lr"] = o.lr


def test_parameters_without_gradient_are_left_alone(backend, device):
    generator = torch.Generator().manual_seed(4)
    params = [Parameter(make(100, F32, device, generator)) for _ in range(6)]
    optimizer = warpstep.AdamW(params, backend=backend)
    taken = [0] * len(params)
    for t in range(8):
        for index, param in enumerate(params):
            param.grad = None if (index + t) % 3 == 0 else make(100, F32, device, generator)
        state = {k: v.clone() for k, v in optimizer.state[params[0]].items()}
        still = params[0].detach().clone() if params[0].grad is None else None
        optimizer.step()
        for index, param in enumerate(params):
            taken[index] += param.grad is not None
            assert optimizer.state[param].get("step", 0) == taken[index]
        if still is not None:
            assert torch.equal(params[0], still)
            assert all(torch.equal(state[k], optimizer.state[params[0]][k]) for k in state)


@pytest.mark.parametrize("dtype", [torch.complex64, torch.complex128])
def test_complex_parameters_are_pairs_of_real_ones(backend, device, dtype):
    params = [Parameter(torch.randn(33, dtype=dtype, device=device)) for _ in range(2)]
    grads = [torch.randn(33, dtype=dtype, device=device) for _ in range(2)]
    grads[1] = grads[1].conj()  # a lazy conjugate: its memory holds other numbers
    for param, grad in zip(params, grads, strict=True):
        param.grad = grad
    optimizer = warpstep.AdamW(params, backend=backend)
    before = [zeros_of(p, False) for p in params]
    resolved = [g.resolve_conj() for g in grads]
    assert_step(optimizer, params, 1, lambda _: Options(), resolved, before)


@pytest.mark.parametrize("amsgrad", [False, True])
def test_nan_and_infinity_propagate_as_in_torch(backend, device, amsgrad):
    """Against torch's for-loop: the same elements are NaN, the same infinite, at every step."""
    inf, nan = float("inf"), float("nan")
    special = [0.0, -0.0, 1.0, -1.0, 1e-30, 1e20, -1e20, 3e38, inf, -inf, nan]
    start, first, second = (
        t.flatten() for t in torch.meshgrid(*3 * [torch.tensor(special)], indexing="ij")
    )
    mine = Parameter(start.clone().to(device))
    theirs = Parameter(start.clone())
    arguments = {"lr": 0.1, "weight_decay": 0.1, "amsgrad": amsgrad}
    ours = warpstep.AdamW([mine], backend=backend, **arguments)
    torchs = torch.optim.AdamW([theirs], foreach=False, **arguments)

    def kind(tensor):
        tensor = tensor.detach().cpu()
        return torch.where(tensor.isnan(), 2, torch.where(tensor.isinf(), tensor.sign(), 0))

    for grad in (first, second, torch.ones_like(first)):
        mine.grad, theirs.grad = grad.clone().to(device), grad.clone()
        ours.step()
        torchs.step()
        for key, value in torchs.state[theirs].items():
            if key != "step":
                assert torch.equal(kind(ours.state[mine][key]), kind(value)), key
        assert torch.equal(kind(mine), kind(theirs))


@pytest.mark.parametrize("found", [1.0, 2.0, float("nan")])
def test_a_step_with_found_inf_is_not_taken(backend, device, found):
    generator = torch.Generator().manual_seed(5)
    params = [Parameter(make(n, F32, device, generator)) for n in (3, 20000)]
    optimizer = warpstep.AdamW(params, backend=backend)
    for param in params:
        param.grad = torch.full_like(param, 4.0)
    optimizer.grad_scale = torch.tensor(4.0, device=device)
    optimizer.found_inf = torch.tensor(0.0, device=device)
    optimizer.step()  # gradients of 1
    for param in params:
        taken = optimizer.state[param]
        assert torch.allclose(taken["exp_avg"], torch.full_like(param, 0.1), rtol=2**-22)
        assert torch.equal(param.grad, torch.full_like(param, 4.0))

    before = [p.detach().clone() for p in params]
    states = [{k: v.clone() for k, v in optimizer.state[p].items()} for p in params]
    optimizer.found_inf.fill_(found)
    optimizer.step()
    for param, old, state in zip(params, before, states, strict=True):
        assert torch.equal(param, old)
        assert all(torch.equal(optimizer.state[param][k], state[k]) for k in state)


def test_a_thousand_steps_stay_as_near_to_the_oracle_as_torchs_fused(backend, device):
    """An independent trajectory in extended precision; torch's fused kernel is the yardstick."""
    steps, size = 200 if INTERPRETED else 1000, 512
    generator = torch.Generator().manual_seed(6)
    start = make(size, F32, "cpu", generator)
    options = Options(lr=1e-3, weight_decay=0.1)
    mine, theirs = Parameter(start.clone().to(device)), Parameter(start.clone().to(device))
    arguments = {"lr": options.lr, "weight_decay": options.weight_decay}
    ours = warpstep.AdamW([mine], backend=backend, **arguments)
    fused = torch.optim.AdamW([theirs], fused=True, **arguments)
    truth = zeros_of(mine, False)
    for t in range(1, steps + 1):
        grad = make(size, F32, "cpu", generator)
        mine.grad, theirs.grad = grad.clone().to(device), grad.clone().to(device)
        ours.step()
        fused.step()
        truth = oracle.step(truth, oracle.wide(grad), t, options).after

    def error(param, state, name):
        value = oracle.wide(param if name == "param" else state[name])
        return float(np.sqrt(np.mean((value - getattr(truth, name)) ** 2)))

    for name in ("param", "exp_avg", "exp_avg_sq"):
        mine_off = error(mine, ours.state[mine], name)
        theirs_off = error(theirs, fused.state[theirs], name)
        # Roundings are a random walk; with 512 elements its length is known to some 5%.
        assert mine_off <= 1.1 * theirs_off, f"{name}: {mine_off:.3g} against {theirs_off:.3g}"
