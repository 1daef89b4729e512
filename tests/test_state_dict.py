"""Checkpoints: state_dict and load_state_dict, to and from torch's optimizers, in mid-run.

Runs that are interrupted by a swap are compared with torch's uninterrupted one; the tolerance is
the one derived in support/tolerance.py.
"""

import copy
import io

import pytest
import torch

import warpstep
from support.bits import assert_same
from support.cases import PAIRS, on_each_device
from support.parameters import new_params, params_of, take_steps
from support.tolerance import bound

LR = 0.01
SHAPES = [(5, 3), (), (17,), (0, 2)]


def groups_of(params):
    return [{"params": params[:2], "lr": 2 * LR}, {"params": params[2:], "weight_decay": 0.3}]


def saved_and_loaded(state_dict):
    buffer = io.BytesIO()
    torch.save(state_dict, buffer)
    buffer.seek(0)
    return torch.load(buffer, weights_only=True)


@pytest.mark.parametrize("options", [{}, {"amsgrad": True}, {"lr": torch.tensor(LR)}], ids=str)
@pytest.mark.parametrize("name", PAIRS)
def test_structure_is_torchs(name, options):
    ours, theirs = (cls(groups_of(new_params(SHAPES)), **options) for cls in PAIRS[name])
    assert_same(ours.state_dict(), theirs.state_dict())
    take_steps(ours, range(2))
    take_steps(theirs, range(2))
    a, b = ours.state_dict(), theirs.state_dict()
    assert list(a) == list(b)
    assert a["param_groups"] == b["param_groups"]
    assert list(a["state"]) == list(b["state"])
    for index, expected in b["state"].items():
        state = a["state"][index]
        assert list(state) == list(expected)
        for key, value in expected.items():
            assert (state[key].dtype, state[key].shape) == (value.dtype, value.shape)
            assert state[key].device == value.device  # of the step too, on the CPU


IMPLEMENTATIONS = {
    "default": {},
    "fused": {"fused": True},
    "not-fused": {"fused": False},
    "foreach": {"foreach": True},
}


@on_each_device
@pytest.mark.parametrize("amsgrad", [False, True], ids=["plain", "amsgrad"])
@pytest.mark.parametrize("direction", ["warpstep-to-torch", "torch-to-warpstep", "there-and-back"])
@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
@pytest.mark.parametrize("name", PAIRS)
def test_swap_in_the_middle_of_a_run(name, implementation, direction, amsgrad, device):
    ours, theirs = PAIRS[name]
    options = {"lr": LR, "amsgrad": amsgrad}
    uninterrupted = theirs(groups_of(new_params(SHAPES, device)), foreach=False, **options)
    take_steps(uninterrupted, range(6))

    params = new_params(SHAPES, device)
    order = {"warpstep-to-torch": [ours, theirs], "torch-to-warpstep": [theirs, ours]}
    classes = order.get(direction, [ours, theirs, ours])
    length = 6 // len(classes)
    state_dict = None
    for leg, cls in enumerate(classes):
        extra = IMPLEMENTATIONS[implementation] if cls is theirs else {}
        optimizer = cls(groups_of(params), **options, **extra)
        if state_dict is not None:
            optimizer.load_state_dict(state_dict)
            loaded = optimizer.state_dict()["state"]
            for index, state in state_dict["state"].items():
                for key, value in state.items():
                    assert_same(loaded[index][key].cpu(), value.cpu())
        take_steps(optimizer, range(leg * length, (leg + 1) * length))
        state_dict = saved_and_loaded(optimizer.state_dict())

    for p, q in zip(params, params_of(uninterrupted), strict=True):
        torch.testing.assert_close(p, q, rtol=0, atol=bound(6, 2 * LR, q))
        assert optimizer.state[p]["step"].item() == 6


