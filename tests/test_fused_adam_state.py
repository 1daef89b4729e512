"""warpstep.compat.FusedAdam's states: read, written, saved, loaded, copied."""

import copy
import pickle

import pytest
import torch
from torch.nn import Parameter

import warpstep
from support.fused_adam import (
    BETAS,
    BF16,
    DECAY,
    EPS,
    F16,
    F32,
    KINDS,
    LR,
    fused_adam,
    params_of,
    take_steps,
)

MOMENTS_BF16 = {"exp_avg_dtype": BF16, "exp_avg_sq_dtype": BF16}
SHAPES = ((5, 7), (64,), (0,), ())


@pytest.fixture(params=KINDS.values(), ids=KINDS)
def kind(request):
    return request.param


def stepped(dtype, steps=2, **options):
    optimizer = fused_adam(params_of(dtype, SHAPES), use_decoupled_grad=True, **options)
    take_steps(optimizer, steps)
    return optimizer, optimizer.param_groups[0]["params"]


# ---- One by one


def test_what_is_written_is_read(kind):
    dtype, options = kind
    optimizer = fused_adam(params_of(dtype, SHAPES), use_decoupled_grad=True, **options)
    for param in optimizer.param_groups[0]["params"]:
        for name in ("exp_avg", "exp_avg_sq", *(["master_param"] if options else [])):
            value = torch.rand(param.shape)  # before there is a state
            optimizer.set_scaled_state(param, name, value)
            if name == "master_param":
                found = optimizer.master_parameters()[param]
            else:
                found = optimizer.get_unscaled_state(param, name)
            assert torch.equal(found, value)
    take_steps(optimizer, 1)


def test_moments_in_bfloat16_are_read_in_float32():
    optimizer, params = stepped(BF16, **MOMENTS_BF16)
    stored = optimizer.state[params[0]]["exp_avg"]
    assert stored.dtype == BF16
    assert torch.equal(optimizer.get_unscaled_state(params[0], "exp_avg"), stored.float())
    assert optimizer.get_unscaled_state(params[0], "exp_avg", skip_unscale=True) is stored
    value = torch.randn(5, 7)
    optimizer.set_scaled_state(params[0], "exp_avg", value)
    assert optimizer.state[params[0]]["exp_avg"] is stored
    assert torch.equal(stored, value.to(BF16))
    optimizer.exp_avg_dtype = F32  # as Megatron sets attributes
    optimizer.set_scaled_state(params[0], "exp_avg", value)
    assert torch.equal(optimizer.state[params[0]]["exp_avg"], value)


def test_remainders_are_read_and_written_as_they_are():
    options = KINDS["bfloat16-remainder"][1]
    optimizer, params = stepped(BF16, **options)
    remainder = optimizer.get_unscaled_state(params[0], "master_param")
    assert remainder.dtype == torch.int16
    master = optimizer.master_parameters()[params[0]]
    other, others = stepped(BF16, steps=1, **options)
    with torch.no_grad():
        others[0].copy_(params[0])
    other.set_scaled_state(others[0], "master_param", remainder)
    assert torch.equal(other.master_parameters()[others[0]], master)


@pytest.mark.parametrize(
    ("name", "value", "message"),
    [
        ("momentum", torch.zeros(5, 7), "'momentum' is no state here: there are exp_avg"),
        ("exp_avg", torch.zeros(7, 5), r"exp_avg is float32 of shape \(7, 5\)"),
        ("exp_avg", torch.zeros(5, 7, dtype=torch.int16), "expected float32$"),
        ("master_param", torch.zeros(5, 7, dtype=torch.int32), "or the int16 of store_param"),
    ],
)
def test_what_does_not_fit_is_refused(name, value, message):
    optimizer, params = stepped(BF16, master_weights=True)
    before = copy.deepcopy(dict(optimizer.state[params[0]]))
    with pytest.raises(ValueError, match=message):
        optimizer.set_scaled_state(params[0], name, value)
    assert before.keys() == optimizer.state[params[0]].keys()
    assert all(torch.equal(v, optimizer.state[params[0]][k]) for k, v in before.items())


def test_what_is_refused_begins_no_state():
    optimizer = fused_adam(params_of(BF16, SHAPES), **KINDS["bfloat16-remainder"][1])
    param = optimizer.param_groups[0]["params"][0]
    with pytest.raises(ValueError, match="exp_avg is float32"):
        optimizer.set_scaled_state(param, "exp_avg", torch.zeros(3))
    with pytest.raises(KeyError, match="exp_avg"):
        optimizer.get_unscaled_state(param, "exp_avg")
    assert not optimizer.state


