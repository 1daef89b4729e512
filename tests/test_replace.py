"""warpstep.replace(): a live torch optimizer goes on, with nothing lost and nothing copied.

What schedulers and scalers see of it: test_replace_schedulers.py.
"""

import copy

import pytest
import torch
from torch.nn import Parameter

import warpstep
from support.parameters import new_params, set_grads, take_steps

SIZES = [(3,), (4, 5), (), (600,)]
CLASSES = [torch.optim.AdamW, torch.optim.Adam]


def groups_of(params):
    """Two groups with hyper-parameters, names and a key that torch does not know."""
    named = [(f"layer.{i}", p) for i, p in enumerate(params)]
    return [
        {"params": named[:2], "lr": 0.02, "weight_decay": 0.3, "mine": "kept"},
        {"params": named[2:], "betas": (0.8, 0.98), "eps": 1e-6, "mine": None},
    ]


def pair(kind, **options):
    """torch's optimizer after some steps, its parameters; and those of an equal one."""
    lists = [new_params(SIZES), new_params(SIZES)]
    optimizers = [kind(groups_of(params), **options) for params in lists]
    for optimizer in optimizers:
        take_steps(optimizer, range(3))
    return optimizers, lists


@pytest.mark.parametrize(
    "options",
    [{}, {"fused": True}, {"foreach": False}, {"amsgrad": True}, {"maximize": True}],
    ids=str,
)
@pytest.mark.parametrize("kind", CLASSES)
def test_goes_on(kind, options):
    """The steps after it are those that the old optimizer would have taken."""
    (old, kept), (mine, theirs) = pair(kind, **options)
    new = warpstep.replace(old)
    assert type(new) is getattr(warpstep, kind.__name__)
    take_steps(new, range(10, 13))
    take_steps(kept, range(10, 13))
    for a, b in zip(mine, theirs, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-6)
    for a, b in zip(mine, theirs, strict=True):
        assert new.state[a]["step"].item() == kept.state[b]["step"].item() == 6


@pytest.mark.parametrize("kind", CLASSES)
def test_the_same_object_with_all_that_it_holds(kind):
    """Whoever holds the optimizer, its groups, its state or a tensor of it holds warpstep's."""
    (old, _), (params, _) = pair(kind, amsgrad=True)
    old.noted = "by somebody"
    groups, state = list(old.param_groups), {p: (s, dict(s)) for p, s in old.state.items()}
    held = (old.param_groups, old.state, old.defaults)
    before = copy.deepcopy(old.state_dict())
    new = warpstep.replace(old)
    assert new is old
    for ours, theirs in zip((new.param_groups, new.state, new.defaults), held, strict=True):
        assert ours is theirs
    assert all(a is b for a, b in zip(new.param_groups, groups, strict=True))
    for param in params:
        entry, tensors = state[param]
        assert new.state[param] is entry
        assert entry.keys() == tensors.keys()
        assert all(entry[key] is tensor for key, tensor in tensors.items())
    assert new.noted == "by somebody"
    assert [g["mine"] for g in new.param_groups] == ["kept", None]
    after = new.state_dict()
    assert before["param_groups"] == after["param_groups"]
    take_steps(new, range(1))
    assert all(new.state[p] is state[p][0] for p in params)


def test_moments_keep_their_dtypes():
    """float32 moments of bfloat16 parameters, as a framework may have put them there."""
    params = new_params(SIZES, dtype=torch.bfloat16)
    old = torch.optim.AdamW(params)
    take_steps(old, range(1))
    for state in old.state.values():
        for key in ("exp_avg", "exp_avg_sq"):
            state[key] = state[key].float()
    new = warpstep.replace(old)
    take_steps(new, range(3))
    for param in params:
        assert new.state[param]["exp_avg"].dtype == torch.float32


def test_steps_of_other_forms():
    """Counters that are numbers, or float64, go on counting."""
    (old, _), (params, _) = pair(torch.optim.AdamW)
    old.state[params[0]]["step"] = 3
    old.state[params[1]]["step"] = torch.tensor(3.0, dtype=torch.float64)
    new = warpstep.replace(old)
    take_steps(new, range(1))
    assert {s["step"].item() for s in new.state.values()} == {4.0}
    assert {s["step"].dtype for s in new.state.values()} == {torch.float32}


def test_before_the_first_step():
    """An optimizer without state is taken over as well, tensor hyper-parameters and all."""
    mine, theirs = new_params(SIZES), new_params(SIZES)
    lr = torch.tensor(0.02)
    new = warpstep.replace(torch.optim.AdamW(mine, lr=lr))
    assert new.param_groups[0]["lr"] is lr
    take_steps(new, range(3))
    take_steps(torch.optim.AdamW(theirs, lr=0.02), range(3))
    for a, b in zip(mine, theirs, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-6)


