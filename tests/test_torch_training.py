"""Under torch's LR schedulers and GradScaler: the same run as torch's optimizer under the same."""

import copy
import inspect
import math
import pickle
import warnings

import pytest
import torch
from torch.optim import lr_scheduler, swa_utils

import warpstep
from support.cases import on_each_device
from support.parameters import new_params, random, set_grads
from support.tolerance import assert_same_params, bound

LR = 0.01


# ---- LR schedulers

SCHEDULERS = {
    "LambdaLR": {"lr_lambda": lambda epoch: 0.9**epoch},
    "MultiplicativeLR": {"lr_lambda": lambda epoch: 0.95},
    "StepLR": {"step_size": 3},
    "MultiStepLR": {"milestones": [3, 7]},
    "ConstantLR": {"total_iters": 5},
    "LinearLR": {"total_iters": 8},
    "ExponentialLR": {"gamma": 0.9},
    "PolynomialLR": {"total_iters": 15, "power": 2.0},
    "CosineAnnealingLR": {"T_max": 8},
    "CosineAnnealingWarmRestarts": {"T_0": 4},
    "CyclicLR": {"base_lr": LR / 10, "max_lr": LR, "step_size_up": 4},  # cycles betas
    "OneCycleLR": {"max_lr": LR, "total_steps": 25},  # cycles betas
    "ReduceLROnPlateau": {"patience": 1, "factor": 0.5},
    "SWALR": {"swa_lr": LR / 2, "anneal_epochs": 5},
}


def chained(optimizer):
    parts = [lr_scheduler.ConstantLR(optimizer), lr_scheduler.ExponentialLR(optimizer, 0.9)]
    return lr_scheduler.ChainedScheduler(parts)


def sequential(optimizer):
    warmup = lr_scheduler.LinearLR(optimizer, total_iters=4)
    return lr_scheduler.SequentialLR(
        optimizer, [warmup, lr_scheduler.CosineAnnealingLR(optimizer, 10)], milestones=[4]
    )


MADE_OF_OTHERS = {"ChainedScheduler": chained, "SequentialLR": sequential}


def all_schedulers():
    """Names of the public scheduler classes of this torch."""
    bases = (lr_scheduler.LRScheduler, lr_scheduler.ReduceLROnPlateau)
    return [
        name
        for module in (lr_scheduler, swa_utils)
        for name, value in vars(module).items()
        if inspect.isclass(value)
        and issubclass(value, bases)
        and not name.startswith("_")
        and name != "LRScheduler"
        and (module is lr_scheduler or name not in vars(lr_scheduler))
    ]


def make_scheduler(name, optimizer):
    if name in MADE_OF_OTHERS:
        return MADE_OF_OTHERS[name](optimizer)
    cls = getattr(lr_scheduler, name, None) or getattr(swa_utils, name)
    return cls(optimizer, **SCHEDULERS[name])


def run_scheduled(cls, name, tensor_lr, **options):
    params = new_params()
    groups = [{"params": params[:1]}, {"params": params[1:], "weight_decay": 0.3}]
    lr = torch.tensor(LR) if tensor_lr else LR
    optimizer = cls(groups, lr=lr, **options)
    seen = []
    with warnings.catch_warnings():
        # "Detected call of lr_scheduler.step() before optimizer.step()" among others.
        warnings.simplefilter("error", UserWarning)
        warnings.filterwarnings("ignore", "The epoch parameter in")
        scheduler = make_scheduler(name, optimizer)
        for step in range(20):
            set_grads(params, step)
            optimizer.step()
            optimizer.zero_grad()
            scheduler.step(*([1.0] if name == "ReduceLROnPlateau" else []))
            seen.append([(float(g["lr"]), *map(float, g["betas"])) for g in optimizer.param_groups])
    return params, seen


