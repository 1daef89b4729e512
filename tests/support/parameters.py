"""Parameters and gradients of given numbers, and steps with them: the same for two optimizers."""

import torch

SHAPES = [(5, 3), (), (17,)]


def random(shape, seed, device="cpu", dtype=torch.float32):
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(shape, generator=generator, dtype=dtype).to(device)


def new_params(shapes=SHAPES, device="cpu", dtype=torch.float32):
    return [random(s, i, device, dtype).requires_grad_() for i, s in enumerate(shapes)]


def params_of(optimizer):
    return [p for group in optimizer.param_groups for p in group["params"]]


def set_grads(params, step=0, *, skip=(), scale=1.0):
    """Gives the parameters the gradients of that step; those whose index is in `skip` get none."""
    for i, p in enumerate(params):
        seed = 1000 + 100 * step + i
        p.grad = None if i in skip else scale * random(p.shape, seed, p.device, p.dtype)


def take_steps(optimizer, steps):
    """Steps of these numbers, each with its gradients."""
    for step in steps:
        set_grads(params_of(optimizer), step)
        optimizer.step()
