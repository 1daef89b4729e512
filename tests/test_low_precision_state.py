"""Low-precision states in checkpoints: what is saved is loaded, bit for bit, and goes on so."""

import copy
import io
import pickle
from contextlib import nullcontext

import pytest
import torch
from torch import nn
from torch.utils.flop_counter import FlopCounterMode

import warpstep
from support.bits import raw_bits
from support.low_precision import BF16, RECIPES, new_params
from support.parameters import params_of, random

KINDS = {
    "AdamW": (warpstep.AdamW, {"lr": 1e-2, "amsgrad": True}),
    "SGD": (warpstep.SGD, {"lr": 1e-2, "momentum": 0.9}),
}
each_recipe = pytest.mark.parametrize("recipe", RECIPES.values(), ids=RECIPES)


def new(kind, recipe, params=None):
    cls, options = KINDS[kind]
    recipe = dict(recipe)
    if kind == "SGD" and isinstance(recipe.get("state_dtype"), tuple):
        recipe["state_dtype"] = recipe["state_dtype"][0]
    return cls(new_params() if params is None else params, seed=42, **options, **recipe)


def take_steps(optimizer, steps):
    for step in steps:
        for i, p in enumerate(params_of(optimizer)):
            p.grad = random(p.shape, 100 * step + i, p.device).to(p.dtype)
        optimizer.step()


def bits(tensor):
    return raw_bits(tensor.reshape(-1))


def assert_same_bits(one, other):
    for p, q in zip(params_of(one), params_of(other), strict=True):
        assert torch.equal(bits(p), bits(q))
        assert one.state[p].keys() == other.state[q].keys()
        for key, value in one.state[p].items():
            found = other.state[q][key]
            assert found.dtype == value.dtype, key
            assert found.shape == value.shape, key
            assert torch.equal(bits(value), bits(found)), key


def through_file(value):
    buffer = io.BytesIO()
    torch.save(value, buffer)
    buffer.seek(0)
    return torch.load(buffer, weights_only=True)


def clones(optimizer):
    return [nn.Parameter(p.detach().clone()) for p in params_of(optimizer)]


def loaded_state_dict(optimizer, kind, recipe):
    other = new(kind, recipe, clones(optimizer))
    other.load_state_dict(optimizer.state_dict())
    return other


def loaded_file(optimizer, kind, recipe):
    other = new(kind, recipe, clones(optimizer))
    other.load_state_dict(through_file(optimizer.state_dict()))
    return other


def pickled(optimizer, kind, recipe):
    return pickle.loads(pickle.dumps(optimizer))


def deep_copied(optimizer, kind, recipe):
    return copy.deepcopy(optimizer)


WAYS = [loaded_state_dict, loaded_file, pickled, deep_copied]


@each_recipe
@pytest.mark.parametrize("kind", KINDS)
def test_what_is_saved_is_loaded_and_goes_on(kind, recipe):
    optimizer = new(kind, recipe)
    take_steps(optimizer, range(2))
    others = [way(optimizer, kind, recipe) for way in WAYS]
    for other in others:
        assert_same_bits(other, optimizer)
    take_steps(optimizer, range(2, 4))
    for other in others:
        take_steps(other, range(2, 4))
        assert_same_bits(other, optimizer)


# ---- Model and optimizer


def model_of(seed):
    torch.manual_seed(seed)
    return nn.Sequential(nn.Linear(64, 96), nn.Linear(96, 3)).to(BF16)


@each_recipe
@pytest.mark.parametrize("order", ["model-first", "optimizer-first"])
@pytest.mark.parametrize("stepped", [False, True], ids=["fresh", "stepped"])
def test_model_and_optimizer_are_loaded_in_either_order(recipe, order, stepped):
    model = model_of(0)
    optimizer = new("AdamW", recipe, list(model.parameters()))
    take_steps(optimizer, range(2))
    saved = through_file({"model": model.state_dict(), "optimizer": optimizer.state_dict()})
    other_model = model_of(1)
    other = new("AdamW", recipe, list(other_model.parameters()))
    if stepped:
        take_steps(other, range(7, 8))
    if order == "model-first":
        other_model.load_state_dict(saved["model"])
        other.load_state_dict(saved["optimizer"])
    else:
        other.load_state_dict(saved["optimizer"])
        other_model.load_state_dict(saved["model"])
    for one in (optimizer, other):
        take_steps(one, range(2, 4))
    assert_same_bits(other, optimizer)