def test_states_are_made_as_the_optimizer_was_constructed():
    optimizer = fused_adam(params_of(BF16, SHAPES), **KINDS["bfloat16-remainder"][1])
    param = optimizer.param_groups[0]["params"][0]
    optimizer.initialize_state(param, True)
    optimizer.initialize_state(param)
    with pytest.raises(ValueError, match="was constructed with True"):
        optimizer.initialize_state(param, False)


# ---- State dicts


def test_a_state_dict_is_transformer_engines(kind):
    dtype, options = kind
    optimizer, params = stepped(dtype, **options, **MOMENTS_BF16)
    saved = optimizer.state_dict()
    names = ["exp_avg", "exp_avg_sq", *(["master_param"] if options else [])]
    for index, param in enumerate(params):
        state = saved["state"][index]
        assert sorted(state) == names
        assert state["exp_avg"].dtype == state["exp_avg_sq"].dtype == F32
        assert torch.equal(state["exp_avg"], optimizer.state[param]["exp_avg"].float())
    assert set(saved["param_groups"][0]) == {
        *("lr", "bias_correction", "betas", "eps", "weight_decay", "step", "params"),
    }
    assert saved["param_groups"][0]["step"] == 2


@pytest.mark.parametrize("moments", [{}, MOMENTS_BF16], ids=["float32", "bfloat16"])
def test_a_resumed_run_goes_on_bit_for_bit(kind, moments):
    dtype, options = kind
    optimizer, params = stepped(dtype, **options, **moments)
    saved = copy.deepcopy(optimizer.state_dict())
    copies = [Parameter(p.detach().clone()) for p in params]
    other = fused_adam(copies, use_decoupled_grad=True, **options, **moments)
    other.load_state_dict(saved)
    for one in (optimizer, other):
        take_steps(one, 2, first=2)
    assert all(map(torch.equal, params, other.param_groups[0]["params"]))
    assert other.param_groups[0]["step"] == 4


def test_kinds_of_masters_are_converted():
    """A float32 master into remainders, and the other way."""
    masters, remainders = KINDS["bfloat16-master"][1], KINDS["bfloat16-remainder"][1]
    for options, others in ((masters, remainders), (remainders, masters)):
        optimizer, params = stepped(BF16, **options)
        saved = copy.deepcopy(optimizer.state_dict())
        copies = [Parameter(p.detach().clone()) for p in params]
        other = fused_adam(copies, use_decoupled_grad=True, **others)
        other.load_state_dict(saved)
        for one in (optimizer, other):
            take_steps(one, 2, first=2)
        expected, found = optimizer.master_parameters(), other.master_parameters()
        assert all(map(torch.equal, expected.values(), found.values()))


def test_torchs_states_are_loaded_and_made():
    params = params_of(F32, SHAPES)
    options = {"lr": LR, "weight_decay": DECAY, "betas": BETAS, "eps": EPS}
    theirs = torch.optim.AdamW(params, **options)
    for step in range(3):
        for param in params:
            param.grad = torch.full_like(param, step + 1.0)
        theirs.step()
    ours = fused_adam([Parameter(p.detach().clone()) for p in params])
    ours.load_state_dict(theirs.state_dict())
    assert ours.param_groups[0]["step"] == 3
    assert ours.param_groups[0].keys() == fused_adam(params).param_groups[0].keys() | {"step"}
    back = torch.optim.AdamW(ours.param_groups[0]["params"], **options)
    back.load_state_dict(ours.state_dict(portable=True))
    for param, other in zip(params, ours.param_groups[0]["params"], strict=True):
        assert back.state[other]["step"] == 3
        for name in ("exp_avg", "exp_avg_sq"):
            assert torch.equal(back.state[other][name], theirs.state[param][name])
            assert torch.equal(ours.state[other][name], theirs.state[param][name])
        other.grad = param.grad
    theirs.step()
    ours.step()
    for param, other in zip(params, ours.param_groups[0]["params"], strict=True):
        torch.testing.assert_close(param, other, rtol=2.0**-22, atol=2.0**-20 * LR)


def test_warpsteps_residuals_are_loaded():
    params = params_of(BF16, SHAPES)
    theirs = warpstep.AdamW(params, lr=LR, weight_decay=DECAY, betas=BETAS, master="residual")
    for param in params:
        param.grad = torch.ones_like(param)
    theirs.step()
    copies = [Parameter(p.detach().clone()) for p in params]
    ours = fused_adam(copies, **KINDS["bfloat16-remainder"][1])
    ours.load_state_dict(theirs.state_dict())
    for param, other in zip(params, copies, strict=True):
        param.grad = other.grad = -torch.ones_like(param)
    theirs.step()
    ours.step()
    masters = (one.master_parameters().values() for one in (theirs, ours))
    assert all(map(torch.equal, *masters))