@pytest.mark.parametrize("name", PAIRS)
def test_swap_into_the_other_kind_of_decay(name):
    # An Adam checkpoint in AdamW and the reverse: what torch's classes make of it, ours do.
    other = {"AdamW": torch.optim.Adam, "Adam": torch.optim.AdamW}[name]
    source = other(groups_of(new_params(SHAPES)), lr=LR)
    take_steps(source, range(2))
    results = []
    for cls in PAIRS[name]:
        params = [p.detach().clone().requires_grad_() for p in params_of(source)]
        optimizer = cls(groups_of(params), lr=LR)
        optimizer.load_state_dict(source.state_dict())
        flags = [g["decoupled_weight_decay"] for g in optimizer.param_groups]
        take_steps(optimizer, range(2, 5))
        results.append((params, flags))
    (ours, our_flags), (theirs, their_flags) = results
    assert our_flags == their_flags
    for p, q in zip(ours, theirs, strict=True):
        torch.testing.assert_close(p, q, rtol=0, atol=bound(3, 2 * LR, q))


KEPT = {
    "bfloat16-float32": (torch.bfloat16, torch.float32),
    "float16-float32": (torch.float16, torch.float32),
    "float32-bfloat16": (torch.float32, torch.bfloat16),
    "bfloat16-own": (torch.bfloat16, None),
    "complex64-float32": (torch.complex64, torch.float32),
}


@on_each_device
@pytest.mark.parametrize("fresh_state_dtype", ["same", "none"])
@pytest.mark.parametrize("case", KEPT)
def test_dtypes_of_moments_survive(case, fresh_state_dtype, device):
    dtype, state_dtype = KEPT[case]
    # By default rounding depends on what was asked for, which a state does not tell.
    options = {"lr": LR, "rounding": "nearest"}
    first = warpstep.AdamW(new_params(SHAPES, device, dtype), state_dtype=state_dtype, **options)
    take_steps(first, range(3))
    state_dict = saved_and_loaded(first.state_dict())

    params = [p.detach().clone().requires_grad_() for p in params_of(first)]
    again = state_dtype if fresh_state_dtype == "same" else None
    second = warpstep.AdamW(params, state_dtype=again, **options)
    second.load_state_dict(state_dict)
    for p in params:
        assert second.state[p]["exp_avg"].dtype == second.state[p]["exp_avg_sq"].dtype
        kept = dtype if dtype.is_complex else state_dtype or dtype
        assert second.state[p]["exp_avg"].dtype == kept
        assert second.state[p]["step"].dtype == torch.float32
    take_steps(first, range(3, 6))
    take_steps(second, range(3, 6))
    for p, q in zip(params_of(first), params, strict=True):
        assert torch.equal(p, q)  # the same bits as the run that was not interrupted
    assert_same(first.state_dict()["state"], second.state_dict()["state"])


def test_torch_casts_such_moments_to_the_parameters_dtype():
    # A difference from torch: only in this direction does a checkpoint lose bits.
    ours = warpstep.AdamW(
        new_params(SHAPES, dtype=torch.bfloat16), lr=LR, state_dtype=torch.float32
    )
    take_steps(ours, range(2))
    theirs = torch.optim.AdamW(new_params(SHAPES, dtype=torch.bfloat16), lr=LR)
    theirs.load_state_dict(ours.state_dict())
    back = warpstep.AdamW(new_params(SHAPES, dtype=torch.bfloat16), lr=LR)
    back.load_state_dict(theirs.state_dict())
    for p, q, r in zip(params_of(ours), params_of(theirs), params_of(back), strict=True):
        assert theirs.state[q]["exp_avg"].dtype == torch.bfloat16
        assert_same(theirs.state[q]["exp_avg"], ours.state[p]["exp_avg"].bfloat16())
        assert_same(back.state[r]["exp_avg"], theirs.state[q]["exp_avg"])
    take_steps(back, range(2, 3))


