"""Checkpoints and copies of warpstep.SGD: to and from torch's, in mid-run, in whole or not at all.

Runs that are interrupted are compared with torch's uninterrupted ones.
"""

import copy
import io
import pickle

import pytest
import torch

import warpstep
from support.bits import assert_same
from support.parameters import new_params, params_of, take_steps
from support.sgd_pairs import LR, assert_near, assert_states_near, each_variant


def saved_and_loaded(state_dict):
    buffer = io.BytesIO()
    torch.save(state_dict, buffer)
    buffer.seek(0)
    return torch.load(buffer, weights_only=True)


@each_variant
@pytest.mark.parametrize("direction", ["torch-to-ours", "ours-to-torch", "ours-to-ours"])
def test_state_dicts_both_ways(options, direction):
    """A run that is interrupted goes on as torch's that is not."""
    classes = {"torch": torch.optim.SGD, "ours": warpstep.SGD}
    first, second = (classes[name] for name in direction.split("-to-"))
    uninterrupted = torch.optim.SGD(new_params(), lr=LR, **options)
    take_steps(uninterrupted, range(3))
    take_steps(uninterrupted, range(3, 6))
    begun = first(new_params(), lr=LR, **options)
    take_steps(begun, range(3))
    resumed = second([p.detach().clone().requires_grad_() for p in params_of(begun)])
    resumed.load_state_dict(saved_and_loaded(begun.state_dict()))
    for key in options:
        assert resumed.param_groups[0][key] == options[key]
    take_steps(resumed, range(3, 6))
    assert_near(params_of(resumed), params_of(uninterrupted), 6)
    assert_states_near(resumed, uninterrupted, 6)


@pytest.mark.parametrize("dampening", [0.0, 0.4])
@pytest.mark.parametrize("second", [warpstep.SGD, torch.optim.SGD])
def test_a_buffer_that_is_none(second, dampening):
    """torch's step takes one, and makes it, and so a state dict may hold it."""
    state_dict = torch.optim.SGD(
        new_params(), lr=LR, momentum=0.9, dampening=dampening
    ).state_dict()
    state_dict["state"] = {0: {"momentum_buffer": None}, 2: {"momentum_buffer": None}}
    expected = torch.optim.SGD(new_params(), lr=LR, momentum=0.9, dampening=dampening)
    optimizer = second(new_params())
    optimizer.load_state_dict(state_dict)
    for one in (optimizer, expected):
        take_steps(one, range(3))
    assert_near(params_of(optimizer), params_of(expected), 3)
    assert_states_near(optimizer, expected, 3)


def test_a_buffer_keeps_its_dtype_unless_asked():
    theirs = torch.optim.SGD(new_params(), lr=LR, momentum=0.9)
    take_steps(theirs, range(1))
    saved = theirs.state_dict()
    for dtype in (None, torch.bfloat16):
        mine = warpstep.SGD(new_params(), lr=LR, momentum=0.9, state_dtype=dtype)
        mine.load_state_dict(saved)
        take_steps(mine, range(1, 2))
        kinds = {s["momentum_buffer"].dtype for s in mine.state.values()}
        assert kinds == {dtype or torch.float32}


def test_state_dicts_that_do_not_fit_are_refused_in_whole():
    optimizer = warpstep.SGD(new_params(), lr=LR, momentum=0.9)
    take_steps(optimizer, range(2))
    before = copy.deepcopy(optimizer.state_dict())
    adam = torch.optim.AdamW(new_params())
    take_steps(adam, range(1))
    with pytest.raises(ValueError, match=r"no 'momentum'.*SGD's"):
        optimizer.load_state_dict(adam.state_dict())
    other = copy.deepcopy(before)
    other["state"][1]["momentum_buffer"] = torch.zeros(3)
    with pytest.raises(ValueError, match=r"parameter 1 of group 0.*momentum_buffer"):
        optimizer.load_state_dict(other)
    other["state"][1]["momentum_buffer"] = "none"
    with pytest.raises(ValueError, match=r"parameter 1 of group 0.*momentum_buffer"):
        optimizer.load_state_dict(other)
    assert_same(optimizer.state_dict(), before)
    with pytest.raises(ValueError, match=r"no 'betas'"):
        warpstep.AdamW(new_params()).load_state_dict(before)


@each_variant
@pytest.mark.parametrize("way", [copy.deepcopy, lambda o: pickle.loads(pickle.dumps(o))])
def test_copies(options, way):
    optimizer = warpstep.SGD(new_params(), lr=LR, **options)
    take_steps(optimizer, range(2))
    twin = way(optimizer)
    assert type(twin) is warpstep.SGD
    for one in (optimizer, twin):
        take_steps(one, range(2, 4))
    assert_same(params_of(twin), params_of(optimizer))
    assert_same(twin.state_dict(), optimizer.state_dict())