@pytest.mark.parametrize(
    ("key", "value", "message"),
    [
        (
            "exp_avg",
            torch.zeros(63),
            r"group 0: exp_avg is float32 of shape \(63,\)",
        ),
        ("exp_avg", 1.0, "exp_avg is 1.0, expected a tensor"),
        ("max_exp_avg_sq", torch.zeros(64), "its state has 'max_exp_avg_sq'"),
        ("step", torch.tensor(7.0), "it has taken 7 steps, its group 2"),
        ("master_param", torch.zeros(64), "construct with master_weights=True"),
    ],
)
def test_a_state_dict_is_loaded_in_whole_or_not_at_all(key, value, message):
    optimizer, params = stepped(BF16)
    saved = copy.deepcopy(optimizer.state_dict())
    saved["state"][0]["exp_avg"] += 1
    saved["state"][1][key] = value
    before = copy.deepcopy(optimizer.state_dict())
    with pytest.raises(ValueError, match=message):
        optimizer.load_state_dict(saved)
    after = optimizer.state_dict()
    assert after["param_groups"] == before["param_groups"]
    for index in range(len(params)):
        for name, tensor in before["state"][index].items():
            assert torch.equal(after["state"][index][name], tensor)


def test_a_derived_class_that_cannot_take_the_state_leaves_it():
    class Strict(warpstep.compat.FusedAdam):
        def __setstate__(self, state):
            super().__setstate__(state)
            raise KeyboardInterrupt

    optimizer = Strict([torch.nn.Parameter(torch.zeros(4))], lr=5.0)
    state, groups = optimizer.state, optimizer.param_groups
    saved = warpstep.compat.FusedAdam([torch.nn.Parameter(torch.zeros(4))], lr=0.1).state_dict()
    with pytest.raises(KeyboardInterrupt):
        optimizer.load_state_dict(saved)
    assert optimizer.state is state
    assert optimizer.param_groups is groups


@pytest.mark.parametrize(
    "duplicate", [copy.deepcopy, lambda o: pickle.loads(pickle.dumps(o))], ids=["copy", "pickle"]
)
def test_an_optimizer_is_copied(kind, duplicate):
    dtype, options = kind
    optimizer, params = stepped(dtype, **options)
    for param in params:
        param.decoupled_grad = None
    other = duplicate(optimizer)
    for one in (optimizer, other):
        take_steps(one, 2, first=2)
    assert all(map(torch.equal, params, other.param_groups[0]["params"]))
    assert other.use_decoupled_grad


@pytest.mark.parametrize(
    "duplicate", [copy.deepcopy, lambda o: pickle.loads(pickle.dumps(o))], ids=["copy", "pickle"]
)
def test_copies_unscale_in_the_steps_pass_as_well(duplicate):
    optimizer = duplicate(fused_adam([Parameter(torch.ones(8))], capturable=True))
    (param,) = optimizer.param_groups[0]["params"]
    scaler = torch.amp.GradScaler("cpu", init_scale=1024.0)
    scaler.scale(torch.zeros(()))
    param.grad = torch.full((8,), 1024.0)
    scaler.step(optimizer)
    assert param.grad.eq(1024).all()
    assert optimizer.state[param]["exp_avg"].eq(torch.tensor(0.1)).all()


def test_a_float64_master_of_a_remainder_is_split_as_a_float32_one():
    options = KINDS["bfloat16-remainder"][1]
    found = []
    for wide in (F32, torch.float64):
        optimizer, params = stepped(BF16, **options)
        for param, master in optimizer.master_parameters().items():
            optimizer.state[param]["master_param"] = master.to(wide) + 2.0**-12
        take_steps(optimizer, 1, first=2)
        assert all(optimizer.state[p]["master_param"].dtype == torch.int16 for p in params)
        found.append(optimizer.master_parameters().values())
    assert all(map(torch.equal, *found))


def test_a_misfit_in_the_state_is_told():
    optimizer, params = stepped(F16, master_weights=True)
    optimizer.state[params[1]]["master_param"] = torch.zeros(3)
    with pytest.raises(RuntimeError, match=r"'master_param' of a parameter that is float16"):
        optimizer.step()
    optimizer.master_weights = False
    with pytest.raises(RuntimeError, match="master_weights is False"):
        optimizer.step()
    optimizer, params = stepped(F32)
    del optimizer.state[params[1]]["exp_avg"]
    with pytest.raises(RuntimeError, match="'exp_avg'"):
        optimizer.step()