@on_each_device
@pytest.mark.parametrize("state_dtype", [torch.float32, torch.bfloat16, torch.float64], ids=str)
def test_state_dtype_recasts_on_load(state_dtype, device):
    source = torch.optim.AdamW(new_params(SHAPES, device), lr=LR, amsgrad=True)
    take_steps(source, range(2))
    optimizer = warpstep.AdamW(new_params(SHAPES, device), lr=LR, state_dtype=state_dtype)
    optimizer.load_state_dict(source.state_dict())
    for p, q in zip(params_of(optimizer), params_of(source), strict=True):
        for key in ("exp_avg", "exp_avg_sq", "max_exp_avg_sq"):
            assert_same(optimizer.state[p][key], source.state[q][key].to(state_dtype))
        assert optimizer.state[p]["step"].dtype == torch.float32
    take_steps(optimizer, range(2, 4))
    assert all(optimizer.state[p]["exp_avg"].dtype == state_dtype for p in params_of(optimizer))


def test_weights_only_load_of_every_kind_of_state():
    for options in (
        {},
        {"amsgrad": True},
        {"lr": torch.tensor(LR)},
        {"state_dtype": torch.float64},
    ):
        optimizer = warpstep.AdamW(groups_of(new_params(SHAPES)), **options)
        take_steps(optimizer, range(2))
        state_dict = optimizer.state_dict()
        assert_same(saved_and_loaded(state_dict), state_dict)


def test_what_is_loaded_is_a_copy():
    source = warpstep.AdamW(new_params(SHAPES), lr=torch.tensor(LR))
    take_steps(source, range(2))
    state_dict = source.state_dict()
    state_dict["state"][0]["history"] = [1]  # which no optimizer knows
    bits = copy.deepcopy(state_dict)
    optimizer = warpstep.AdamW(new_params(SHAPES), lr=LR)
    optimizer.load_state_dict(state_dict)
    take_steps(optimizer, range(2, 4))
    optimizer.param_groups[0]["lr"].fill_(0.5)
    optimizer.state[params_of(optimizer)[0]]["history"].append(2)
    assert_same(state_dict, bits)
    assert_same(source.state_dict(), bits)


@pytest.mark.parametrize("own", [True, False], ids=["own-dict", "another's"])
def test_load_then_step_reads_what_was_loaded(own):
    # Back to step 2 after step 5, several times: the plan of the later steps must not be used.
    optimizer = warpstep.AdamW(new_params(SHAPES), lr=LR)
    take_steps(optimizer, range(2))
    at = copy.deepcopy(optimizer.state_dict())
    where = [p.detach().clone() for p in params_of(optimizer)]
    take_steps(optimizer, range(2, 5))
    expected = [p.detach().clone() for p in params_of(optimizer)]
    for _ in range(3):
        with torch.no_grad():
            for p, value in zip(params_of(optimizer), where, strict=True):
                p.copy_(value)
        optimizer.load_state_dict(at if own else saved_and_loaded(at))
        take_steps(optimizer, range(2, 5))
        for p, value in zip(params_of(optimizer), expected, strict=True):
            assert torch.equal(p, value)


def test_own_state_dict_loaded_back_changes_nothing():
    params = new_params(SHAPES)
    optimizer = warpstep.AdamW(params, lr=LR)
    twin = copy.deepcopy(optimizer)
    for step in range(4):
        take_steps(optimizer, [step])
        optimizer.load_state_dict(optimizer.state_dict())
        take_steps(twin, [step])
    for p, q in zip(params, params_of(twin), strict=True):
        assert torch.equal(p, q)


def test_loaded_options_rule_the_next_step():
    source = torch.optim.AdamW(new_params(SHAPES), lr=5 * LR, betas=(0.5, 0.6), maximize=True)
    take_steps(source, range(1))
    state_dict = copy.deepcopy(source.state_dict())
    optimizer = warpstep.AdamW(new_params(SHAPES), lr=LR)
    take_steps(optimizer, range(1))
    with torch.no_grad():
        for p, q in zip(params_of(optimizer), params_of(source), strict=True):
            p.copy_(q)
    optimizer.load_state_dict(state_dict)
    take_steps(optimizer, range(1, 4))
    take_steps(source, range(1, 4))
    for p, q in zip(params_of(optimizer), params_of(source), strict=True):
        torch.testing.assert_close(p, q, rtol=0, atol=bound(4, 5 * LR, q))
