"""The six lists of tensors that warpstep.functional takes, compared with others and the oracle."""

import numpy as np
import torch

from support import oracle
from warpstep.recipes import real_dtype

SHAPES = [(1,), (3, 5), (257,), (0,), (2, 3, 4), (40_001,), ()]
HYPERS = {"lr": 1e-2, "beta1": 0.9, "beta2": 0.99, "weight_decay": 0.1, "eps": 1e-8}
NAMES = ("params", "grads", "exp_avgs", "exp_avg_sqs", "max_exp_avg_sqs", "state_steps")


def streams(shapes=SHAPES, dtypes=(torch.float32,) * 3, device="cpu", step=4.0, seed=0):
    """The six lists, in a state as after some steps."""
    generator = torch.Generator().manual_seed(seed)

    def random(shape, dtype):
        return torch.randn(shape, generator=generator).to(dtype).to(device)

    param, grad, moment = dtypes
    return [
        [random(s, param) for s in shapes],
        [random(s, grad) for s in shapes],
        [random(s, moment) * 0.1 for s in shapes],
        [random(s, moment).abs() * 0.01 for s in shapes],
        [random(s, moment).abs() * 0.01 for s in shapes],
        [torch.full((), step, device=device) for _ in shapes],
    ]


def clones(lists):
    return [[tensor.clone() for tensor in stream] for stream in lists]


def flat(lists):
    return [tensor for stream in lists for tensor in stream]


def assert_same_lists(lists, others, streams=range(6)):
    for s in streams:
        for i, (a, b) in enumerate(zip(lists[s], others[s], strict=True)):
            assert torch.equal(a, b), f"{NAMES[s]}[{i}]"


def assert_within_bounds(after, before, step_, coupled=False, grad_scale=1.0, **options):
    """Every stream of every tensor is as near to the oracle's as roundings allow."""
    told = oracle.Options(
        lr=options.get("lr", HYPERS["lr"]),
        betas=(HYPERS["beta1"], HYPERS["beta2"]),
        eps=HYPERS["eps"],
        weight_decay=HYPERS["weight_decay"],
        amsgrad=options.get("amsgrad", False),
        maximize=options.get("maximize", False),
        decoupled=not coupled,
    )
    for i in range(len(before[0])):
        of = [oracle.wide(s[i]) for s in before[:5]]
        start = oracle.Streams(of[0], of[2], of[3], of[4] if told.amsgrad else None)
        exact = oracle.step(start, of[1] / grad_scale, step_, told)
        allowed = oracle.bounds(exact, told, *(real_dtype(before[s][i].dtype) for s in (0, 2)))
        pairs = {0: "param", 2: "exp_avg", 3: "exp_avg_sq"}
        pairs |= {4: "max_exp_avg_sq"} if told.amsgrad else {}
        for s, name in pairs.items():
            error = np.abs(oracle.wide(after[s][i]) - getattr(exact.after, name))
            assert (error <= getattr(allowed, name)).all(), f"{name} of tensor {i}"
