"""decay_form="min": of each tensor its own smallest magnitude before the step, whole and of now."""

import dataclasses

import pytest
import torch
from torch.nn import Parameter

import warpstep
from support import sgd
from support.bits import raw_bits
from support.conformance import assert_step, streams_of, zeros_of
from support.oracle import Options
from support.recipes import F32, RECIPES, make, optimizer_for, set_grad

MIN = Options(lr=0.25, weight_decay=0.3, decay_form="min")
OTHERS = ("decoupled", "l1", "cautious", "l1l2", "coupled")
# Of one chunk and of several on every backend; the smallest may be in any of them.
SIZES = (1, 5, 1000, 16_385, 40_001)


def planted(size, place, least, generator, dtype=F32, device="cpu"):
    """Numbers of magnitudes from 1 to 2, but for one."""
    numbers = torch.rand(size, generator=generator) + 1
    numbers *= torch.where(torch.rand(size, generator=generator) < 0.5, -1, 1)
    numbers.view(-1)[place] = least
    return numbers.to(device, dtype)


def model_of(device, dtype=F32, grad=F32, seed=0):
    """Parameters with different smallest magnitudes, some of them in each of their chunks."""
    generator = torch.Generator().manual_seed(seed)
    params = []
    for i, size in enumerate(SIZES):
        for j, place in enumerate(sorted({0, size // 2, size - 1})):
            least = (-1) ** j * 2.0 ** -(i + j + 1)
            params.append(Parameter(planted(size, place, least, generator, dtype, device)))
    for param in params:
        set_grad(param, make(param.shape, grad, device, generator))
    return params, generator


@pytest.mark.parametrize("recipe", [RECIPES["float32"], RECIPES["bfloat16-moments-float32"]])
def test_each_tensor_has_its_own_beside_groups_of_other_forms(backend, device, recipe):
    params, generator = model_of(device, *recipe[:2])
    forms = ["min", *OTHERS]
    options = [dataclasses.replace(MIN, decay_form=forms[i % 6]) for i in range(len(params))]
    options[6] = dataclasses.replace(options[6], weight_decay=0.0)  # no decay in this form, too
    assert options[6].form == "min"
    groups = [
        {"params": [p], "decay_form": o.form, "weight_decay": o.weight_decay}
        for p, o in zip(params, options, strict=True)
    ]
    optimizer = optimizer_for(groups, MIN, recipe, backend)
    before = [zeros_of(p, False) for p in params]
    for t in (1, 2, 3):
        grads = [p.grad for p in params]
        assert_step(optimizer, params, t, options.__getitem__, grads, before)
        before = [streams_of(optimizer, p) for p in params]
        for param in params:
            set_grad(param, make(param.shape, recipe[1], device, generator))
    if backend != "reference":
        assert len(optimizer.plan.buckets) == 1


def test_sgd(backend, device):
    params, _ = model_of(device)
    options = sgd.Options(lr=0.25, weight_decay=0.3, decay_form="min", momentum=0.9)
    optimizer = sgd.optimizer_for(params, options, RECIPES["float32"], backend)
    for _ in range(3):
        before = [sgd.streams_of(optimizer, p) for p in params]
        grads = [p.grad for p in params]
        sgd.assert_step(optimizer, params, lambda _: options, grads, before)


def test_the_decay_alone_is_exact(backend, device):
    """With no gradient to speak of: p - lr * min|p| * sign(p), in powers of two."""
    values = torch.tensor([2.0, -0.5, 4.0, -8.0])
    param, zeros = Parameter(values.to(device)), Parameter(torch.zeros(3, device=device))
    with_zero = Parameter(torch.tensor([1.0, 0.0, -3.0], device=device))
    for p in (param, zeros, with_zero):
        p.grad = torch.zeros_like(p)
    optimizer = warpstep.SGD(
        [param, zeros, with_zero], lr=0.5, weight_decay=1e-9, decay_form="min", backend=backend
    )
    optimizer.step()
    assert param.tolist() == [1.75, -0.25, 3.75, -7.75]
    assert zeros.tolist() == [0, 0, 0]
    assert with_zero.tolist() == [1, 0, -3]
    optimizer.step()
    assert param.tolist() == [1.625, -0.125, 3.625, -7.625]


@pytest.mark.parametrize("place", [0, 20_000, 40_000])
@pytest.mark.parametrize("dtype", ["float32", "float64", "bfloat16", "float16"])
def test_a_nan_makes_all_of_its_tensor_nan(backend, device, dtype, place):
    """As torch.amin has it. An infinite element is merely not the smallest."""
    dtype, generator = getattr(torch, dtype), torch.Generator().manual_seed(0)
    params = [
        Parameter(planted(40_001, place, special, generator, dtype, device))
        for special in (torch.nan, torch.inf, 0.5)
    ]
    infinite = Parameter(torch.full((3,), torch.inf, device=device, dtype=dtype))
    before = [p.detach().clone() for p in params]
    for p in (*params, infinite):
        p.grad = torch.zeros_like(p)
    optimizer = warpstep.SGD(
        [*params, infinite], lr=0.5, weight_decay=1.0, decay_form="min", backend=backend
    )
    optimizer.step()
    assert params[0].isnan().all()
    for param, old in zip(params[1:], before[1:], strict=True):
        least = old.abs().amin()
        expected = (old.double() - 0.5 * least.double() * old.sign().double()).to(dtype)
        assert torch.equal(param, expected)
    assert infinite.isnan().all()  # inf - inf


@pytest.mark.parametrize("dtype", [torch.complex64, torch.complex128])
def test_complex_parameters_are_pairs_of_real_ones(backend, device, dtype):
    params = [Parameter(torch.randn(n, dtype=dtype, device=device)) for n in (33, 20_000)]
    for param in params:
        param.grad = torch.randn_like(param)
    optimizer = optimizer_for(params, MIN, (dtype,) * 3, backend)
    before = [zeros_of(p, False) for p in params]
    grads = [p.grad for p in params]
    assert_step(optimizer, params, 1, lambda _: MIN, grads, before)


def test_with_the_tail(backend, device):
    """Unscaled, clipped, averaged, counted, amsgrad and maximize, in views off alignment."""
    recipe, generator = RECIPES["float32"], torch.Generator().manual_seed(5)
    base = torch.randn(50_000, generator=generator).to(device)
    params = [Parameter(base[3:20_003]), Parameter(base[20_006:20_080])]
    options = dataclasses.replace(MIN, amsgrad=True, maximize=True)
    optimizer = optimizer_for(params, options, recipe, backend, ema_decay=0.5, stats=True)
    before = [zeros_of(p, True) for p in params]
    for t in (1, 2, 3):
        for param in params:
            param.grad = make(param.shape, F32, device, generator, scale=64.0)
        optimizer.grad_scale = torch.tensor(64.0, device=device)
        optimizer.found_inf = torch.tensor(0.0, device=device)
        scaled = dataclasses.replace(options, grad_factor=1 / 64)
        grads = [p.grad for p in params]
        assert_step(optimizer, params, t, lambda _, o=scaled: o, grads, before)
        assert optimizer.statistics().nonfinite.eq(0).all()
        before = [streams_of(optimizer, p) for p in params]


@pytest.mark.parametrize("stats", [False, True])
def test_a_skipped_step_changes_nothing_and_the_next_is_right(backend, device, stats):
    params, _ = model_of(device)
    optimizer = optimizer_for(params, MIN, RECIPES["float32"], backend, stats=stats)
    optimizer.step()
    before = [streams_of(optimizer, p) for p in params]
    kept = [p.detach().clone() for p in params]
    optimizer.found_inf = torch.tensor(1.0, device=device)
    optimizer.step()
    assert all(torch.equal(p, k) for p, k in zip(params, kept, strict=True))
    optimizer.found_inf.zero_()
    assert_step(optimizer, params, 2, lambda _: MIN, [p.grad for p in params], before)


def test_the_form_can_come_and_go(backend, device):
    """A group's form is edited, and its weight decay, between steps of one optimizer; it goes."""
    params, _ = model_of(device)
    optimizer = optimizer_for(
        params, dataclasses.replace(MIN, decay_form=None), (F32,) * 3, backend
    )
    before = [zeros_of(p, False) for p in params]
    changes = [("decoupled", 0.3), ("min", 0.3), ("min", 0.0), ("min", 0.1), ("l1", 0.1)]
    changes += [(None, 0.1)]
    for t, (form, weight_decay) in enumerate(changes, 1):
        group = optimizer.param_groups[0]
        group.update(decay_form=form, weight_decay=weight_decay)
        if form is None:
            del group["decay_form"]
        options = dataclasses.replace(MIN, decay_form=form, weight_decay=weight_decay)
        grads = [p.grad for p in params]
        assert_step(optimizer, params, t, lambda _, o=options: o, grads, before)
        before = [streams_of(optimizer, p) for p in params]


def test_parameters_without_gradient_and_without_elements(backend, device):
    params, _ = model_of(device)
    params.append(Parameter(torch.empty(0, device=device)))
    params[-1].grad = torch.empty(0, device=device)
    optimizer = optimizer_for(params, MIN, (F32,) * 3, backend)
    optimizer.step()
    before = [streams_of(optimizer, p) for p in params]
    still = params[3].detach().clone()
    params[3].grad = None
    stepped = [p for p in params if p is not params[3]]
    before = [b for p, b in zip(params, before, strict=True) if p is not params[3]]
    assert_step(optimizer, stepped, 2, lambda _: MIN, [p.grad for p in stepped], before)
    assert torch.equal(params[3], still)


def test_a_parameter_that_is_met_twice(backend, device):
    """Its second mention sees what the first has left."""
    values = torch.tensor([2.0, -0.5])
    param = Parameter(values.to(device))
    param.grad = torch.zeros_like(param)
    with pytest.warns(UserWarning, match="duplicate parameters"):
        optimizer = warpstep.SGD(
            [param, param], lr=0.5, weight_decay=1.0, decay_form="min", backend=backend
        )
    optimizer.step()
    assert param.tolist() == [1.625, -0.125]


def test_one_launch_a_bucket_more_and_the_same_table(backend, device):
    if backend == "reference":
        return  # launches nothing

    def of_a_step(optimizer):
        before = warpstep.status().launches[backend]
        optimizer.step()
        return warpstep.status().launches[backend] - before

    params, _ = model_of(device)
    plain = optimizer_for(params, dataclasses.replace(MIN, decay_form="l1"), (F32,) * 3, backend)
    plain.step()
    assert of_a_step(plain) == 1
    assert all(bucket.least is None for bucket in plain.plan.buckets)
    optimizer = optimizer_for(params, MIN, (F32,) * 3, backend)
    optimizer.step()
    (bucket,) = optimizer.plan.buckets
    table = bucket.least
    # On the CPU, as with norms, only the step's launches are counted.
    assert of_a_step(optimizer) == (1 if backend == "cpu" else 2)
    assert optimizer.plan.buckets == [bucket]
    assert bucket.least is table
    expected = [p.detach().abs().amin().item() for p in params]
    optimizer.step()
    assert table[: len(params)].tolist() == expected


def test_state_dicts_have_the_form(backend, device):
    params, _ = model_of(device)
    optimizer = optimizer_for(params, MIN, (F32,) * 3, backend)
    optimizer.step()
    saved = optimizer.state_dict()
    assert saved["param_groups"][0]["decay_form"] == "min"
    copies = [Parameter(p.detach().clone()) for p in params]
    resumed = warpstep.AdamW(copies, decay_form="min", backend=backend)
    resumed.load_state_dict(saved)
    for copy, param in zip(copies, params, strict=True):
        copy.grad = param.grad.clone()
    optimizer.step()
    resumed.step()
    assert all(torch.equal(a, b) for a, b in zip(params, copies, strict=True))


def test_the_bits_are_the_same_on_every_backend_and_number_of_threads(backend, device):
    def stepped(backend, device):
        params, _ = model_of(device)
        optimizer = optimizer_for(params, MIN, (F32,) * 3, backend)
        for _ in range(2):
            optimizer.step()
        return [raw_bits(p) for p in params]

    if backend == "reference":
        return  # a few roundings away
    before = torch.get_num_threads()
    try:
        torch.set_num_threads(1)
        alone = stepped("cpu", "cpu")
        torch.set_num_threads(2)
        assert all(map(torch.equal, alone, stepped(backend, device)))
    finally:
        torch.set_num_threads(before)
