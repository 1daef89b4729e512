"""warpstep.AdamW and Adam are torch's classes: signature, groups, hooks, copies, autograd, compile.

Numerics over layouts and dtypes are in test_torch_layouts.py; where numbers are compared here, the
tolerance is the one derived in support/tolerance.py.
"""

import copy
import inspect

import pytest
import torch
from torch.optim.optimizer import (
    register_optimizer_step_post_hook,
    register_optimizer_step_pre_hook,
)

import warpstep
from support.cases import PAIRS, on_each_device
from support.parameters import SHAPES, new_params, set_grads
from support.tolerance import assert_same_params, bound

OURS_ONLY = {
    "backend": "auto",
    "state_dtype": None,
    "master": None,
    "rounding": None,
    "seed": 0,
    "copies": None,
    "decay_form": None,
    "ema_decay": None,
    "ema_dtype": None,
    "stats": False,
    "unscale_grads": False,
}
LR = 0.01

on_both = pytest.mark.parametrize(("ours", "theirs"), PAIRS.values(), ids=PAIRS)


def snapshot(optimizer):
    """Bits of everything a step may change: parameters and state."""
    params = [p.detach().clone() for g in optimizer.param_groups for p in g["params"]]
    return params, copy.deepcopy(optimizer.state_dict())


def assert_unchanged(optimizer, before):
    params, state_dict = snapshot(optimizer)
    for now, then in zip(params, before[0], strict=True):
        assert torch.equal(now, then)
    assert state_dict["param_groups"] == before[1]["param_groups"]
    torch.testing.assert_close(state_dict["state"], before[1]["state"], rtol=0, atol=0)


@on_both
def test_subclass_and_signature(ours, theirs):
    assert issubclass(ours, theirs)
    mine = dict(inspect.signature(ours).parameters)
    assert {name: mine.pop(name).default for name in OURS_ONLY} == OURS_ONLY
    torchs = inspect.signature(theirs).parameters
    described = {n: (p.kind, p.default) for n, p in mine.items()}
    assert described == {n: (p.kind, p.default) for n, p in torchs.items()}


@on_both
def test_defaults_and_groups_have_torchs_keys(ours, theirs):
    a, b = ours(new_params()), theirs(new_params())
    assert a.defaults == b.defaults
    assert list(a.defaults) == list(b.defaults)
    assert [list(g) for g in a.param_groups] == [list(g) for g in b.param_groups]
    assert a.step() is None
    set_grads(a.param_groups[0]["params"], 0)
    a.step()
    assert [list(g) for g in a.param_groups] == [list(g) for g in b.param_groups]


@on_both
def test_repr_is_torchs(ours, theirs):
    options = {"lr": 0.5, "betas": (0.5, 0.6), "amsgrad": True}
    assert repr(ours(new_params(), **options)) == repr(theirs(new_params(), **options))


def test_adam_is_not_adamw():
    assert not issubclass(warpstep.Adam, torch.optim.AdamW)
    assert issubclass(warpstep.AdamW, torch.optim.Adam)


@on_each_device
@on_both
def test_groups_with_their_own_options_and_added_ones(ours, theirs, device):
    p, q = new_params(SHAPES * 2, device), new_params(SHAPES * 2, device)
    optimizers = []
    for cls, params in ((ours, p), (theirs, q)):
        groups = [
            {"params": params[:1], "lr": 0.02, "weight_decay": 0.5},
            {"params": params[1:2], "betas": (0.5, 0.9), "amsgrad": True, "maximize": True},
        ]
        optimizer = cls(groups, lr=LR)
        optimizer.add_param_group({"params": params[2], "eps": 0.1})
        for step in range(4):
            if step == 2:  # in the middle of a run
                optimizer.add_param_group({"params": params[3:5], "lr": 0.03})
                optimizer.add_param_group({"params": iter(params[5:])})
            set_grads(params, step)
            optimizer.step()
        optimizers.append(optimizer)
    a, b = optimizers
    assert_same_params(p, q, 4, lr=0.03)
    steps = [a.state[x]["step"].item() for x in p]
    assert steps == [4, 4, 4, 2, 2, 2]
    assert [list(g) for g in a.param_groups] == [list(g) for g in b.param_groups]


def test_named_parameters():
    module = torch.nn.Sequential(torch.nn.Linear(3, 2), torch.nn.Linear(2, 1))
    twin = copy.deepcopy(module)
    a = warpstep.AdamW(module.named_parameters(), lr=LR)
    b = torch.optim.AdamW(twin.named_parameters(), lr=LR)
    assert a.param_groups[0]["param_names"] == ["0.weight", "0.bias", "1.weight", "1.bias"]
    set_grads(list(module.parameters()), 0)
    set_grads(list(twin.parameters()), 0)
    a.step()
    b.step()
    assert_same_params(module.parameters(), twin.parameters(), 1, LR)
    assert a.state_dict()["param_groups"] == b.state_dict()["param_groups"]
    with pytest.raises(ValueError, match="names"):
        a.add_param_group({"params": [("x", torch.zeros(1)), torch.zeros(1)]})