def written_then(way):
    """A parameter is written to after a step, and that is saved in some way."""
    optimizer = new("AdamW", RECIPES["residual"], new_params(shapes=[(100,)]))
    take_steps(optimizer, range(1))
    (param,) = params_of(optimizer)
    assert optimizer.state[param]["master_param"].any()
    with torch.no_grad():
        param.copy_(random((100,), 8))
    other = way(optimizer, "AdamW", RECIPES["residual"])
    (loaded,) = params_of(other)
    assert torch.equal(other.master_parameters()[loaded], param.detach().float())


@pytest.mark.parametrize("way", WAYS, ids=lambda way: way.__name__)
def test_a_stale_residual_is_not_saved(way):
    written_then(way)


def test_a_loaded_group_keeps_its_own_master():
    """torch's state dict has none: the group's, not the optimizer's default, stays."""
    groups = [{"params": new_params(shapes=[(100,)]), "master": "residual"}]
    groups += [{"params": new_params(torch.float32, [(100,)])}]
    optimizer = warpstep.AdamW(groups)
    theirs = torch.optim.AdamW([{"params": g["params"]} for g in groups])
    take_steps(theirs, range(1))
    optimizer.load_state_dict(theirs.state_dict())
    assert [g.get("master") for g in optimizer.param_groups] == ["residual", None]
    take_steps(optimizer, range(1, 2))
    assert optimizer.state[groups[0]["params"][0]]["master_param"].dtype == torch.int16


@pytest.mark.parametrize("is_stepped", [True, False], ids=["stepped", "without-gradient"])
@pytest.mark.parametrize("before", ["watched", "reference", "kernel"])
def test_what_is_written_after_a_step_of_any_kind_wins(before, is_stepped):
    """Also where the last step, by a plan of its own, had no gradient of the parameter."""
    backend = "reference" if before == "reference" else "auto"
    params = new_params(shapes=[(100,), (7,)])
    optimizer = warpstep.AdamW(params, lr=1e-2, master="residual", backend=backend)
    take_steps(optimizer, range(2))
    if not is_stepped:
        params[0].grad = None
    with FlopCounterMode(display=False) if before == "watched" else nullcontext():
        optimizer.step()
    with torch.no_grad():
        params[0].copy_(random((100,), 8))
    for p in params:
        p.grad = torch.zeros_like(p)
    optimizer.param_groups[0].update(lr=0.0)
    optimizer.step()
    assert torch.equal(optimizer.master_parameters()[params[0]], random((100,), 8).to(BF16).float())
    assert optimizer.state[params[1]]["master_param"].any()


def groups_reversed(optimizer):
    optimizer.param_groups.reverse()


def a_group_left(optimizer):
    del optimizer.state[optimizer.param_groups.pop(0)["params"][0]]


def a_parameter_left(optimizer):
    del optimizer.state[optimizer.param_groups[1]["params"].pop(0)]


def one_came_first(optimizer):
    new = random((100,), 9).to(BF16).requires_grad_()
    optimizer.param_groups[0]["params"].insert(0, new)


EDITS = (groups_reversed, a_group_left, a_parameter_left, one_came_first)


@pytest.mark.parametrize("before", ["watched", "reference", "kernel"])
@pytest.mark.parametrize("edit", EDITS, ids=lambda edit: edit.__name__)
def test_masters_stay_where_groups_are_edited(edit, before):
    """Only what was written to loses its residual, in whatever place it is by then."""
    params = new_params(shapes=[(100,), (7,), (5, 3)])
    for writes, param in enumerate(params):  # no two are written to as often as each other
        for _ in range(writes):
            param.detach().mul_(1.5)
    optimizer = warpstep.AdamW(
        [{"params": params[:1]}, {"params": params[1:]}],
        lr=1e-2,
        master="residual",
        backend="reference" if before == "reference" else "auto",
    )
    take_steps(optimizer, range(2))
    with FlopCounterMode(display=False) if before == "watched" else nullcontext():
        take_steps(optimizer, range(2, 3))
    masters = {p: optimizer.master_parameters()[p] for p in params}
    with torch.no_grad():
        params[2].copy_(random((5, 3), 8))
    masters[params[2]] = params[2].detach().float()
    edit(optimizer)
    found = optimizer.master_parameters()
    kept = [p for p in params if p in found]
    assert len(kept) >= 2
    assert all(torch.equal(found[p], masters[p]) for p in kept)
    optimizer.param_groups[0].update(lr=0.0)
    optimizer.param_groups[-1].update(lr=0.0)
    take_steps(optimizer, range(3, 4))
    found = optimizer.master_parameters()
    assert all(torch.equal(found[p], masters[p]) for p in kept)


def states_cleared(optimizer):
    optimizer.state.clear()


def one_state_removed(optimizer):
    del optimizer.state[params_of(optimizer)[0]]


def a_residual_removed(optimizer):
    del optimizer.state[params_of(optimizer)[0]]["master_param"]


