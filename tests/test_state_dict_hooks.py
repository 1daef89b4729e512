"""Checkpoints that are old, strange, hooked or do not fit."""

import copy

import pytest
import torch

import warpstep
from support.bits import assert_same
from support.parameters import SHAPES, new_params, params_of, take_steps
from support.tolerance import bound

LR = 0.01


def stepped(cls=warpstep.AdamW, steps=2, **options):
    optimizer = cls(new_params(), lr=LR, **options)
    take_steps(optimizer, range(steps))
    return optimizer


# ---- hooks


def test_state_dict_hooks_run_once():
    optimizer = stepped()
    calls = []

    def pre(opt):
        calls.append(("pre", opt is optimizer))

    def post(opt, state_dict):
        calls.append(("post", opt is optimizer))
        return {**state_dict, "note": 1}

    optimizer.register_state_dict_pre_hook(pre)
    optimizer.register_state_dict_post_hook(post)
    assert optimizer.state_dict()["note"] == 1
    assert calls == [("pre", True), ("post", True)]


def test_load_hooks_run_once_and_may_replace_the_dict():
    source = stepped()
    replaced = copy.deepcopy(source.state_dict())
    replaced["param_groups"][0]["lr"] = 0.5
    optimizer = warpstep.AdamW(new_params(), lr=LR)
    calls = []

    def pre(opt, state_dict):
        calls.append("pre")
        assert not opt.state
        state_dict["param_groups"] = "replaced"  # a shallow copy: the caller's dict keeps its own
        return replaced

    def post(opt):
        calls.append("post")
        assert opt.param_groups[0]["lr"] == 0.5
        assert len(opt.state) == len(SHAPES)

    optimizer.register_load_state_dict_pre_hook(pre)
    optimizer.register_load_state_dict_post_hook(post)
    given = source.state_dict()
    optimizer.load_state_dict(given)
    assert calls == ["pre", "post"]
    assert isinstance(given["param_groups"], list)
    assert_same(optimizer.state_dict(), replaced)


def test_load_hook_that_edits_in_place():
    source = stepped()
    optimizer = warpstep.AdamW(new_params(), lr=LR)

    def pre(opt, state_dict):
        state_dict["state"] = {}

    optimizer.register_load_state_dict_pre_hook(pre)
    optimizer.load_state_dict(source.state_dict())
    assert not optimizer.state
    assert len(source.state) == len(SHAPES)


def test_post_hook_may_change_the_state_before_the_next_step():
    source = stepped()
    ours, theirs = stepped(), stepped(torch.optim.AdamW)

    def post(opt):
        for state in opt.state.values():
            state["exp_avg"] = torch.zeros_like(state["exp_avg"])

    for optimizer in (ours, theirs):
        optimizer.register_load_state_dict_post_hook(post)
        optimizer.load_state_dict(copy.deepcopy(source.state_dict()))
        take_steps(optimizer, range(2, 5))
    for p, q in zip(params_of(ours), params_of(theirs), strict=True):
        torch.testing.assert_close(p, q, rtol=0, atol=bound(5, LR, q))


# ---- what is more than a checkpoint needs, and less


def test_extra_state_passes_through():
    source = stepped()
    state_dict = copy.deepcopy(source.state_dict())
    state_dict["state"][0] |= {
        "ema": torch.arange(15.0).reshape(5, 3),
        "count": 7,
        "label": "x",
        "nested": {"a": torch.ones(2), "b": [1, 2]},
    }
    state_dict["state"]["global"] = {"seed": 3}
    state_dict["param_groups"][0]["note"] = "kept"
    optimizer = warpstep.AdamW(new_params(), lr=LR)
    optimizer.load_state_dict(state_dict)
    take_steps(optimizer, range(2, 4))
    state = optimizer.state[params_of(optimizer)[0]]
    assert_same(state["ema"], torch.arange(15.0).reshape(5, 3))
    assert (state["count"], state["label"]) == (7, "x")
    assert_same(state["nested"], {"a": torch.ones(2), "b": [1, 2]})
    assert optimizer.state["global"] == {"seed": 3}
    assert optimizer.param_groups[0]["note"] == "kept"
    again = optimizer.state_dict()
    assert set(again["state"]) == {0, 1, 2, "global"}
    assert set(again["state"][0]) == set(state_dict["state"][0])


@pytest.mark.parametrize("step", [2, 2.0, torch.tensor(2), torch.tensor([2.0])], ids=repr)
def test_old_checkpoint_with_another_kind_of_step(step):
    def resumed(cls):
        source = stepped(torch.optim.AdamW)
        state_dict = copy.deepcopy(source.state_dict())
        if cls is warpstep.AdamW:
            for state in state_dict["state"].values():
                state["step"] = copy.deepcopy(step)
        optimizer = cls(params_of(source), lr=LR)
        optimizer.load_state_dict(state_dict)
        take_steps(optimizer, range(2, 5))
        return optimizer

    ours, theirs = resumed(warpstep.AdamW), resumed(torch.optim.AdamW)
    for p, q in zip(params_of(ours), params_of(theirs), strict=True):
        torch.testing.assert_close(p, q, rtol=0, atol=bound(5, LR, q))
        assert float(ours.state[p]["step"]) == 5


@pytest.mark.parametrize("cls", [warpstep.AdamW, warpstep.Adam])
def test_old_checkpoint_without_newer_options(cls):
    older = ["amsgrad", "maximize", "foreach", "capturable", "differentiable", "fused"]
    state_dict = copy.deepcopy(stepped(cls).state_dict())
    for key in [*older, "decoupled_weight_decay"]:
        state_dict["param_groups"][0].pop(key, None)
    optimizer = cls(new_params(), lr=LR)
    optimizer.load_state_dict(state_dict)
    group = optimizer.param_groups[0]
    assert {key: group[key] for key in older} == {
        key: {"foreach": None, "fused": None}.get(key, False) for key in older
    }
    assert group["decoupled_weight_decay"] == (cls is warpstep.AdamW)
    take_steps(optimizer, range(2, 3))


