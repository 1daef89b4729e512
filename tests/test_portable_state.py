"""``state_dict(portable=True)``: what torch's classes load, and step on; and without: what not."""

import copy
from contextlib import nullcontext

import pytest
import torch
from torch.nn import Parameter

import warpstep
from support.bits import assert_same
from support.low_precision import (
    BF16,
    RECIPES,
    SQUARES,
    flat,
    key_in,
    moments_of,
    new_params,
    numbers_of,
)
from support.parameters import params_of, random

KINDS = {
    "AdamW": (warpstep.AdamW, torch.optim.AdamW, {"lr": 1e-2, "amsgrad": True}),
    "SGD": (warpstep.SGD, torch.optim.SGD, {"lr": 1e-2, "momentum": 0.9}),
}


def stepped(kind, recipe, params=None, steps=2):
    ours, theirs, options = KINDS[kind]
    recipe = dict(recipe)
    if kind == "SGD" and isinstance(recipe.get("state_dtype"), tuple):
        recipe["state_dtype"] = recipe["state_dtype"][0]
    optimizer = ours(new_params() if params is None else params, **options, **recipe)
    take_steps(optimizer, range(steps))
    return optimizer, theirs, options


def take_steps(optimizer, steps):
    for step in steps:
        for i, p in enumerate(params_of(optimizer)):
            p.grad = random(p.shape, 100 * step + i).to(p.dtype)
        optimizer.step()


@pytest.mark.parametrize("recipe", RECIPES.values(), ids=RECIPES)
@pytest.mark.parametrize("kind", KINDS)
def test_torch_loads_it_and_steps(kind, recipe):
    """On float32 parameters, where torch keeps every number: then on those of the recipe."""
    optimizer, theirs, options = stepped(kind, recipe)
    before = copy.deepcopy(optimizer.state_dict())
    saved = optimizer.state_dict(portable=True)
    assert "master" not in saved["param_groups"][0]
    for index, param in enumerate(params_of(optimizer)):
        state, numbers = saved["state"][index], numbers_of(param, optimizer.state[param])
        assert state.keys() <= {"step", *moments_of(state)}
        for key in moments_of(optimizer.state[param]):
            assert state[key].dtype == torch.float32
            assert state[key].shape == param.shape
            assert torch.equal(flat(state[key]), numbers[key]), key
    masters = [Parameter(m) for m in optimizer.master_parameters().values()]
    for params in (masters, [Parameter(p.detach().clone()) for p in params_of(optimizer)]):
        other = theirs(params, **options)
        other.load_state_dict(copy.deepcopy(saved))
        take_steps(other, range(2, 4))
    assert_same(optimizer.state_dict()["state"], before["state"])
    assert not optimizer._optimizer_state_dict_post_hooks


def test_its_numbers_are_stepped_as_torch_would():
    """From 8 bits and a master to torch: the next step is that of a float32 run from there."""
    optimizer, theirs, options = stepped("AdamW", RECIPES["residual-8bit"])
    masters = [Parameter(m) for m in optimizer.master_parameters().values()]
    other = theirs(masters, **options)
    # A copy, as through a file: torch's load_state_dict goes on with the very step counters.
    other.load_state_dict(copy.deepcopy(optimizer.state_dict(portable=True)))
    for i, p in enumerate(masters):
        p.grad = random(p.shape, 200 + i).to(BF16).float()
    other.step()
    take_steps(optimizer, [2])
    for mine, p in zip(optimizer.master_parameters().values(), masters, strict=True):
        # An update is at most lr * a few; each rounds its last bits its own way.
        torch.testing.assert_close(mine, p, rtol=2**-22, atol=1e-2 * 2**-20)


def test_what_torch_had_is_left_alone():
    for dtype in (torch.float32, torch.float64, torch.complex64):
        params = [Parameter(torch.randn(5, dtype=dtype))]
        optimizer = warpstep.AdamW(params)
        params[0].grad = torch.randn(5, dtype=dtype)
        optimizer.step()
        portable, native = optimizer.state_dict(portable=True), optimizer.state_dict()
        assert portable["param_groups"] == native["param_groups"]
        for key, value in native["state"][0].items():
            assert portable["state"][0][key] is value