def test_one_generator_or_one_group_of_parameters():
    params = new_params()
    assert warpstep.AdamW(p for p in params).param_groups[0]["params"] == params
    assert warpstep.AdamW([{"params": params[0]}]).param_groups[0]["params"] == params[:1]
    with pytest.raises(TypeError, match="iterable"):
        warpstep.AdamW(params[0])
    with pytest.raises(TypeError, match="set"):
        warpstep.AdamW([{"params": set(params)}])


TENSOR_HYPERS = {
    "lr-0-dim": {"lr": lambda: torch.tensor(LR)},
    "lr-1-element": {"lr": lambda: torch.tensor([LR])},
    "lr-float64": {"lr": lambda: torch.tensor(LR, dtype=torch.float64)},
    "betas-0-dim": {"betas": lambda: (torch.tensor(0.8), torch.tensor(0.95))},
    "betas-1-element": {"betas": lambda: (torch.tensor([0.8]), torch.tensor([0.95]))},
    "all": {
        "lr": lambda: torch.tensor(LR),
        "betas": lambda: (torch.tensor(0.8), torch.tensor(0.95)),
    },
}


@on_both
@pytest.mark.parametrize("case", TENSOR_HYPERS)
@pytest.mark.parametrize("requested", ["auto", "reference"])
def test_tensor_hyper_parameters(case, requested, ours, theirs):
    p, q = new_params(), new_params()
    a, b = (
        cls(params, foreach=False, **more, **{k: f() for k, f in TENSOR_HYPERS[case].items()})
        for cls, params, more in ((ours, p, {"backend": requested}), (theirs, q, {}))
    )
    lr = TENSOR_HYPERS[case].get("lr", lambda: 1e-3)()
    for step in range(4):
        if step == 2 and isinstance(lr, torch.Tensor):  # as a scheduler does
            for optimizer in (a, b):
                optimizer.param_groups[0]["lr"].fill_(2 * LR)
        set_grads(p, step)
        set_grads(q, step)
        a.step()
        b.step()
    # Tensors of float32 say 0.95 with an error of 2^-25, which torch's float32 arithmetic keeps in
    # 1 - beta: one more ulp / (1 - beta2) of the update.
    slack = 4 * torch.finfo(torch.float32).eps / 0.05 * LR
    for x, y in zip(p, q, strict=True):
        torch.testing.assert_close(x, y, rtol=0, atol=bound(4, 2 * LR, y) + slack)
    kinds = [type(a.param_groups[0]["lr"]), *map(type, a.param_groups[0]["betas"])]
    assert kinds == [type(b.param_groups[0]["lr"]), *map(type, b.param_groups[0]["betas"])]


@pytest.mark.parametrize("enabled", [True, False], ids=["grad", "no_grad"])
def test_closure(enabled):
    p, q = new_params(), new_params()
    a, b = warpstep.AdamW(p, lr=LR), torch.optim.AdamW(q, lr=LR)
    calls = []

    def closure_of(params, optimizer):
        def closure():
            calls.append(torch.is_grad_enabled())
            optimizer.zero_grad()
            loss = sum((x * x).sum() for x in params)
            loss.backward()
            return loss

        return closure

    for _ in range(3):
        with torch.set_grad_enabled(enabled):
            mine = a.step(closure_of(p, a))
            other = b.step(closure=closure_of(q, b))
            assert torch.is_grad_enabled() == enabled
        assert mine.item() == pytest.approx(other.item(), rel=1e-5)
    assert calls == [True] * 6
    # Gradients depend on the parameters: errors of one step enter the next gradient, 2 p.
    assert_same_params(p, q, 9, LR)


def test_closure_that_raises_changes_nothing():
    params = new_params()
    optimizer = warpstep.AdamW(params, lr=LR)
    for step in range(2):  # before the first step, and after one
        set_grads(params, step)
        before = snapshot(optimizer)
        with pytest.raises(ZeroDivisionError):
            optimizer.step(lambda: 1 / 0)
        assert_unchanged(optimizer, before)
        optimizer.step()