def test_hooks():
    """All hooks stay, are given the optimizer, and go when their handles say so."""
    (old, _), _ = pair(torch.optim.AdamW)
    called = []
    handles = [
        old.register_step_pre_hook(lambda o, *_: called.append(("pre", o))),
        old.register_step_post_hook(lambda o, *_: called.append(("post", o))),
        old.register_state_dict_post_hook(lambda o, *_: called.append(("saved", o))),
        old.register_load_state_dict_post_hook(lambda o: called.append(("loaded", o))),
    ]
    new = warpstep.replace(old)
    take_steps(new, range(1))
    new.load_state_dict(new.state_dict())
    assert [name for name, _ in called] == ["pre", "post", "saved", "loaded"]
    assert all(optimizer is new for _, optimizer in called)
    for handle in handles:
        handle.remove()
    take_steps(new, range(1))
    assert len(called) == 4


def test_differentiable():
    """differentiable=True is carried over, to torch's own step."""
    params = new_params(SIZES)
    old = torch.optim.AdamW(params, differentiable=True)
    assert warpstep.replace(old).param_groups[0]["differentiable"] is True


def test_checkpoint_goes_back():
    """The new one's checkpoint loads into torch's class."""
    (old, _), _ = pair(torch.optim.AdamW)
    new = warpstep.replace(old)
    take_steps(new, range(1))
    fresh = torch.optim.AdamW(groups_of(new_params(SIZES)))
    fresh.load_state_dict(copy.deepcopy(new.state_dict()))
    assert {s["step"].item() for s in fresh.state.values()} == {4.0}


SGD_OPTIONS = [
    *({}, {"momentum": 0.9}, {"momentum": 0.9, "nesterov": True, "weight_decay": 0.1}),
    *({"momentum": 0.9, "dampening": 0.4}, {"maximize": True, "weight_decay": 0.1}),
    *({"momentum": 0.9, "fused": True}, {"momentum": 0.9, "foreach": False}),
]


def sgd_pair(steps=3, **options):
    """As `pair`: two groups, of which the second has other hyper-parameters."""
    lists = [new_params(SIZES), new_params(SIZES)]
    optimizers = []
    for params in lists:
        groups = [{"params": params[:2]}, {"params": params[2:], "lr": 0.03, "mine": "kept"}]
        optimizers.append(torch.optim.SGD(groups, lr=0.02, **options))
        take_steps(optimizers[-1], range(steps))
    return optimizers, lists


@pytest.mark.parametrize("options", SGD_OPTIONS, ids=str)
@pytest.mark.parametrize("steps", [0, 1, 3])
def test_sgd_goes_on(options, steps):
    """After one step a dampened momentum has begun: the next is not taken for the first."""
    (old, kept), (mine, theirs) = sgd_pair(steps, **options)
    held = {p: dict(old.state[p]) for p in mine if p in old.state}
    groups = list(old.param_groups)
    new = warpstep.replace(old)
    assert new is old
    assert type(new) is warpstep.SGD
    assert all(a is b for a, b in zip(new.param_groups, groups, strict=True))
    take_steps(new, range(10, 13))
    take_steps(kept, range(10, 13))
    for a, b in zip(mine, theirs, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-6)
        buffers = [o.state[p].get("momentum_buffer") for o, p in ((new, a), (kept, b))]
        assert (buffers[0] is None) == (buffers[1] is None)
        if buffers[0] is not None:
            torch.testing.assert_close(*buffers, rtol=1e-5, atol=1e-6)
            if steps:
                assert buffers[0] is held[a]["momentum_buffer"]
    assert new.plan.buckets
    assert new.param_groups[1]["mine"] == "kept"
    fresh = torch.optim.SGD([{"params": g["params"]} for g in groups], lr=0.1)
    fresh.load_state_dict(copy.deepcopy(new.state_dict()))
    assert [g["lr"] for g in fresh.param_groups] == [0.02, 0.03]


def test_sgd_under_a_scheduler_and_a_scaler():
    """Both go on with the optimizer that they hold."""
    found = []
    for replaces in (False, True):
        params = new_params(SIZES)
        optimizer = torch.optim.SGD(params, lr=0.1, momentum=0.9)
        scheduler = torch.optim.lr_scheduler.StepLR(optimizer, 2, gamma=0.5)
        scaler = torch.amp.GradScaler("cpu", init_scale=4.0)
        scaler.scale(torch.zeros(()))
        for seed in range(6):
            if replaces and seed == 3:
                assert type(warpstep.replace(optimizer)) is warpstep.SGD
            set_grads(params, seed, scale=scaler.get_scale())
            if seed == 4:
                params[1].grad[0, 0] = float("inf")
            scaler.step(optimizer)
            scaler.update()
            scheduler.step()
        assert scaler.get_scale() == 2.0
        found.append([*params, torch.tensor(optimizer.param_groups[0]["lr"])])
    for a, b in zip(*found, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-6)