def test_checkpoint_of_part_of_the_parameters():
    # A parameter that had had no gradient when the checkpoint was taken.
    def resumed(cls):
        optimizer = stepped(cls)
        state_dict = copy.deepcopy(optimizer.state_dict())
        del state_dict["state"][1]
        optimizer.load_state_dict(state_dict)
        take_steps(optimizer, range(2, 5))
        return optimizer

    ours, theirs = resumed(warpstep.AdamW), resumed(torch.optim.AdamW)
    for p, q in zip(params_of(ours), params_of(theirs), strict=True):
        torch.testing.assert_close(p, q, rtol=0, atol=bound(5, LR, q))
        assert ours.state[p]["step"].item() == theirs.state[q]["step"].item()


def test_param_names():
    names = ["a", "b", "c"]
    named = warpstep.AdamW(zip(names, new_params(), strict=True), lr=LR)
    unnamed = warpstep.AdamW(new_params(), lr=LR)
    take_steps(named, range(1))
    assert named.state_dict()["param_groups"][0]["param_names"] == names
    saved = copy.deepcopy(named.state_dict())

    named.load_state_dict(stepped().state_dict())  # has no names: the optimizer's stay
    assert named.param_groups[0]["param_names"] == names
    unnamed.load_state_dict(saved)  # the loaded ones are taken
    assert unnamed.param_groups[0]["param_names"] == names
    saved["param_groups"][0]["param_names"] = ["x", "y", "z"]
    named.load_state_dict(saved)
    assert named.param_groups[0]["param_names"] == ["x", "y", "z"]
    take_steps(named, range(1, 2))


# ---- what does not fit


def more_groups(state_dict):
    state_dict["param_groups"].append(copy.deepcopy(state_dict["param_groups"][0]))


def fewer_groups(state_dict):
    state_dict["param_groups"].clear()


def more_params(state_dict):
    state_dict["param_groups"][0]["params"].append(3)


def fewer_params(state_dict):
    state_dict["param_groups"][0]["params"].pop()


def other_shape(key, index=1, shape=(2,)):
    def change(state_dict):
        state_dict["state"][index][key] = torch.zeros(shape)

    return change


MISFITS = {
    "more-groups": (more_groups, "number of parameter groups"),
    "fewer-groups": (fewer_groups, "number of parameter groups"),
    "more-params": (more_params, "size of optimizer's group"),
    "fewer-params": (fewer_params, "size of optimizer's group"),
    "exp_avg-shape": (other_shape("exp_avg"), r"parameter 1 of group 0.*exp_avg"),
    "exp_avg_sq-shape": (other_shape("exp_avg_sq", 2), r"parameter 2 of group 0.*exp_avg_sq"),
    "max-shape": (other_shape("max_exp_avg_sq", 0), r"parameter 0 of group 0.*max_exp_avg_sq"),
    "transposed": (other_shape("exp_avg", 0, (3, 5)), r"parameter 0 of group 0.*\(3, 5\)"),
    "broadcastable": (other_shape("exp_avg", 0, (1, 3)), r"parameter 0 of group 0.*\(1, 3\)"),
    "step-shape": (other_shape("step", 1, (3,)), r"parameter 1 of group 0.*step"),
}


@pytest.mark.parametrize("before", [0, 2], ids=["fresh", "after-two-steps"])
@pytest.mark.parametrize("case", MISFITS)
def test_checkpoint_that_does_not_fit(case, before):
    change, message = MISFITS[case]
    state_dict = copy.deepcopy(stepped(amsgrad=True).state_dict())
    change(state_dict)
    optimizer = stepped(steps=before)
    control = copy.deepcopy(optimizer)
    loaded = []
    optimizer.register_load_state_dict_post_hook(loaded.append)
    tensors = [id(t) for p in params_of(optimizer) for t in optimizer.state.get(p, {}).values()]
    bits = copy.deepcopy(optimizer.state_dict())
    with pytest.raises(ValueError, match=message):
        optimizer.load_state_dict(state_dict)
    assert not loaded
    assert_same(optimizer.state_dict(), bits)
    now = [id(t) for p in params_of(optimizer) for t in optimizer.state.get(p, {}).values()]
    assert now == tensors
    take_steps(optimizer, range(5, 7))
    take_steps(control, range(5, 7))
    for p, q in zip(params_of(optimizer), params_of(control), strict=True):
        assert torch.equal(p, q)


def test_misfit_names_the_named_parameter():
    named = warpstep.AdamW(zip("abc", new_params(), strict=True), lr=LR)
    state_dict = stepped().state_dict()
    state_dict["state"][2]["exp_avg"] = torch.zeros(3)
    with pytest.raises(ValueError, match=r"parameter 2 of group 0 \('c'\)"):
        named.load_state_dict(state_dict)


def test_the_given_dict_is_never_changed():
    source = stepped()
    given = copy.deepcopy(source.state_dict())
    bits = copy.deepcopy(given)
    optimizer = warpstep.AdamW(new_params(), lr=LR, state_dtype=torch.float64)
    optimizer.load_state_dict(given)
    take_steps(optimizer, range(2, 4))
    optimizer.param_groups[0]["lr"] = 9.0
    assert_same(given, bits)
    assert all(isinstance(i, int) for i in given["param_groups"][0]["params"])
