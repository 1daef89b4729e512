"""warpstep.SGD beside torch's: options that both take, and how far their runs may be apart.

The two run the same formula and differ in roundings only: see `bound`.
"""

import pytest
import torch

import warpstep
from support.parameters import new_params, params_of

LR = 0.05
TORCHS = {
    "plain": {},
    "coupled": {"weight_decay": 0.1},
    "momentum": {"momentum": 0.9},
    "nesterov": {"momentum": 0.9, "nesterov": True, "weight_decay": 0.1},
    "dampening": {"momentum": 0.9, "dampening": 0.4},
    "dampening-alone": {"dampening": 0.4},
    "maximize": {"momentum": 0.5, "maximize": True, "weight_decay": 0.1},
}
each_variant = pytest.mark.parametrize("options", TORCHS.values(), ids=TORCHS)


def bound(steps, lr, param, buffer_size=0.0):
    """How far two parameters may be apart after some steps of gradients below 8.

    Each implementation rounds the buffer at most five times a step and the parameter five times; an
    error of a buffer goes on into all steps that follow. A buffer with momentum 0.9 is below 80,
    and with nesterov's step ahead 152; so is a parameter after some steps, with coupled decay.
    """
    size = max(param.detach().abs().max().item() if param.numel() else 0, 8.0) + 160 * lr
    u = torch.finfo(param.dtype).eps / 2
    return 2 * u * steps * 5 * (size + steps * lr * 160)


def assert_near(ours, theirs, steps, lr=LR):
    for p, q in zip(ours, theirs, strict=True):
        torch.testing.assert_close(p.detach(), q.detach(), rtol=0, atol=bound(steps, lr, q))


def assert_states_near(mine, torchs, steps=10):
    for p, q in zip(params_of(mine), params_of(torchs), strict=True):
        a, b = mine.state.get(p, {}), torchs.state.get(q, {})
        assert ("momentum_buffer" in a) == ("momentum_buffer" in b)
        if b.get("momentum_buffer") is not None:
            limit = bound(steps, 1.0, q)
            torch.testing.assert_close(
                a["momentum_buffer"], b["momentum_buffer"], rtol=0, atol=limit
            )


def both(ours=None, theirs=None, **options):
    """warpstep's optimizer and torch's, of the same parameters, which are given or new."""
    ours, theirs = ours or {}, theirs or {}
    return (
        warpstep.SGD(new_params(), **{"lr": LR, **options, **ours}),
        torch.optim.SGD(new_params(), **{"lr": LR, **options, **theirs}),
    )
