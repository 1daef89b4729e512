"""warpstep.replace() in mid-run: learning rate schedulers and GradScaler go on as with torch's."""

import copy
import gc
import pickle
import types
import warnings
import weakref

import pytest
import torch
from torch.nn import Parameter
from torch.optim import lr_scheduler as lrs
from torch.optim.swa_utils import SWALR

import warpstep

STEPS = 12
LR, BETAS = 0.1, (0.9, 0.99)


def chained(optimizer):
    return lrs.ChainedScheduler(
        [lrs.LinearLR(optimizer, 0.1, total_iters=4), lrs.ExponentialLR(optimizer, 0.8)],
        optimizer,
    )


def sequential(optimizer):
    parts = [
        lrs.LinearLR(optimizer, 0.1, total_iters=4),
        lrs.CosineAnnealingLR(optimizer, 6),
        lrs.ConstantLR(optimizer, 0.5, total_iters=2),
    ]
    return lrs.SequentialLR(optimizer, parts, milestones=[4, 9])


# Every scheduler of torch: test_every_scheduler_of_torch_is_here looks.
SCHEDULERS = {
    "LambdaLR": lambda o: lrs.LambdaLR(o, lambda epoch: 0.95**epoch + 0.01 * (epoch % 3)),
    "MultiplicativeLR": lambda o: lrs.MultiplicativeLR(o, lambda epoch: 0.9 + 0.01 * (epoch % 2)),
    "StepLR": lambda o: lrs.StepLR(o, 3, 0.3),
    "MultiStepLR": lambda o: lrs.MultiStepLR(o, [2, 7], 0.3),
    "ConstantLR": lambda o: lrs.ConstantLR(o, 0.25, total_iters=8),
    "LinearLR": lambda o: lrs.LinearLR(o, 0.1, total_iters=8),
    "ExponentialLR": lambda o: lrs.ExponentialLR(o, 0.9),
    "CosineAnnealingLR": lambda o: lrs.CosineAnnealingLR(o, 10, 0.001),
    "CosineAnnealingWarmRestarts": lambda o: lrs.CosineAnnealingWarmRestarts(o, 4),
    "CyclicLR": lambda o: lrs.CyclicLR(o, 0.01, 0.2, step_size_up=3),
    "OneCycleLR": lambda o: lrs.OneCycleLR(o, 0.2, total_steps=STEPS + 1),
    "PolynomialLR": lambda o: lrs.PolynomialLR(o, 9, 1.7),
    "SequentialLR": sequential,
    "ChainedScheduler": chained,
    "ReduceLROnPlateau": lambda o: lrs.ReduceLROnPlateau(o, factor=0.5, patience=1),
    "SWALR": lambda o: SWALR(o, 0.01, anneal_epochs=7),
}


def test_every_scheduler_of_torch_is_here():
    ours = {name for name in lrs.__all__ if name != "LRScheduler"} | {"SWALR"}
    assert ours == SCHEDULERS.keys()


def new(kind):
    params = [Parameter(torch.linspace(-1, 1, 5)), Parameter(torch.ones(3))]
    momenta = [{"betas": BETAS}, {"betas": (0.8, 0.98)}]
    if kind is torch.optim.SGD:
        momenta = [{"momentum": 0.9}, {"momentum": 0.8}]
    groups = [{"params": params[:1]}, {"params": params[1:], "lr": 0.03, **momenta[1]}]
    return kind(groups, lr=LR, **momenta[0])


def set_equal_grads(optimizer):
    for group in optimizer.param_groups:
        for param in group["params"]:
            param.grad = torch.full_like(param, 0.5)


def step_all(optimizer, scheduler):
    set_equal_grads(optimizer)
    optimizer.step()
    scheduler.step(*((1.0,) if isinstance(scheduler, lrs.ReduceLROnPlateau) else ()))


def schedule(optimizer):
    return [(g["lr"], g.get("betas"), g.get("momentum")) for g in optimizer.param_groups]