@pytest.mark.parametrize("tensor_lr", [False, True], ids=["float-lr", "tensor-lr"])
@pytest.mark.parametrize("name", all_schedulers())
def test_scheduler(name, tensor_lr):
    if name not in SCHEDULERS and name not in MADE_OF_OTHERS:
        pytest.skip("newer than this test: give it arguments in SCHEDULERS")
    theirs, expected = run_scheduled(torch.optim.AdamW, name, tensor_lr, foreach=False)
    ours, seen = run_scheduled(warpstep.AdamW, name, tensor_lr)
    assert seen == expected
    assert len({lr for step in seen for lr, *_ in step}) > 1
    assert_same_params(ours, theirs, 20, LR)


def test_the_table_of_schedulers_is_of_this_torch():
    assert set(SCHEDULERS) | set(MADE_OF_OTHERS) <= set(all_schedulers())


def test_cycled_betas_reach_the_step():
    _, seen = run_scheduled(warpstep.AdamW, "OneCycleLR", tensor_lr=False)
    assert len({step[0][1] for step in seen}) > 10


# ---- GradScaler

SCALE = 1024.0  # a power of two: scaling and unscaling are exact


def scaled_run(cls, grads_of_step, unscale, device="cpu", steps=6, **options):
    """Steps under a GradScaler. Returns parameters, optimizer, scaler and the step counts."""
    params = new_params(device=device)
    optimizer = cls(params, lr=LR, **options)
    scaler = torch.amp.GradScaler(device, init_scale=SCALE, growth_interval=1000)
    scaler.scale(torch.ones((), device=device))  # makes the scale, as scaling a loss does
    taken = []
    for step in range(steps):
        grads_of_step(params, step, scaler.get_scale())
        if unscale:
            scaler.unscale_(optimizer)
        scaler.step(optimizer)
        scaler.update()
        taken.append([float(optimizer.state[p].get("step", 0)) for p in params])
    return params, optimizer, scaler, taken


def finite(params, step, scale):
    set_grads(params, step, scale=scale)


def with_inf_at(bad_steps, value=math.inf):
    def grads_of_step(params, step, scale):
        set_grads(params, step, scale=scale)
        if step in bad_steps:
            params[2].grad[5] = value

    return grads_of_step


SCALED = {
    "finite": finite,
    "inf-first": with_inf_at({0}),
    "inf-later": with_inf_at({2, 3}),
    "nan": with_inf_at({1}, math.nan),
}
IMPLEMENTATIONS = {
    "auto": {},
    "reference": {"backend": "reference"},
    "not-fused": {"fused": False},
    "fused": {"fused": True},
}


@on_each_device
@pytest.mark.parametrize("unscale", [False, True], ids=["step", "unscale-then-step"])
@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
@pytest.mark.parametrize("case", SCALED)
def test_grad_scaler(case, implementation, unscale, device):
    options = IMPLEMENTATIONS[implementation]
    theirs, _, their_scaler, expected = scaled_run(
        torch.optim.AdamW, SCALED[case], unscale, device, foreach=False
    )
    ours, optimizer, scaler, taken = scaled_run(
        warpstep.AdamW, SCALED[case], unscale, device, **options
    )
    assert taken == expected
    assert scaler.get_scale() == their_scaler.get_scale()
    assert_same_params(ours, theirs, 6, LR)
    for name in ("grad_scale", "found_inf"):  # nothing of the scaler stays behind
        assert getattr(optimizer, name, None) is None


@on_each_device
@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
@pytest.mark.parametrize("before", [0, 2], ids=["first-step", "third-step"])
def test_skipped_step_changes_no_bit(before, implementation, device):
    params, optimizer, scaler, _ = scaled_run(
        warpstep.AdamW, finite, False, device, steps=before, **IMPLEMENTATIONS[implementation]
    )
    with_inf_at({9})(params, 9, scaler.get_scale())
    at = [p.detach().clone() for p in params]
    grads = left_by_scaler(params, implementation)
    state = copy.deepcopy([dict(optimizer.state[p]) for p in params])
    scaler.step(optimizer)
    scaler.update()
    for i, p in enumerate(params):
        assert torch.equal(p, at[i])
        assert torch.equal(p.grad, grads[i])
        for key, value in optimizer.state[p].items():
            # On a first step, moments may have been made: of zeros.
            assert torch.equal(value, state[i].get(key, torch.zeros_like(value))), key
    assert scaler.get_scale() == SCALE / 2


