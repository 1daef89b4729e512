"""Loading and storing bfloat16 and float16: every pattern read, every kind of rounding written."""

import numpy as np
import pytest
import torch
from torch.nn import Parameter

import warpstep
from support.environment import INTERPRETED

HALVES = [torch.bfloat16, torch.float16]


@pytest.mark.parametrize("dtype", HALVES)
def test_every_16_bit_pattern_is_read_and_written_back(backend, device, dtype):
    """With nothing to add, a step stores what it loaded; a NaN stays one."""
    patterns = torch.arange(-(2**15), 2**15, dtype=torch.int32).to(torch.int16)
    values = patterns.view(dtype)
    param = Parameter(values.clone().to(device))
    param.grad = torch.zeros_like(param)
    warpstep.AdamW([param], lr=0.0, weight_decay=0.0, backend=backend).step()
    result = param.detach().cpu()
    assert torch.equal(result.isnan(), values.isnan())
    kept = ~values.isnan()
    # p - 0 * ... is +0 for p = +0 and -0 for p = -0, as in torch.
    assert torch.equal(result.view(torch.int16)[kept], patterns[kept])


def float32_values():
    """A million random float32 patterns, and all midpoints and neighbours of both formats."""
    patterns = 2**16 if INTERPRETED else 2**20
    random = np.random.default_rng(0).integers(0, 2**32, patterns, dtype=np.uint32)
    numbers = [random.view(np.float32)]
    for dtype in HALVES:
        positive = torch.arange(0, 2**15, dtype=torch.int32).to(torch.int16).view(dtype)
        grid = positive[positive.isfinite()].float().numpy()
        middle = (grid[:-1].astype(np.float64) + grid[1:]) / 2
        for value in (grid, middle.astype(np.float32)):
            numbers += [np.nextafter(value, np.float32(np.inf)), value, -value]
            numbers += [np.nextafter(value, np.float32(-np.inf))]
    numbers.append(np.float32([65504, 65519.99, 65520, 3.38e38, 3.4e38, np.finfo("f4").max]))
    return torch.from_numpy(np.concatenate(numbers))


@pytest.mark.parametrize("dtype", HALVES)
def test_storing_rounds_to_nearest_even(backend, device, dtype):
    """With beta1 = 0 the first moment is the gradient: float32 in, 16 bits out, as torch casts."""
    values = float32_values()
    values = values[values.isfinite() & (values != 0)]  # 0 * m + -0 is +0
    param = Parameter(torch.zeros(values.numel(), dtype=dtype, device=device))
    param.grad_dtype = torch.float32
    param.grad = values.to(device)
    optimizer = warpstep.AdamW([param], betas=(0.0, 0.5), backend=backend)
    optimizer.step()
    stored = optimizer.state[param]["exp_avg"].cpu()
    assert torch.equal(stored.view(torch.int16), values.to(dtype).view(torch.int16))


@pytest.mark.parametrize("dtype", HALVES)
def test_a_nan_of_any_pattern_is_stored_as_one(backend, device, dtype):
    """Rounding must not carry a NaN's bits over into a number: 0x7fffffff into -0."""
    patterns = [0x7FFFFFFF, 0x7FC00000, 0x7F800001, 0x7FFF8000, 0xFFFFFFFF, 0xFF800001]
    values = torch.from_numpy(np.array(patterns, dtype=np.uint32).view(np.float32))
    param = Parameter(torch.zeros(len(patterns), dtype=dtype, device=device))
    param.grad_dtype = torch.float32
    param.grad = values.to(device)
    optimizer = warpstep.AdamW([param], betas=(0.0, 0.5), backend=backend)
    optimizer.step()
    state = optimizer.state[param]
    for stored in (param.detach(), state["exp_avg"], state["exp_avg_sq"]):
        assert stored.isnan().all()