def test_hooks_are_called_once_in_torchs_order():
    params = new_params()
    optimizer = warpstep.AdamW(params, lr=LR)
    seen = []

    def hook(name):
        def called(opt, args, kwargs):
            steps = opt.state[params[0]].get("step", torch.zeros(())).item()
            seen.append((name, opt is optimizer, args[1:], kwargs, steps))

        return called

    handles = [
        register_optimizer_step_pre_hook(hook("global pre")),
        register_optimizer_step_post_hook(hook("global post")),
        optimizer.register_step_pre_hook(hook("pre")),
        optimizer.register_step_post_hook(hook("post")),
    ]
    try:
        set_grads(params, 0)
        optimizer.step()
        optimizer.step(closure=None)
    finally:
        for handle in handles:
            handle.remove()
    first = [("global pre", 0), ("pre", 0), ("post", 1), ("global post", 1)]
    assert seen[:4] == [(name, True, (), {}, steps) for name, steps in first]
    again = [(name, True, (), {"closure": None}, steps + 1) for name, steps in first]
    assert seen[4:] == again
    optimizer.step()
    assert len(seen) == 8


def test_pre_hook_may_set_the_gradients_and_replace_the_closure():
    params = new_params()
    optimizer = warpstep.AdamW(params, lr=LR)
    optimizer.register_step_pre_hook(lambda opt, args, kwargs: ((opt,), {"closure": lambda: 7}))
    optimizer.register_step_pre_hook(lambda *_: set_grads(params, 0))
    assert optimizer.step(lambda: 1) == 7
    assert optimizer.state[params[0]]["step"].item() == 1


@pytest.mark.parametrize("differentiable", [False, True])
def test_hooks_are_called_once_in_every_mode(differentiable):
    torch.optim.Adam(new_params())  # torch patches its own step when an instance is made
    params = [p.detach() for p in new_params()]
    optimizer = warpstep.Adam(params, differentiable=differentiable)
    calls = []
    optimizer.register_step_pre_hook(lambda *_: calls.append("pre"))
    optimizer.register_step_post_hook(lambda *_: calls.append("post"))
    set_grads(params, 0)
    optimizer.step()
    assert calls == ["pre", "post"]


def test_subclass_with_its_own_step():
    class Counting(warpstep.AdamW):
        steps = 0

        def step(self, closure=None):
            self.steps += 1
            return super().step(closure)

    p, q = new_params(), new_params()
    a, b = Counting(p, lr=LR), torch.optim.AdamW(q, lr=LR)
    for step in range(2):
        set_grads(p, step)
        set_grads(q, step)
        assert a.step(lambda: 5) == 5
        b.step()
    assert a.steps == 2
    assert_same_params(p, q, 2, LR)


PRESENCE = {
    "first-late": [(0,), (0,), (), ()],
    "last-never": [(2,)] * 4,
    "none-at-first": [(0, 1, 2), (), (), ()],
    "vanishing": [(), (1,), (1,), ()],
    "by-turns": [(0,), (1,), (2,), (0, 1), (1, 2), ()],
}


@on_each_device
@pytest.mark.parametrize("requested", ["auto", "reference"])
@pytest.mark.parametrize("case", PRESENCE)
def test_gradients_that_are_none(case, requested, device):
    p, q = new_params(device=device), new_params(device=device)
    a = warpstep.AdamW(p, lr=LR, backend=requested)
    b = torch.optim.AdamW(q, lr=LR)
    for step, skip in enumerate(PRESENCE[case]):
        set_grads(p, step, skip=skip)
        set_grads(q, step, skip=skip)
        a.step()
        b.step()
        assert [x in a.state for x in p] == [x in b.state for x in q]
    assert_same_params(p, q, len(PRESENCE[case]), LR)
    for x, y in zip(p, q, strict=True):
        if y in b.state:
            assert a.state[x]["step"].item() == b.state[y]["step"].item()


def test_frozen_parameters_stay_as_they_are():
    params = new_params()
    params[1].requires_grad_(False)
    before = params[1].clone()
    optimizer = warpstep.AdamW(params, lr=LR)
    for _ in range(2):
        optimizer.zero_grad()
        sum((p * p).sum() for p in params).backward()
        optimizer.step()
    assert torch.equal(params[1], before)
    assert params[1] not in optimizer.state
    assert optimizer.state[params[0]]["step"].item() == 2


@pytest.mark.parametrize("fused", [None, True, False])
@pytest.mark.parametrize("set_to_none", [True, False])
def test_zero_grad(set_to_none, fused):
    params = new_params()
    optimizer = warpstep.AdamW(params, lr=LR, fused=fused)
    set_grads(params, 0)
    grads = [p.grad for p in params]
    optimizer.step()
    optimizer.zero_grad(set_to_none=set_to_none)
    if set_to_none:
        assert all(p.grad is None for p in params)
    else:
        assert all(p.grad is g and not g.any() for p, g in zip(params, grads, strict=True))
