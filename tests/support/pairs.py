"""The same parameters twice, for warpstep's optimizer and for torch's."""

import torch
from torch.nn import Parameter

import warpstep

SHAPES = [(7, 5), (100,), ()]


def pair(backend="auto", **options):
    """The same parameters twice, with warpstep's optimizer and torch's."""
    generator = torch.Generator().manual_seed(0)
    values = [torch.randn(shape, generator=generator) for shape in SHAPES]
    ours, theirs = ([Parameter(v.clone()) for v in values] for _ in range(2))
    mine = warpstep.AdamW(ours, backend=backend, **options)
    return mine, torch.optim.AdamW(theirs, foreach=False), ours, theirs


def give(ours, theirs, seed, scale=1.0):
    generator = torch.Generator().manual_seed(seed)
    for mine, their in zip(ours, theirs, strict=True):
        grad = torch.randn(mine.shape, generator=generator) * scale
        mine.grad, their.grad = grad.clone(), grad.clone()


def assert_near(ours, theirs, steps):
    """Within 12 roundings a step of the update and the weight, as tolerance.py derives."""
    for mine, their in zip(ours, theirs, strict=True):
        bound = steps * 12 * 2**-24 * (their.detach().abs() + 1e-3)
        assert ((mine - their).detach().abs() <= bound).all()