def sgd_with_state(**state):
    params = new_params(SIZES)
    optimizer = torch.optim.SGD(params, lr=0.1, momentum=0.9)
    take_steps(optimizer, range(1))
    optimizer.state[params[1]].update(state)
    return optimizer


def sgd_with_group(**values):
    optimizer = torch.optim.SGD(new_params(SIZES), lr=0.1)
    optimizer.param_groups[0].update(values)
    return optimizer


class Derived(torch.optim.AdamW):
    def step(self, closure=None):
        raise NotImplementedError


def with_step_replaced():
    optimizer = torch.optim.AdamW(new_params(SIZES))
    optimizer.step = lambda: None
    return optimizer


def with_state(**state):
    params = new_params(SIZES)
    optimizer = torch.optim.AdamW(params)
    take_steps(optimizer, range(1))
    optimizer.state[params[1]].update(state)
    return optimizer


def with_codes():
    """As torch loads a state dict with moments of 8 bits: it casts them."""
    params = [Parameter(torch.ones(64, 64))]
    ours, optimizer = warpstep.AdamW(params, state_dtype="8bit"), torch.optim.AdamW(params)
    take_steps(ours, range(1))
    optimizer.load_state_dict(ours.state_dict())
    return optimizer


def without(key):
    optimizer = with_state()
    del list(optimizer.state.values())[1][key]
    return optimizer


def with_group(**values):
    optimizer = torch.optim.AdamW(new_params(SIZES))
    optimizer.param_groups[0].update(values)
    return optimizer


CANNOT = {
    "RMSprop": (lambda: torch.optim.RMSprop(new_params(SIZES)), "torch.optim.rmsprop.RMSprop"),
    "NAdam": (lambda: torch.optim.NAdam(new_params(SIZES)), "NAdam"),
    "derived": (lambda: Derived(new_params(SIZES)), "Derived"),
    "ours": (lambda: warpstep.AdamW(new_params(SIZES)), "warpstep's already"),
    "no optimizer": (lambda: 3, "builtins.int"),
    "step replaced": (with_step_replaced, "step was replaced"),
    "sparse": (
        lambda: torch.optim.AdamW([Parameter(torch.ones(2, 2).to_sparse())]),
        "parameter 0 of group 0.*layout torch.sparse",
    ),
    "shape": (lambda: with_state(exp_avg=torch.ones(2)), "parameter 1 of group 0.*'exp_avg'"),
    "no tensor": (lambda: with_state(exp_avg_sq="big"), "'exp_avg_sq' is 'big'"),
    "step": (lambda: with_state(step="third"), "'step' is 'third'"),
    "no step": (lambda: without("step"), r"parameter 1 of group 0.*\['step'\]"),
    "no moment": (lambda: without("exp_avg_sq"), r"without \['exp_avg_sq'\]"),
    "codes": (with_codes, "parameter 0 of group 0: .*'exp_avg_codes' is float32"),
    "kind": (
        lambda: with_state(exp_avg=torch.ones(4, 5, dtype=torch.complex64)),
        "'exp_avg' is complex64",
    ),
    "device": (
        lambda: with_state(exp_avg=torch.ones(4, 5, device="meta")),
        "parameter 1 of group 0.*'exp_avg' .*on meta",
    ),
    "layout": (
        lambda: with_state(exp_avg=torch.ones(4, 5).to_sparse()),
        "parameter 1 of group 0.*'exp_avg' .*expected a dense tensor",
    ),
    "ours, SGD": (lambda: warpstep.SGD(new_params(SIZES)), "warpstep's already"),
    "SGD's shape": (
        lambda: sgd_with_state(momentum_buffer=torch.ones(2)),
        "parameter 1 of group 0.*'momentum_buffer'",
    ),
    "SGD's step": (lambda: sgd_with_state(step="third"), "'step' is 'third'"),
    "SGD's hyper": (lambda: sgd_with_group(momentum="high"), "momentum value"),
    "hyper": (lambda: with_group(lr="fast"), "learning rate"),
}


@pytest.mark.parametrize("name", CANNOT)
def test_what_cannot_be_replaced(name):
    """A TypeError that says what is wrong; the optimizer is as it was."""
    make, message = CANNOT[name]
    optimizer = make()
    kind, before, attributes = type(optimizer), {}, {}
    if isinstance(optimizer, torch.optim.Optimizer):
        before = {id(p): dict(s) for p, s in optimizer.state.items()}
        attributes = dict(vars(optimizer))
    with pytest.raises(TypeError, match=message):
        warpstep.replace(optimizer)
    assert type(optimizer) is kind
    if attributes:
        assert vars(optimizer).keys() == attributes.keys()
        assert all(vars(optimizer)[key] is value for key, value in attributes.items())
    for param, state in optimizer.state.items() if before else ():
        assert state.keys() == before[id(param)].keys()
        assert all(state[key] is value for key, value in before[id(param)].items())
