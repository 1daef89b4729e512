"""Hyper-parameters and step counters of every value, as torch's fused kernel takes them.

torch checks hyper-parameters when an optimizer is made, and computes with whatever they are edited
into. Its fused kernel says what comes out; its for-loop raises where that divides by zero.
"""

import contextlib
import copy
import itertools
import math

import numpy as np
import pytest
import torch
from torch.nn import Parameter

import warpstep
from support.environment import EMULATED, INTERPRETED

INF, NAN = math.inf, math.nan
DTYPES = [torch.float64, torch.float32, torch.bfloat16, torch.float16]
# Where a step takes a hundred times as long, one format and one form of decay stand for all.
IS_SLOW = EMULATED or INTERPRETED
FEW_DTYPES = [torch.float32] if IS_SLOW else DTYPES
SPECIAL = {
    "param": [0.0, -0.0, 1.0, -2.0, 1e-4, INF, -INF, NAN],
    "grad": [0.0, 1.0, -3.0, INF, -INF, NAN],
    "exp_avg": [0.0, 0.5, -0.5, 1e-6, INF, NAN],
    "exp_avg_sq": [0.0, 0.25, INF, NAN],
}
ELEMENTS = list(itertools.product(*SPECIAL.values()))


def stepped(kind, dtype, device, hypers, step, amsgrad=False, columns=None, **how):
    """Parameter, moments and counter after one step from the special values."""
    columns = columns or list(zip(*ELEMENTS, strict=True))
    param, grad, *moments = (torch.tensor(c, dtype=torch.float64) for c in columns)
    param = Parameter(param.to(device, dtype))
    param.grad = grad.to(device, dtype)
    optimizer = kind([param], amsgrad=amsgrad, **how)
    optimizer.param_groups[0].update(hypers)
    state = optimizer.state[param]
    state["step"] = torch.tensor(step, dtype=torch.float32, device=device)
    names = ["exp_avg", "exp_avg_sq"]
    state |= {n: m.to(device, dtype) for n, m in zip(names, moments, strict=True)}
    if amsgrad:
        state["max_exp_avg_sq"] = state["exp_avg_sq"] * 2
        names.append("max_exp_avg_sq")
    optimizer.step()
    found = {"param": param, **{name: state[name] for name in names}}
    return {n: t.detach().cpu().double().numpy() for n, t in found.items()}, state["step"].item()


def assert_as_torch(backend, device, dtype, hypers, step=3.0, adam=False, **more):
    """The same elements NaN, the same infinite, the others a few roundings away."""
    ours, theirs = (
        (warpstep.Adam, torch.optim.Adam) if adam else (warpstep.AdamW, torch.optim.AdamW)
    )
    expected, expected_step = stepped(theirs, dtype, "cpu", hypers, step, fused=True, **more)
    found, found_step = stepped(ours, dtype, device, hypers, step, backend=backend, **more)
    assert found_step == expected_step or (math.isnan(found_step) and math.isnan(expected_step))
    if "columns" not in more:
        apart = unlike_torch(hypers, adam)
        expected["param"][apart] = found["param"][apart]
    u = torch.finfo(dtype).eps
    before = more.get("columns") or list(zip(*ELEMENTS, strict=True))
    start = dict(zip(SPECIAL, map(np.array, before), strict=True))
    start["max_exp_avg_sq"] = 2 * start["exp_avg_sq"]
    for name, wanted in expected.items():
        mine = found[name]
        assert np.array_equal(np.isnan(mine), np.isnan(wanted)), differing(name, mine, wanted)
        infinite = np.isinf(wanted)
        assert np.array_equal(np.where(infinite, wanted, 0), np.where(np.isinf(mine), mine, 0)), (
            differing(name, mine, wanted)
        )
        finite = np.isfinite(wanted)
        # Some ten roundings of the values and of what they were changed by; of float16's and
        # float32's subnormal numbers one step.
        size = np.abs(wanted) + np.abs(np.where(np.isfinite(start[name]), start[name], 0))
        bound = 16 * u * size + 2 * torch.finfo(dtype).smallest_normal * u
        off = np.abs(np.subtract(mine, wanted, where=finite, out=np.zeros_like(mine)))
        assert (off <= bound).all(where=finite), differing(name, mine, wanted, off > bound)


def unlike_torch(hypers, adam):
    """Infinite parameters that are decayed by more than they are (kernels/rules/adamw.h)."""
    decay = hypers.get("lr", 1e-3) * hypers.get("weight_decay", 1e-2)
    return [not adam and abs(decay) >= 1 and math.isinf(element[0]) for element in ELEMENTS]