def left_by_scaler(params, implementation):
    """Gradients after GradScaler's step: only read where it leaves the unscaling to ours."""
    return [p.grad / (1 if implementation == "fused" else SCALE) for p in params]


@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
def test_gradients_are_only_read(implementation):
    params, optimizer, scaler, _ = scaled_run(
        warpstep.AdamW, finite, False, steps=1, **IMPLEMENTATIONS[implementation]
    )
    set_grads(params, 1, scale=SCALE)
    grads = [p.grad for p in params]
    expected = left_by_scaler(params, implementation)
    scaler.step(optimizer)
    for p, grad, bits in zip(params, grads, expected, strict=True):
        assert p.grad is grad
        assert torch.equal(grad, bits)


@pytest.mark.parametrize("fused", [None, True])
def test_whether_the_step_unscales_is_as_with_torchs_class(fused):
    """Also in copies and pickles, after a checkpoint of the other kind, and for groups added."""

    def unscales(optimizer):
        return getattr(optimizer, "_step_supports_amp_scaling", False)

    optimizer = warpstep.AdamW(new_params(), fused=fused)
    assert unscales(optimizer) == unscales(torch.optim.AdamW(new_params(), fused=fused))
    assert unscales(optimizer) == bool(fused)
    optimizer.add_param_group({"params": new_params()[:1]})
    other = warpstep.AdamW(
        [{"params": new_params()}, {"params": new_params()[:1]}], fused=not fused
    )
    optimizer.load_state_dict(other.state_dict())
    for twin in (optimizer, copy.deepcopy(optimizer), pickle.loads(pickle.dumps(optimizer))):
        assert unscales(twin) == bool(fused)
    replaced = warpstep.replace(torch.optim.AdamW(new_params(), fused=fused))
    assert unscales(replaced) == bool(fused)


def test_grad_scaler_with_a_view_with_gaps_and_a_float64_parameter():
    # Kernel and reference side by side: an infinity in one's gradient stops the other's step.
    def new():
        kinds = [random((6, 8), 0)[:, ::2], random((7,), 1), random((5,), 2).double()]
        return [p.detach().requires_grad_() for p in kinds]

    def run(cls, bad):
        params = new()
        optimizer = cls(params, lr=LR)
        scaler = torch.amp.GradScaler("cpu", init_scale=SCALE)
        scaler.scale(torch.ones(()))
        for step in range(3):
            for i, p in enumerate(params):
                p.grad = random(p.shape, 100 * step + i).to(p.dtype) * scaler.get_scale()
                if (step, i) == (1, bad):
                    p.grad.view(-1)[0] = math.inf
            scaler.step(optimizer)
            scaler.update()
        return params, [float(optimizer.state[p]["step"]) for p in params]

    for bad in (None, 0, 1, 2):
        ours, taken = run(warpstep.AdamW, bad)
        theirs, _ = run(torch.optim.AdamW, bad)
        assert taken == [3.0 if bad is None else 2.0] * 3
        for p, q in zip(ours, theirs, strict=True):
            torch.testing.assert_close(p, q, rtol=0, atol=bound(3, LR, q))


def test_copied_optimizer_steps_under_a_scaler():
    _, optimizer, scaler, _ = scaled_run(warpstep.AdamW, finite, False, steps=1)
    copied = copy.deepcopy(optimizer)
    set_grads(copied.param_groups[0]["params"], 1, scale=SCALE)
    set_grads(optimizer.param_groups[0]["params"], 1, scale=SCALE)
    scaler.step(copied)
    scaler.step(optimizer)
    for group, twin in zip(optimizer.param_groups, copied.param_groups, strict=True):
        for p, q in zip(group["params"], twin["params"], strict=True):
            assert torch.equal(p, q)


def test_disabled_scaler():
    params = new_params()
    optimizer = warpstep.AdamW(params, lr=LR)
    scaler = torch.amp.GradScaler("cpu", enabled=False)
    set_grads(params, 0)
    scaler.step(optimizer)
    scaler.update()
    assert optimizer.state[params[0]]["step"].item() == 1