def restored(make, optimizer, scheduler):
    """A scheduler made anew, as torch's documentation of load_state_dict has it."""
    saved = copy.deepcopy((scheduler.state_dict(), optimizer.state_dict()))
    again = make(optimizer)
    again.load_state_dict(saved[0])
    optimizer.load_state_dict(saved[1])
    return again


def run(kind, make, at=None, anew=False):
    """What each step found in the groups, what was warned of, and the parameters at the end."""
    optimizer = new(kind)
    seen = []
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        scheduler = make(optimizer)
        for step in range(STEPS):
            if step == at:
                optimizer = warpstep.replace(optimizer)
                assert type(optimizer) is getattr(warpstep, kind.__name__)
                if anew:
                    scheduler = restored(make, optimizer, scheduler)
            step_all(optimizer, scheduler)
            seen.append(schedule(optimizer))
    warned = [str(w.message) for w in caught]
    return seen, warned, [p for group in optimizer.param_groups for p in group["params"]]


CLASSES = [torch.optim.AdamW, torch.optim.Adam, torch.optim.SGD]


@pytest.mark.parametrize("anew", [False, True], ids=["same", "anew"])
@pytest.mark.parametrize("at", [0, 1, 3, 6])
@pytest.mark.parametrize("name", SCHEDULERS)
def test_the_rates_are_those_of_a_run_that_was_not_replaced(name, at, anew):
    """Exactly, at each step; the momenta that OneCycleLR and CyclicLR move as well."""
    make = SCHEDULERS[name]
    expected, warned, theirs = run(CLASSES[0], make)
    found, also_warned, ours = run(CLASSES[0], make, at, anew)
    assert found == expected
    if not anew:
        assert also_warned == warned
    for a, b in zip(ours, theirs, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("kind", CLASSES[1:])
@pytest.mark.parametrize("name", ["OneCycleLR", "CyclicLR", "SequentialLR"])
def test_of_the_others(kind, name):
    *found, ours = run(kind, SCHEDULERS[name], 5)
    *expected, theirs = run(kind, SCHEDULERS[name])
    assert found == expected
    for a, b in zip(ours, theirs, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-6)


def test_a_rate_that_is_a_tensor():
    """Schedulers write into the tensor that the group holds."""
    runs = []
    for replaced in (False, True):
        param = Parameter(torch.ones(4))
        rate = torch.tensor(0.1)
        optimizer = torch.optim.AdamW([param], lr=rate)
        scheduler = lrs.LinearLR(optimizer, 0.1, total_iters=8)
        seen = []
        for step in range(STEPS):
            if replaced and step == 3:
                optimizer = warpstep.replace(optimizer)
            step_all(optimizer, scheduler)
            seen.append(optimizer.param_groups[0]["lr"].item())
        assert optimizer.param_groups[0]["lr"] is rate
        runs.append((seen, param.detach()))
    assert runs[0][0] == runs[1][0]
    torch.testing.assert_close(runs[0][1], runs[1][1], rtol=1e-5, atol=1e-6)


def test_a_group_added_and_a_state_loaded_after_it():
    """The scheduler holds the optimizer itself, so it sees whatever becomes of its groups."""
    runs = []
    for replaced in (False, True):
        optimizer = new(torch.optim.AdamW)
        saved = copy.deepcopy(optimizer.state_dict())
        scheduler = lrs.StepLR(optimizer, 2, 0.5)
        step_all(optimizer, scheduler)
        if replaced:
            optimizer = warpstep.replace(optimizer)
        optimizer.load_state_dict(saved)
        seen = []
        for _ in range(4):
            step_all(optimizer, scheduler)
            seen.append(schedule(optimizer))
        # torch's own way of adding a group under a scheduler
        optimizer.add_param_group({"params": [Parameter(torch.ones(2))], "lr": 0.5})
        scheduler.base_lrs.append(0.5)
        for _ in range(4):
            step_all(optimizer, scheduler)
            seen.append(schedule(optimizer))
        runs.append(seen)
    assert runs[0] == runs[1]


@pytest.mark.parametrize("first", ["optimizer", "scheduler"])
def test_which_of_the_two_is_stepped_first_is_still_noticed(first):
    """torch warns where the first scheduler.step() comes before any optimizer.step()."""
    optimizer = new(torch.optim.AdamW)
    scheduler = lrs.ExponentialLR(optimizer, 0.9)
    warpstep.replace(optimizer)
    set_equal_grads(optimizer)
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        if first == "optimizer":
            optimizer.step()
        scheduler.step()
    warned = [str(w.message) for w in caught]
    assert len(warned) == (first == "scheduler")
    assert all("before `optimizer.step()`" in message for message in warned)


def test_a_wrapped_step_has_warpsteps_arguments_and_keeps_nothing_alive():
    optimizer = new(torch.optim.AdamW)
    scheduler = lrs.ExponentialLR(optimizer, 0.9)
    warpstep.replace(optimizer)
    set_equal_grads(optimizer)
    optimizer.step(zero_grads=True)
    assert optimizer.plan.buckets
    for group in optimizer.param_groups:
        assert all(p.grad.count_nonzero() == 0 for p in group["params"])
    alive = weakref.ref(optimizer)
    gc.disable()
    try:
        del optimizer, scheduler
        assert alive() is None
    finally:
        gc.enable()


@pytest.mark.parametrize("copied", [copy.deepcopy, lambda x: pickle.loads(pickle.dumps(x))])
def test_copies_of_both_together(copied):
    optimizer = new(torch.optim.AdamW)
    scheduler = lrs.LinearLR(optimizer, 0.1, total_iters=8)
    step_all(optimizer, scheduler)
    warpstep.replace(optimizer)
    step_all(optimizer, scheduler)
    twin, twins_scheduler = copied((optimizer, scheduler))
    assert type(twin) is warpstep.AdamW
    assert twins_scheduler.optimizer is twin
    for _ in range(4):
        step_all(optimizer, scheduler)
        step_all(twin, twins_scheduler)
        assert schedule(twin) == schedule(optimizer)


@pytest.mark.parametrize("when", ["before backward", "after backward", "after unscale_"])
@pytest.mark.parametrize("fused", [None, True])
@pytest.mark.parametrize("overflow", [False, True])
def test_grad_scaler(overflow, fused, when):
    """A scaler's books are keyed by the optimizer's identity, which stays."""
    runs = []
    for replaced in (False, True):
        param = Parameter(torch.linspace(-1, 1, 6))
        optimizer = torch.optim.AdamW([param], lr=0.1, fused=fused)
        scaler = torch.amp.GradScaler("cpu", init_scale=1024.0)

        def replace_at(moment, optimizer=optimizer, replaced=replaced):
            if replaced and moment == when:
                warpstep.replace(optimizer)

        for step in range(3):
            optimizer.zero_grad()
            if step == 1:
                replace_at("before backward")
            factor = float("inf") if overflow and step == 1 else 1.0
            scaler.scale(param.square().sum() * factor).backward()
            if step == 1:
                replace_at("after backward")
                scaler.unscale_(optimizer)
                replace_at("after unscale_")
            scaler.step(optimizer)
            scaler.update()
        assert isinstance(optimizer, warpstep.AdamW) == replaced
        assert optimizer.state[param]["step"] == 3 - overflow
        runs.append((param.detach().clone(), scaler.get_scale()))
    torch.testing.assert_close(runs[0][0], runs[1][0], rtol=1e-5, atol=1e-6)
    assert runs[0][1] == runs[1][1]


def test_a_step_replaced_under_a_scheduler_is_refused():
    """A scheduler wraps whatever step it finds: one that is not torch's would be lost."""
    optimizer = new(torch.optim.AdamW)

    def step(self, closure=None):
        raise NotImplementedError

    optimizer.step = types.MethodType(step, optimizer)
    lrs.ExponentialLR(optimizer, 0.9)
    with pytest.raises(TypeError, match="step was replaced"):
        warpstep.replace(optimizer)
    assert type(optimizer) is torch.optim.AdamW