def differing(name, mine, wanted, where=None):
    """For messages: the first element that differs, and what it began as."""
    if where is None:
        kind = [
            np.where(np.isnan(x), 2, np.where(np.isinf(x), np.sign(x), 0)) for x in (mine, wanted)
        ]
        where = kind[0] != kind[1]
    first = int(np.argmax(where))
    began = ELEMENTS[first] if len(mine) == len(ELEMENTS) else first
    return f"{name} {mine[first]}, torch's {wanted[first]}, from {began}; {where.sum()} elements"


HYPERS = {
    "lr-negative": {"lr": -1e-3},
    "lr-rounded-below-zero": {"lr": -5.6e-21},
    "lr-zero": {"lr": 0.0},
    "lr-nan": {"lr": NAN},
    "lr-inf": {"lr": INF},
    "lr-inf-without-decay": {"lr": INF, "weight_decay": 0.0},
    "lr-minus-inf": {"lr": -INF},
    "decay-negative": {"weight_decay": -0.5},
    "decay-nan": {"weight_decay": NAN},
    "decay-inf": {"weight_decay": INF},
    "decay-of-all": {"lr": 0.5, "weight_decay": 2.0},
    "decay-of-more-than-all": {"lr": 0.5, "weight_decay": 3.0},
    "eps-negative": {"eps": -1e-8},
    "eps-zero": {"eps": 0.0},
    "eps-nan": {"eps": NAN},
    "eps-inf": {"eps": INF},
    "eps-1e-45": {"eps": 1e-45},
    "eps-minus-1e-45": {"eps": -1e-45},
    "eps-1e-40": {"eps": 1e-40},
    "eps-1e-50": {"eps": 1e-50},
    "eps-1e-320": {"eps": 1e-320},
    "beta1-one": {"betas": (1.0, 0.999)},
    "beta1-one-lr-zero": {"betas": (1.0, 0.999), "lr": 0.0},
    "beta1-above-one": {"betas": (1.25, 0.999)},
    "beta1-two": {"betas": (2.0, 0.999)},
    "beta1-negative": {"betas": (-0.5, 0.999)},
    "beta1-nan": {"betas": (NAN, 0.999)},
    "beta2-one": {"betas": (0.9, 1.0)},
    "beta2-above-one": {"betas": (0.9, 1.125)},
    "beta2-negative": {"betas": (0.9, -0.5)},
    "beta2-nan": {"betas": (0.9, NAN)},
    "both-one": {"betas": (1.0, 1.0)},
    "both-zero": {"betas": (0.0, 0.0)},
}


@pytest.mark.parametrize("adam", [False] if IS_SLOW else [False, True])
@pytest.mark.parametrize("dtype", FEW_DTYPES, ids=str)
@pytest.mark.parametrize("hypers", HYPERS.values(), ids=HYPERS.keys())
def test_hyper_parameters_of_every_value(backend, device, dtype, hypers, adam):
    weight_decay = {} if "weight_decay" in hypers else {"weight_decay": 0.125}
    assert_as_torch(backend, device, dtype, {**weight_decay, **hypers}, adam=adam)


@pytest.mark.parametrize("hypers", HYPERS.values(), ids=HYPERS.keys())
def test_hyper_parameters_of_every_value_with_amsgrad(backend, device, hypers):
    assert_as_torch(backend, device, torch.float32, hypers, amsgrad=True)


STEPS = [-INF, -1e30, -5.0, -2.5, -1.0, -0.75, 0.0, 0.5, 2.25, 1e3 + 0.125, 2.0**24 - 1, 2.0**24]
STEPS += [2.0**31, 2.0**32 - 256, 2.0**32, 2.0**32 + 512, 1e18, 2.0**63, 2.0**64, 3.4e38, INF, NAN]
BETAS = {
    "usual": (0.9, 0.999),
    "none": (0.0, 0.0),
    "near-one": (0.999, 1 - 1e-7),
    "one": (1.0, 1.0),
    "above-one": (1.125, 1.0625),
    "negative": (-0.5, -0.25),
}


@pytest.mark.parametrize("betas", BETAS.values(), ids=BETAS.keys())
@pytest.mark.parametrize("step", STEPS, ids=str)
def test_step_counters_of_every_value(backend, device, step, betas):
    assert_as_torch(backend, device, torch.float32, {"betas": betas}, step)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("step", [2.0**32, INF, NAN, 2.5, -3.0], ids=str)
