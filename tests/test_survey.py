"""The short way into a plan: what is usual takes it, and what is not goes the long way."""

import gc

import pytest
import torch
from torch.nn import Parameter

import warpstep
from support.environment import EMULATED, INTERPRETED
from warpstep.plan import Plan
from warpstep.survey import Survey

pytestmark = pytest.mark.skipif(EMULATED or INTERPRETED, reason="of the CPU's own kernels")

RULES = {
    "adamw": lambda params: warpstep.AdamW(params),
    "amsgrad-average": lambda params: warpstep.AdamW(params, amsgrad=True, ema_decay=0.9),
    "bfloat16-moments": lambda params: warpstep.AdamW(params, state_dtype=torch.bfloat16),
    "sgd": lambda params: warpstep.SGD(params),
    "momentum": lambda params: warpstep.SGD(params, momentum=0.9, dampening=0.1),
}


@pytest.fixture
def long_ways(monkeypatch):
    """How many parameters went the long way so far: the length of a list."""
    made = []
    prepare = Plan._prepare

    def counted(self, *args, **kwargs):
        made.append(args)
        return prepare(self, *args, **kwargs)

    monkeypatch.setattr(Plan, "_prepare", counted)
    return made


def parameter(shape=(4, 3), dtype=torch.float32):
    param = Parameter(torch.randn(shape).to(dtype))
    param.grad = torch.randn_like(param)
    return param


@pytest.mark.parametrize("rule", RULES)
def test_usual_parameters_take_the_short_way(rule, long_ways):
    params = [parameter(), parameter((1,)), parameter(()), parameter((0,)), parameter((2, 5)).t()]
    params[-1] = Parameter(torch.randn(5, 2).t())  # transposed, and dense
    params[-1].grad = torch.randn(5, 2).t()
    optimizer = RULES[rule](params)
    optimizer.step()
    optimizer.plan = None
    optimizer.step()
    assert not long_ways
    assert [b.backend for b in optimizer.plan.buckets] == ["cpu"]


@pytest.mark.parametrize("rule", RULES)
def test_both_ways_make_the_same_state_and_take_the_same_step(rule, monkeypatch):
    params = [parameter(), parameter((7,))]
    twins = [Parameter(p.detach().clone()) for p in params]
    for param, twin in zip(params, twins, strict=True):
        twin.grad = param.grad.clone()
    short, long = RULES[rule](params), RULES[rule](twins)
    for _ in range(2):
        short.step()
        with monkeypatch.context() as patch:
            patch.setattr(Plan, "_survey_of", lambda *_: None)
            long.step()
        short.plan = long.plan = None
    for param, twin in zip(params, twins, strict=True):
        assert torch.equal(param, twin)
        ours, theirs = short.state[param], long.state[twin]
        assert ours.keys() == theirs.keys()
        for key in ours:
            assert ours[key].dtype == theirs[key].dtype
            assert torch.equal(ours[key], theirs[key])


def transpose_grad(optimizer, param):
    param.grad = torch.randn(3, 4).t()


def negate_scalars_grad(optimizer, param):
    param.data = torch.randn(1)
    optimizer.state[param].clear()
    param.grad = torch._neg_view(torch.randn(1))


def gap(optimizer, param):
    param.data = torch.randn(4, 6)[:, ::2]


def moment_elsewhere(optimizer, param):
    optimizer.state[param]["exp_avg"] = torch.zeros(3, 4).t()


def step_as_a_number(optimizer, param):
    optimizer.state[param]["step"] = 1


def step_in_float64(optimizer, param):
    optimizer.state[param]["step"] = torch.ones((), dtype=torch.float64)


def complex_numbers(optimizer, param):
    optimizer.state[param].clear()
    param.data = torch.randn(4, 3, dtype=torch.complex64)
    param.grad = torch.randn(4, 3, dtype=torch.complex64)


ODD = [
    transpose_grad,
    negate_scalars_grad,
    gap,
    moment_elsewhere,
    step_as_a_number,
    step_in_float64,
    complex_numbers,
]


@pytest.mark.parametrize("make_odd", ODD, ids=lambda f: f.__name__)
def test_odd_parameters_go_the_long_way(make_odd, long_ways):
    usual, odd = parameter(), parameter()
    optimizer = warpstep.AdamW([usual, odd])
    optimizer.step()
    make_odd(optimizer, odd)
    usual.grad, kept = torch.randn(4, 3), odd.grad
    before = odd.detach().clone()
    optimizer.plan = None
    optimizer.step()
    assert {entry.index for _, entry, *_ in long_ways} == {1}  # twice, if the reference steps it
    assert odd.grad is kept
    assert not torch.equal(odd, before)


@pytest.mark.parametrize("enabled", [True, False])
def test_the_garbage_collector_waits_while_a_plan_is_made(enabled, monkeypatch):
    """And is as it was after it, also where the plan cannot be made."""
    seen = []
    sorts = Survey.sorts
    monkeypatch.setattr(
        Survey, "sorts", lambda self, entry: seen.append(gc.isenabled()) or sorts(self, entry)
    )
    wrong = parameter()
    was_enabled = gc.isenabled()
    (gc.enable if enabled else gc.disable)()
    try:
        warpstep.AdamW([parameter()]).step()
        assert gc.isenabled() == enabled
        optimizer = warpstep.AdamW([wrong])
        optimizer.state[wrong]["exp_avg"] = torch.zeros(1)
        with pytest.raises(RuntimeError, match="exp_avg"):
            optimizer.step()
        assert gc.isenabled() == enabled
    finally:
        (gc.enable if was_enabled else gc.disable)()
    assert seen == [False, False]
