"""Triton steps without the native module, as where no C++ compiler was found: the same bits."""

import pytest
import torch
from torch.nn import Parameter

import warpstep
from support.environment import INTERPRETED
from warpstep import backends

pytestmark = pytest.mark.skipif(
    not INTERPRETED, reason="runs in Triton's interpreter, in a process of test_elsewhere.py"
)

CASES = {
    "plain": {},
    "amsgrad": {"amsgrad": True},
    "average": {"ema_decay": 0.9},
    "clipped": {"clips": True},
    "zeroed": {"zero_grads": True},
    "unscaled": {"clips": True, "unscale_grads": True},
    "statistics": {"stats": True},
    "min": {"decay_form": "min"},
}


@pytest.fixture
def without_native(monkeypatch):
    def take_away():
        monkeypatch.setattr(backends, "native", lambda: (None, "taken away"))

    return take_away


def model():
    generator = torch.Generator().manual_seed(0)

    def numbers(*shape):
        return torch.randn(shape, generator=generator)

    params = [Parameter(numbers(*shape)) for shape in [(5, 3), (2049,), (), (0,)]]
    for param in params:
        param.grad = numbers(*param.shape)
    params[0].grad = numbers(3, 5).t()  # laid out otherwise than its parameter
    params.append(Parameter(numbers(4)))  # without a gradient
    return params


def run(zero_grads=False, clips=False, **options):
    params = model()
    optimizer = warpstep.AdamW(params, backend="triton", **options)
    seen = []
    for _ in range(3):
        if clips:
            seen.append(optimizer.clip_grad_norm_(0.5))
        optimizer.step(zero_grads=zero_grads)
        if optimizer.stats:
            seen.append(optimizer.statistics().update_norm)
    state = [t for p in params for t in optimizer.state.get(p, {}).values()]
    grads = [p.grad for p in params if p.grad is not None]
    versions = [t._version for t in (*params, *grads)]
    assert all(bucket.backend == "triton" for bucket in optimizer.plan.buckets)
    return [p.detach() for p in params] + state + grads + seen, versions


@pytest.mark.parametrize("case", CASES.values(), ids=CASES)
def test_triton_gives_the_same_bits(without_native, case):
    expected, _ = run(**case)
    without_native()
    tensors, versions = run(**case)
    assert len(tensors) == len(expected)
    assert all(torch.equal(a, b) for a, b in zip(tensors, expected, strict=True))
    assert all(version > 0 for version in versions[:4])  # autograd is told


def test_triton_sees_what_happens_to_clipped_gradients(without_native):
    without_native()
    params = model()
    optimizer = warpstep.AdamW(params, backend="triton")
    optimizer.clip_grad_norm_(0.5)
    params[1].grad.mul_(2)
    with pytest.raises(RuntimeError, match=r"of the 4 that were measured, 0 were replaced and 1 w"):
        optimizer.step()
    optimizer.zero_grad()
    for param in params:
        param.grad = torch.ones_like(param)
    assert optimizer.clip_grad_norm_(1.0) > 1
    optimizer.step()