def test_step_counters_in_every_format(backend, device, step, dtype):
    assert_as_torch(backend, device, dtype, {}, step, adam=True)


@pytest.mark.parametrize("dtype", FEW_DTYPES, ids=str)
@pytest.mark.parametrize("step", [0.0, 5.0, 1e4])
@pytest.mark.parametrize("eps", [1e-45, 1e-40, 1e-38, 1e-300])
def test_an_eps_that_nearly_vanishes(backend, device, eps, step, dtype):
    """Zero gradients leave the parameter; small ones are divided by eps itself."""
    zero, small = [0.0] * 4, [0.0, 0.0, 2.0**-24, -(2.0**-20)]
    columns = [[1.0, 2.0, 1.0, 0.5], zero, small, zero]
    options = {"lr": 1e-30, "eps": eps, "weight_decay": 0.0}
    assert_as_torch(backend, device, dtype, options, step, columns=columns)


# ---- the other ways in

WAYS = {
    "functional": warpstep.functional.adamw_,
    "operator": torch.ops.warpstep.adamw_,
    "enable": None,
}


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("hypers", HYPERS.values(), ids=HYPERS.keys())
def test_lists_with_hyper_parameters_of_every_value(hypers, way):
    """What torch's operator does; under `enable()` it is called itself."""
    values = {"lr": 1e-3, "betas": (0.9, 0.999), "eps": 1e-8, "weight_decay": 0.125, **hypers}
    values["beta1"], values["beta2"] = values.pop("betas")
    results = []
    for ours in (True, False):
        columns = torch.tensor(list(zip(*ELEMENTS, strict=True)))
        param, grad, exp_avg, exp_avg_sq = (column.clone() for column in columns)
        lists = [[param], [grad], [exp_avg], [exp_avg_sq], [], [torch.tensor(3.0)]]
        if ours and WAYS[way] is not None:
            WAYS[way](*lists, **values, advance_steps=False)
        else:
            before = warpstep.enabling.override.counts.taken
            with warpstep.enabled() if ours else contextlib.nullcontext():
                torch._fused_adamw_(*lists, **values, amsgrad=False, maximize=False)
            assert (warpstep.enabling.override.counts.taken > before) == ours
        results.append((param, exp_avg, exp_avg_sq))
    same = ~torch.tensor(unlike_torch(values, False))
    for found, expected in zip(*([t[same] for t in result] for result in results), strict=True):
        # Some ten roundings of what is there, and of the values of up to 2 that it was.
        torch.testing.assert_close(found, expected, rtol=2e-6, atol=2e-6, equal_nan=True)


# ---- values of every type, and as they change

KINDS = {
    "lr-numpy": {"lr": np.float64(0.02)},
    "lr-numpy-float32": {"lr": np.float32(0.25)},
    "lr-numpy-array": {"lr": np.array(0.02)},
    "lr-integer": {"lr": 1},
    "betas-list": {"betas": [0.8, 0.99]},
    "betas-array": {"betas": np.array([0.8, 0.99])},
    "betas-array-float32": {"betas": np.array([0.5, 0.75], dtype=np.float32)},
    "betas-tensor": {"betas": torch.tensor([0.5, 0.75])},
    "betas-tensors": {"betas": (torch.tensor(0.5), torch.tensor(0.75))},
    "eps-numpy": {"eps": np.float32(0.5)},
    "decay-numpy": {"weight_decay": np.float32(0.25)},
    "maximize-tensor": {"maximize": torch.tensor(True)},
    "maximize-numpy": {"maximize": np.bool_(True)},
    "maximize-integer": {"maximize": 1},
}


def plain(value):
    """As torch's own operations take it, whose fused kernel takes numbers only."""
    if isinstance(value, (torch.Tensor, np.ndarray, list, tuple)):
        values = [float(v) for v in value] if np.ndim(value) else [float(value)]
        return tuple(values) if len(values) > 1 else values[0]
    return float(value)


def pair_of_optimizers(backend, device):
    """Ours and torch's fused one, on the same two parameters, each in its own group."""
    found = []
    for kind, how in ((warpstep.AdamW, {"backend": backend}), (torch.optim.AdamW, {"fused": True})):
        where = device if kind is warpstep.AdamW else "cpu"
        generator = torch.Generator().manual_seed(0)
        params = [torch.randn(9, generator=generator).to(where).requires_grad_() for _ in range(2)]
        found.append(kind([{"params": [p]} for p in params], lr=0.01, **how))
    return found


