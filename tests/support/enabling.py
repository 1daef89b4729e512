"""Torch's optimizers beside themselves: one steps while warpstep is enabled, its twin does not."""

import contextlib

import pytest
import torch

import warpstep
from support import sgd_pairs
from support.parameters import new_params, params_of, set_grads
from support.tolerance import bound
from warpstep.enabling import shortcut, torchs_plan

LR = 0.01
KINDS = {
    "AdamW": (torch.optim.AdamW, {"lr": LR, "weight_decay": 0.1}),
    "Adam": (torch.optim.Adam, {"lr": LR, "weight_decay": 0.1}),
    "SGD": (torch.optim.SGD, {"lr": LR, "momentum": 0.9}),
}
each_kind = pytest.mark.parametrize("kind", KINDS)
SHAPES = [(5, 3), (), (17,), (0, 2), (40, 7)]


def go(way, monkeypatch):
    """Has enable() take torch's steps one way only: by plans, the shortcut or the operators."""
    if way != "plans":
        monkeypatch.setattr(torchs_plan, "_place_of_step", lambda kind: None)
    if way == "operators":
        monkeypatch.setattr(shortcut, "KNOWN", [])


each_way = pytest.mark.parametrize("way", ["plans", "shortcut", "operators"])


def torchs(name="AdamW", params=None, **options):
    """One of torch's optimizers, fused unless something else is asked for, in two groups."""
    kind, defaults = KINDS[name]
    params = new_params(SHAPES) if params is None else params
    groups = [{"params": params[:2]}, {"params": params[2:], "lr": 2 * LR}]
    return kind(groups, **{"fused": True, **defaults, **options})


def step_both(ours, theirs, steps, unfused=False, **grads):
    """Steps of these numbers: ours with warpstep enabled, its twin without."""
    for step in steps:
        for optimizer in (ours, theirs):
            set_grads(params_of(optimizer), step, **grads)
        with warpstep.enabled(unfused=unfused):
            ours.step()
        theirs.step()


def assert_near(ours, theirs, steps, dtype=torch.float32):
    """Parameters differ by roundings; states have the same keys, dtypes, devices and counters.

    All numbers of all steps were stored in ``dtype`` or a more precise one.
    """
    of_rule = sgd_pairs.bound if isinstance(theirs, torch.optim.SGD) else bound
    for p, q in zip(params_of(ours), params_of(theirs), strict=True):
        atol = of_rule(steps, 2 * LR, q.to(dtype))
        torch.testing.assert_close(p.detach(), q.detach(), rtol=0, atol=atol)
    assert vars(ours).keys() == vars(theirs).keys()
    for p, q in zip(params_of(ours), params_of(theirs), strict=True):
        mine, expected = ours.state.get(p, {}), theirs.state.get(q, {})
        assert list(mine) == list(expected)
        for key, value in expected.items():
            assert isinstance(mine[key], torch.Tensor)
            assert mine[key].dtype == value.dtype
            assert mine[key].stride() == value.stride()
            assert mine[key].requires_grad == value.requires_grad
            if key == "step":
                assert mine[key] == value


@contextlib.contextmanager
def by_plans(steps, *reasons):
    """Within, plans must take so many steps, and none for these reasons alone."""
    before = warpstep.status()
    yield
    after = warpstep.status()
    assert after.by_plans - before.by_plans == steps
    new = {k for k, n in after.unplanned.items() if n > before.unplanned.get(k, 0)}
    assert len(new) == len(reasons), new
    for found, expected in zip(sorted(new), sorted(reasons), strict=True):
        assert expected in found
