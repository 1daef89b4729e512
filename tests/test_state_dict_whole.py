"""load_state_dict happens wholly or not at all, and says what it cannot take."""

import copy

import numpy
import pytest
import torch

import warpstep
from support.parameters import SHAPES, params_of, random, take_steps

LR = 0.01
CLASSES = [warpstep.AdamW, warpstep.Adam]


def stepped(cls, steps=2, **options):
    params = [(f"p{i}", random(s, i).requires_grad_()) for i, s in enumerate(SHAPES)]
    optimizer = cls(params, lr=LR, **options)
    take_steps(optimizer, range(steps))
    return optimizer


def state_without(*keys):
    def edit(state_dict):
        for key in keys:
            del state_dict["state"][1][key]

    return edit


def state_with(key, value):
    def edit(state_dict):
        state_dict["state"][1][key] = copy.deepcopy(value)

    return edit


def group_without(key):
    def edit(state_dict):
        del state_dict["param_groups"][0][key]

    return edit


def group_with(**items):
    def edit(state_dict):
        state_dict["param_groups"][0].update(items)

    return edit


def emptied(state_dict):
    state_dict["state"][1] = []


# What is wrong in a saved dict, and what the message says of it.
SPOILT = {
    "step-text": (state_with("step", "abc"), "step.*'abc'"),
    "step-none": (state_with("step", None), "no 'step'"),
    "step-list": (state_with("step", [1, 2]), r"step.*\[1, 2\]"),
    "step-complex": (state_with("step", 1j), "step.*1j"),
    "step-complex-tensor": (state_with("step", torch.tensor(1j)), "step.*complex64"),
    "step-two": (state_with("step", torch.ones(2)), r"step.*\(2,\)"),
    "step-none-at-all": (state_with("step", torch.ones(0)), r"step.*\(0,\)"),
    "step-huge": (state_with("step", 10**400), "step"),
    "step-missing": (state_without("step"), "no 'step'"),
    "exp_avg-missing": (state_without("exp_avg"), "no 'exp_avg'"),
    "exp_avg_sq-missing": (state_without("exp_avg_sq"), "no 'exp_avg_sq'"),
    "both-missing": (state_without("exp_avg", "exp_avg_sq"), "'exp_avg' and no 'exp_avg_sq'"),
    "exp_avg-none": (state_with("exp_avg", None), "no 'exp_avg'"),
    "exp_avg-number": (state_with("exp_avg", 0.5), "exp_avg.*0.5"),
    "exp_avg-complex": (state_with("exp_avg", torch.tensor(1j)), "exp_avg.*complex64"),
    "exp_avg-integer": (state_with("exp_avg", torch.tensor(1)), "exp_avg.*int64"),
    "no-dict": (emptied, "expected a dict"),
}
AMSGRAD = {"max-missing": (state_without("max_exp_avg_sq"), "no 'max_exp_avg_sq'")}
GROUPS = {
    "lr-missing": (group_without("lr"), "no 'lr'"),
    "betas-missing": (group_without("betas"), "no 'betas'"),
    "eps-missing": (group_without("eps"), "no 'eps'"),
    "weight_decay-missing": (group_without("weight_decay"), "no 'weight_decay'"),
    "decay_form": (group_with(decay_form="cubic"), "decay_form.*cubic"),
    "base_lr": (group_with(decay_form="independent", base_lr=None), "base_lr"),
    "ema_decay": (group_with(ema_decay=2.0), "ema_decay"),
}


def assert_whole(optimizer, state_dict, message):
    """Loading it raises, and the optimizer goes on as one to which nothing happened."""
    control = copy.deepcopy(optimizer)
    identities = {p: {k: id(t) for k, t in s.items()} for p, s in optimizer.state.items()}
    groups, plan = optimizer.param_groups, optimizer.plan
    with pytest.raises(ValueError, match=message) as caught:
        optimizer.load_state_dict(state_dict)
    assert caught.value.__cause__ is None
    assert optimizer.param_groups is groups
    assert optimizer.plan is plan
    assert identities == {p: {k: id(t) for k, t in s.items()} for p, s in optimizer.state.items()}
    take_steps(optimizer, range(5, 7))
    take_steps(control, range(5, 7))
    for p, q in zip(params_of(optimizer), params_of(control), strict=True):
        assert torch.equal(p, q)


@pytest.mark.parametrize("before", [0, 2], ids=["fresh", "after-two-steps"])
@pytest.mark.parametrize("case", [*SPOILT, *AMSGRAD])
@pytest.mark.parametrize("cls", CLASSES)
def test_spoilt_state_is_refused_whole(cls, case, before):
    edit, message = {**SPOILT, **AMSGRAD}[case]
    state_dict = copy.deepcopy(stepped(cls, amsgrad=case in AMSGRAD).state_dict())
    edit(state_dict)
    optimizer = stepped(cls, before, amsgrad=case in AMSGRAD)
    assert_whole(optimizer, state_dict, rf"parameter 1 of group 0 \('p1'\).*{message}")


@pytest.mark.parametrize("before", [0, 2], ids=["fresh", "after-two-steps"])
@pytest.mark.parametrize("case", GROUPS)
def test_spoilt_groups_are_refused_whole(case, before):
    edit, message = GROUPS[case]
    state_dict = copy.deepcopy(stepped(warpstep.AdamW).state_dict())
    edit(state_dict)
    assert_whole(stepped(warpstep.AdamW, before), state_dict, f"{message}.*group 0|group 0.*")


def test_independent_decay_without_lr_is_refused_whole():
    state_dict = copy.deepcopy(stepped(torch.optim.AdamW).state_dict())
    del state_dict["param_groups"][0]["lr"]
    assert_whole(stepped(warpstep.AdamW, decay_form="independent"), state_dict, "no 'lr'")