def step_both(ours, theirs, seed):
    generator = torch.Generator().manual_seed(seed)
    for mine, other in zip(ours.param_groups, theirs.param_groups, strict=True):
        grad = torch.randn(9, generator=generator)
        mine["params"][0].grad = grad.to(mine["params"][0].device)
        other["params"][0].grad = grad
    ours.step()
    theirs.step()
    for mine, other in zip(ours.param_groups, theirs.param_groups, strict=True):
        found, expected = mine["params"][0].detach().cpu(), other["params"][0].detach()
        # A few roundings of values and updates of about 1.
        torch.testing.assert_close(found, expected, rtol=2e-6, atol=2e-6, equal_nan=True)


@pytest.mark.parametrize("values", KINDS.values(), ids=KINDS.keys())
def test_hyper_parameters_of_every_type(backend, device, values):
    ours, theirs = pair_of_optimizers(backend, device)
    step_both(ours, theirs, 1)
    ours.param_groups[1].update(values)
    theirs.param_groups[1].update({key: plain(value) for key, value in values.items()})
    if "maximize" in values:
        theirs.param_groups[1]["maximize"] = True
    for seed in (2, 3):
        step_both(ours, theirs, seed)


CHANGES = {
    "lr-tensor": ("lr", torch.tensor(0.02), lambda x: x.fill_(NAN), NAN),
    "lr-tensor-negative": ("lr", torch.tensor(0.02), lambda x: x.fill_(-1.0), -1.0),
    "lr-array": ("lr", np.array(0.02), lambda x: x.fill(0.25), 0.25),
    "betas-array": ("betas", np.array([0.8, 0.9]), lambda x: x.fill(0.5), (0.5, 0.5)),
    "betas-list": ("betas", [0.8, 0.9], lambda x: x.__setitem__(0, 0.5), (0.5, 0.9)),
    "maximize": ("maximize", torch.tensor(False), lambda x: x.fill_(True), True),
}


@pytest.mark.parametrize("case", CHANGES)
def test_hyper_parameters_that_change_in_place(backend, device, case):
    key, value, change, afterwards = CHANGES[case]
    value = copy.deepcopy(value)
    ours, theirs = pair_of_optimizers(backend, device)
    ours.param_groups[1][key] = value
    theirs.param_groups[1][key] = value.item() if np.ndim(value) == 0 else tuple(map(float, value))
    for seed in (1, 2):
        step_both(ours, theirs, seed)
    change(value)
    theirs.param_groups[1][key] = afterwards
    for seed in (3, 4):
        step_both(ours, theirs, seed)


def test_amsgrad_that_comes_on_in_place():
    """The flag is read at each step: its state is missing then, as where the flag is replaced."""
    param = torch.ones(3, requires_grad=True)
    optimizer = warpstep.AdamW([param])
    flag = optimizer.param_groups[0]["amsgrad"] = torch.tensor(False)
    for _ in range(2):
        param.grad = torch.ones(3)
        optimizer.step()
    flag.fill_(True)
    with pytest.raises(RuntimeError, match="max_exp_avg_sq"):
        optimizer.step()


def test_a_group_of_a_new_one_may_have_what_torch_takes():
    """torch checks the defaults, not what a group brings along."""
    both = []
    for kind, how in ((warpstep.AdamW, {}), (torch.optim.AdamW, {"fused": True})):
        params = [torch.ones(3, requires_grad=True) for _ in range(2)]
        optimizer = kind([{"params": params[:1], "lr": -0.5}], **how)
        optimizer.add_param_group({"params": params[1:], "betas": (1.0, 0.5), "eps": -1.0})
        for param in params:
            param.grad = torch.tensor([1.0, -2.0, 0.0])
        optimizer.step()
        both.append(torch.stack(params).detach())
    torch.testing.assert_close(*both, rtol=2e-6, atol=2e-6, equal_nan=True)


def test_a_schedule_that_ends_below_zero():
    """LinearLR to 0 ends at -5.6e-21 by rounding."""
    both = []
    for kind, how in ((warpstep.AdamW, {}), (torch.optim.AdamW, {"fused": True})):
        param = torch.ones(3, requires_grad=True)
        optimizer = kind([param], lr=1e-3, **how)
        scheduler = torch.optim.lr_scheduler.LinearLR(optimizer, 0.1, 0.0, total_iters=4)
        for _ in range(10):
            param.grad = torch.tensor([1.0, -2.0, 0.5])
            optimizer.step()
            scheduler.step()
        assert -1e-18 < optimizer.param_groups[0]["lr"] < 0
        both.append(param.detach())
    torch.testing.assert_close(*both, rtol=2e-6, atol=0)