REMOVALS = (states_cleared, one_state_removed, a_residual_removed)


@pytest.mark.parametrize("call", ["step", "state_dict", "master_parameters", "deepcopy"])
@pytest.mark.parametrize("remove", REMOVALS, ids=lambda remove: remove.__name__)
def test_a_state_is_removed_and_the_parameter_written_to(remove, call, backend):
    """As to begin it anew: what was written is its master, and nothing is missed."""
    params = new_params(shapes=[(100,), (7,)])
    optimizer = warpstep.AdamW(params, lr=1e-2, master="residual", backend=backend)
    take_steps(optimizer, range(2))
    remove(optimizer)
    with torch.no_grad():
        params[0].copy_(random((100,), 8))
    states = set(optimizer.state)
    if call == "deepcopy":
        copy.deepcopy(optimizer)
    elif call != "step":
        getattr(optimizer, call)()
    assert set(optimizer.state) == states
    optimizer.param_groups[0].update(lr=0.0)
    optimizer.step()
    written = params[0].detach().float()
    assert torch.equal(optimizer.master_parameters()[params[0]], written)
    counts = [optimizer.state[p]["step"].item() for p in params]
    begun_anew = {states_cleared: [1, 1], one_state_removed: [1, 3], a_residual_removed: [3, 3]}
    assert counts == begun_anew[remove]


@pytest.mark.parametrize("is_written", [False, True], ids=["unwritten", "written"])
def test_a_float32_master_that_is_put_into_a_state_counts(is_written, backend):
    """As one that is loaded does: it says more than the parameter, written to or not."""
    (param,) = params = new_params(shapes=[(100,)])
    optimizer = warpstep.AdamW(params, lr=1e-2, master="residual", backend=backend)
    take_steps(optimizer, range(2))
    master = random((100,), 8)
    optimizer.state[param]["master_param"] = master.clone()
    if is_written:
        with torch.no_grad():
            param.copy_(master)
    optimizer.param_groups[0].update(lr=0.0)
    optimizer.step()
    assert torch.equal(optimizer.master_parameters()[param], master)


@pytest.mark.filterwarnings("ignore:optimizer contains a parameter group with duplicate")
def test_a_parameter_that_is_met_twice_keeps_its_master(backend):
    param = new_params(shapes=[(100,)])[0]
    exact = nn.Parameter(param.detach().float())
    optimizer = warpstep.AdamW([param, param], master="residual", backend=backend)
    other = warpstep.AdamW([exact, exact], backend=backend)
    for step in range(4):
        param.grad = random((100,), step).to(BF16)
        exact.grad = param.grad.float()
        optimizer.step()
        other.step()
    assert torch.equal(optimizer.master_parameters()[param], exact)


def test_saving_among_averages_keeps_the_masters():
    """The averages in the parameters' place are not what somebody wrote to them."""
    param = new_params(shapes=[(100,)])[0]
    optimizer = warpstep.AdamW([param], master="residual", ema_decay=0.9)
    take_steps(optimizer, range(2))
    before = copy.deepcopy(optimizer.state[param])
    master = optimizer.master_parameters()[param]
    with optimizer.swap_ema():
        saved = copy.deepcopy(optimizer.state_dict()["state"][0])
        pickle.dumps(optimizer)
        for one in (optimizer.master_parameters, lambda: optimizer.set_master_parameters({})):
            with pytest.raises(RuntimeError, match=r"inside swap_ema\(\)"):
                one()
    for key, value in before.items():
        assert torch.equal(saved[key], value), key
    assert torch.equal(optimizer.master_parameters()[param], master)


def test_copies_cannot_be_exchanged():
    """A plan has their addresses."""
    param = nn.Parameter(random((100,), 1))
    optimizer = warpstep.AdamW([param], copies=[torch.zeros(100, dtype=BF16)])
    take_steps(optimizer, range(1))
    with pytest.raises(TypeError):  # says what Python says
        optimizer.copies[param] = torch.zeros(100, dtype=BF16)
    with pytest.raises(AttributeError):
        optimizer.copies = {}


def test_copies_are_copied_with_their_parameters():
    params = [nn.Parameter(random((100,), i)) for i in range(2)]
    copies = {params[1]: torch.zeros(100, dtype=BF16)}
    optimizer = warpstep.AdamW(params, copies=copies)
    take_steps(optimizer, range(1))
    for other in (copy.deepcopy(optimizer), pickle.loads(pickle.dumps(optimizer))):
        ((param, found),) = other.copies.items()
        assert param is params_of(other)[1]
        take_steps(other, range(1, 2))
        assert torch.equal(found, param.detach().to(BF16))
    assert torch.equal(copies[params[1]], params[1].detach().to(BF16))
