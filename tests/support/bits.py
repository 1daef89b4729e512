"""Bits of tensors and optimizers, and optimizers that have taken the same steps on each backend."""

import torch
from torch.nn import Parameter

from support.parameters import params_of
from support.recipes import OPTIONS, make, optimizer_for, set_grad

SIZES = (1, 5, 16, 100, 16384, 20011)
INT_OF_SIZE = {8: torch.int64, 4: torch.int32, 2: torch.int16}


def bits(tensor):
    """NaNs count as one value. What are no numbers of torch's are bits already."""
    tensor = tensor.detach().cpu()
    if not tensor.is_floating_point():
        return tensor
    tensor = torch.where(tensor.isnan(), torch.full_like(tensor, float("nan")), tensor)
    return tensor.contiguous().view(INT_OF_SIZE[tensor.element_size()])


def raw_bits(tensor):
    """Each NaN as itself."""
    return tensor.detach().clone().flatten().view(torch.uint8).cpu()


def assert_same_bits(first, second):
    """Of two optimizers' parameters and states, in order; NaNs count as one value."""
    for p, q in zip(params_of(first), params_of(second), strict=True):
        assert torch.equal(bits(p), bits(q))
        for key, value in first.state[p].items():
            assert torch.equal(bits(value), bits(second.state[q][key])), key


def assert_same(a, b):
    """Equal structure, bits, dtypes and devices. A NaN equals nothing."""
    torch.testing.assert_close(a, b, rtol=0, atol=0)


def train(recipe, options, backend, device, steps=3, sizes=SIZES, groups_of=lambda ps: ps):
    """An optimizer that has taken `steps` steps on data that depend on the arguments only."""
    generator = torch.Generator().manual_seed(0)
    params = [Parameter(make(n, recipe[0], device, generator)) for n in sizes]
    optimizer = optimizer_for(groups_of(params), options, recipe, backend)
    for t in range(steps):
        for param in params:
            # Every magnitude, subnormal numbers and overflow included.
            scale = 10.0 ** torch.randint(-30, 20, (param.numel(),), generator=generator)
            grad = torch.randn(param.numel(), generator=generator) * (scale if t == 1 else 1)
            set_grad(param, grad.to(device, recipe[1]))
        optimizer.step()
    return optimizer


def train_tail(recipe, backend, device):
    """Two steps with all that can go into the pass. The inf-norm has the same bits everywhere."""
    generator = torch.Generator().manual_seed(0)
    params = [Parameter(make(n, recipe[0], device, generator)) for n in (0, 3, 1000, 20_011)]
    options = OPTIONS["cautious-decay"]
    optimizer = optimizer_for(params, options, recipe, backend, ema_decay=0.7, stats=True)
    for _ in range(2):
        for param in params:
            set_grad(param, make(param.shape, recipe[1], device, generator))
        optimizer.clip_grad_norm_(1e9)  # whose sums have not
        optimizer.clip_grad_norm_(0.5, float("inf"))
        optimizer.step(zero_grads=True)
        assert all(not param.grad.any() for param in params)
        assert optimizer.statistics().nonfinite.sum() == 0
    return optimizer