@pytest.mark.parametrize("dtype", [BF16, torch.float16], ids=str)
def test_moments_of_16_bits_are_saved_in_float32(dtype):
    """Where no dtype rounds a moment that is stepped on elsewhere, beside a master or without."""
    optimizer = warpstep.AdamW(new_params(dtype, [(5,)]))
    take_steps(optimizer, range(2))
    (own,) = optimizer.state.values()
    (saved,) = optimizer.state_dict(portable=True)["state"].values()
    for key in ("exp_avg", "exp_avg_sq"):
        assert own[key].dtype == dtype
        assert_same(saved[key], own[key].float())


def test_hooks_are_called_as_ever():
    optimizer, _, _ = stepped("AdamW", RECIPES["residual-8bit"])
    calls = []

    def pre(one):
        calls.append(("pre", one is optimizer))

    def post(one, state_dict):
        calls.append(("post", "exp_avg" in state_dict["state"][0]))
        return {**state_dict, "note": 1}

    optimizer.register_state_dict_pre_hook(pre)
    optimizer.register_state_dict_post_hook(post)
    assert optimizer.state_dict(portable=True)["note"] == 1
    assert calls == [("pre", True), ("post", True)]
    assert optimizer.state_dict()["state"][0]["exp_avg_codes"].dtype == torch.uint8
    assert calls[2:] == [("pre", True), ("post", False)]


def test_it_is_loaded_into_8_bits_again():
    """Decoded numbers are encoded as they were; where codes were rounded, they stay."""
    optimizer, _, _ = stepped("AdamW", RECIPES["8bit"])
    other = warpstep.AdamW(
        [Parameter(p.detach().clone()) for p in params_of(optimizer)],
        **KINDS["AdamW"][2],
        **RECIPES["8bit"],
    )
    other.load_state_dict(optimizer.state_dict(portable=True))
    for optimizer_ in (optimizer, other):
        take_steps(optimizer_, [2])
    for p, q in zip(params_of(optimizer), params_of(other), strict=True):
        assert torch.equal(p, q)
        assert optimizer.state[p].keys() == other.state[q].keys()
        for moment in moments_of(optimizer.state[p]):
            key = key_in(optimizer.state[p], moment)
            assert optimizer.state[p][key].dtype == other.state[q][key].dtype
            if moment in SQUARES:
                assert (other.state[q][key] == optimizer.state[p][key]).all()


# ---- What is not portable


def loaded_by_torch(kind, **chosen):
    """A class of torch's that has loaded 8-bit moments as they are, and an optimizer's own."""
    optimizer, theirs, options = stepped(kind, RECIPES["8bit"])
    params = [Parameter(p.detach().clone()) for p in params_of(optimizer)]
    other = theirs(params, **options)
    other.load_state_dict(copy.deepcopy(optimizer.state_dict()))
    other.param_groups[0].update(chosen)
    return optimizer, other


@pytest.mark.parametrize("chosen", [{}, {"fused": True}, {"foreach": True}], ids=str)
@pytest.mark.parametrize("enabled", [False, True], ids=["torch", "enabled"])
def test_torch_takes_no_codes_for_numbers(chosen, enabled):
    """Its first step raises, before it has written anything."""
    _, other = loaded_by_torch("AdamW", **chosen)
    before = [p.detach().clone() for p in params_of(other)]
    by_plans = warpstep.enabled(unfused=True) if enabled else nullcontext()
    with by_plans, pytest.raises(KeyError, match="exp_avg"):
        take_steps(other, [2])
    assert_same([p.detach() for p in params_of(other)], before)


def test_torchs_momentum_begins_anew_in_place_of_codes():
    """Its SGD takes a buffer that is not there for one that is yet to begin."""
    optimizer, other = loaded_by_torch("SGD")
    fresh = torch.optim.SGD([Parameter(p.detach().clone()) for p in params_of(other)], lr=1e-2)
    has_codes = ["momentum_buffer_codes" in optimizer.state[p] for p in params_of(optimizer)]
    assert any(has_codes)
    for one in (other, fresh):
        take_steps(one, [2])
    for p, q, is_anew in zip(params_of(other), params_of(fresh), has_codes, strict=True):
        assert not is_anew or torch.equal(p, q)


def test_what_torch_has_made_of_codes_is_not_loaded_back():
    """It casts them to the parameter's dtype."""
    optimizer, other = loaded_by_torch("AdamW")
    before = copy.deepcopy(optimizer.state_dict()["state"])
    with pytest.raises(ValueError, match=r"parameter 0 of group 0: .*'exp_avg_codes' is bfloat16"):
        optimizer.load_state_dict(other.state_dict())
    assert_same(optimizer.state_dict()["state"], before)
