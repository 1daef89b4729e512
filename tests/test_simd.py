"""The CPU's loops are SIMD code: one that is not takes several times as long as float32's."""

import time

import pytest
import torch
from torch.nn import Parameter

import warpstep
from support.environment import EMULATED, INTERPRETED

pytestmark = pytest.mark.skipif(EMULATED or INTERPRETED, reason="of the CPU's own kernels")

RULES = {
    "adamw": (warpstep.AdamW, {}),
    "amsgrad": (warpstep.AdamW, {"amsgrad": True}),
    "sgd": (warpstep.SGD, {}),
    "momentum": (warpstep.SGD, {"momentum": 0.9}),
    "nesterov": (warpstep.SGD, {"momentum": 0.9, "nesterov": True, "weight_decay": 0.1}),
}
# In the caches, an element takes up to 4.5 times as long as one of float32 in SIMD code (AdamW on
# float16, with statistics), and up to 12 times in a loop that is not.
MOST = 6
SIZE = 1 << 15


def optimizer_of(kind, dtype, options, **more):
    params = [Parameter(torch.randn(SIZE).to(dtype)) for _ in range(4)]
    for param in params:
        param.grad = torch.randn(SIZE).to(dtype)
    return kind(params, lr=1e-3, **options, **more, backend="cpu")


def seconds(step):
    start = time.perf_counter()
    for _ in range(5):
        step()
    return time.perf_counter() - start


@pytest.mark.parametrize("stats", [False, True], ids=["step", "statistics"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("rule", RULES)
def test_no_loop_takes_many_times_float32s(rule, dtype, stats):
    kind, options = RULES[rule]
    loops = (
        optimizer_of(kind, torch.float32, options),
        optimizer_of(kind, dtype, options, stats=stats),
    )
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        times = [[seconds(o.step) for o in loops] for _ in range(60)]
    finally:
        torch.set_num_threads(threads)
    least = [min(of) for of in zip(*times, strict=True)]  # what nobody disturbed
    assert least[1] <= MOST * least[0]