OTHERS = {
    "SGD": ({"momentum": 0.9}, "momentum_buffer|betas"),
    "Adagrad": ({}, "betas"),
    "RMSprop": ({}, "betas"),
    "Adamax": ({}, "exp_inf.*no 'exp_avg_sq'"),
}


@pytest.mark.parametrize("name", OTHERS)
def test_another_optimizers_checkpoint_is_told(name):
    options, message = OTHERS[name]
    source = stepped(getattr(torch.optim, name), **options)
    optimizer = stepped(warpstep.AdamW)
    assert_whole(optimizer, source.state_dict(), f"{message}.*another optimizer")


def test_a_models_state_dict_is_told():
    with pytest.raises(KeyError, match=r"state.*\['weight', 'bias'\]"):  # torch: KeyError, too
        stepped(warpstep.AdamW).load_state_dict(torch.nn.Linear(2, 2).state_dict())


def test_a_derived_class_that_cannot_take_the_state_leaves_it():
    class Strict(warpstep.AdamW):
        def __setstate__(self, state):
            super().__setstate__(state)
            raise KeyboardInterrupt

    optimizer, control = stepped(Strict), stepped(warpstep.AdamW)
    state, groups = optimizer.state, optimizer.param_groups
    with pytest.raises(KeyboardInterrupt):
        optimizer.load_state_dict(stepped(warpstep.AdamW, 4).state_dict())
    assert optimizer.state is state
    assert optimizer.param_groups is groups
    take_steps(optimizer, range(2, 4))
    take_steps(control, range(2, 4))
    for p, q in zip(params_of(optimizer), params_of(control), strict=True):
        assert torch.equal(p, q)


TAKEN = [2, 2.0, True, numpy.int64(2), numpy.float32(2), torch.tensor([2])]


@pytest.mark.parametrize("fused", [None, True])
@pytest.mark.parametrize("step", TAKEN, ids=repr)
def test_steps_that_torch_takes(step, fused):
    def loaded(cls):
        state_dict = copy.deepcopy(stepped(torch.optim.AdamW).state_dict())
        for state in state_dict["state"].values():
            state["step"] = copy.deepcopy(step)
        optimizer = stepped(cls, fused=fused)
        optimizer.load_state_dict(state_dict)
        take_steps(optimizer, range(2, 3))
        return [float(optimizer.state[p]["step"]) for p in params_of(optimizer)]

    expected = [1 + float(step)] * len(SHAPES)
    assert loaded(warpstep.AdamW) == expected == loaded(torch.optim.AdamW)


@pytest.mark.parametrize("cls", CLASSES)
def test_states_that_are_empty_or_absent(cls):
    state_dict = copy.deepcopy(stepped(cls).state_dict())
    state_dict["state"][0] = {}
    del state_dict["state"][1]
    optimizer = stepped(cls)
    optimizer.load_state_dict(state_dict)
    take_steps(optimizer, range(2, 3))
    assert [optimizer.state[p]["step"].item() for p in params_of(optimizer)] == [1, 1, 3]


@pytest.mark.parametrize("step", [float("inf"), float("nan")])
def test_a_schedule_of_averages_survives_a_count_that_is_no_number(step):
    source = stepped(warpstep.AdamW, ema_decay=lambda _: 0.5)
    state_dict = copy.deepcopy(source.state_dict())
    state_dict["state"][1]["step"] = step
    optimizer = stepped(warpstep.AdamW, 0, ema_decay=lambda _: 0.5)
    optimizer.load_state_dict(state_dict)
    assert optimizer._ema_steps == 2


# ---- states edited by hand


@pytest.mark.parametrize("key", ["step", "exp_avg", "exp_avg_sq", "max_exp_avg_sq"])
def test_a_step_refuses_a_state_that_has_lost_a_tensor(key, backend):
    optimizer = stepped(warpstep.AdamW, amsgrad=True, backend=backend)
    params = params_of(optimizer)
    lost = optimizer.state[params[1]].pop(key)
    before = [p.detach().clone() for p in params]
    counts = [s["step"].item() for s in optimizer.state.values() if "step" in s]
    for p in params:
        p.grad = torch.ones_like(p)
    for _ in range(2):
        with pytest.raises(RuntimeError, match=rf"parameter 1 of group 0 \('p1'\).*no '{key}'"):
            optimizer.step()
    assert all(torch.equal(p, q) for p, q in zip(params, before, strict=True))
    assert counts == [s["step"].item() for s in optimizer.state.values() if "step" in s]
    optimizer.state[params[1]][key] = lost
    optimizer.step()
    assert [optimizer.state[p]["step"].item() for p in params] == [3, 3, 3]


def test_a_lost_tensor_of_a_parameter_without_gradient_harms_nobody():
    ours, theirs = stepped(warpstep.AdamW), stepped(torch.optim.AdamW)
    for optimizer in (ours, theirs):
        params = params_of(optimizer)
        del optimizer.state[params[1]]["exp_avg"]
        optimizer.zero_grad()
        params[0].grad = torch.ones_like(params[0])
        optimizer.step()
        assert optimizer.state[params[0]]["step"].item() == 3


def test_what_others_keep_in_the_state_is_no_state_yet():
    # torch raises a KeyError here.
    optimizer = stepped(warpstep.AdamW, 0)
    param = params_of(optimizer)[0]
    optimizer.state[param]["note"] = "a wrapper's"
    take_steps(optimizer, range(2))
    assert optimizer.state[param]["step"].item() == 2
    assert optimizer.state[param]["note"] == "a wrapper's"
