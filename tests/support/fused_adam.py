"""What the tests of FusedAdam share: its kinds of parameters, gradients, and the truth."""

import torch
from torch.nn import Parameter

from warpstep.compat import FusedAdam

F32, BF16, F16 = torch.float32, torch.bfloat16, torch.float16
LR, DECAY, BETAS, EPS = 0.01, 0.1, (0.9, 0.99), 1e-8
SHAPES = ((5, 7), (64,), (0,), (), (3, 1, 4), (1100,))
# A parameter's dtype, and the options that say what is kept of it.
KINDS = {
    "float32": (F32, {}),
    "float32-own-master": (F32, {"master_weights": True}),
    "bfloat16-master": (BF16, {"master_weights": True}),
    "float16-master": (F16, {"master_weights": True}),
    "bfloat16-remainder": (BF16, {"master_weights": True, "store_param_remainders": True}),
}


def params_of(dtype, shapes=SHAPES, seed=0):
    generator = torch.Generator().manual_seed(seed)
    return [Parameter(torch.randn(shape, generator=generator).to(dtype)) for shape in shapes]


def grads_of(params, step, dtype=F32):
    generator = torch.Generator().manual_seed(1000 + step)
    return [torch.randn(p.shape, generator=generator).to(dtype) for p in params]


def fused_adam(params, **options):
    given = {"lr": LR, "weight_decay": DECAY, "betas": BETAS, "eps": EPS, **options}
    return FusedAdam(params, **given)


def take_steps(optimizer, steps, first=0, dtype=F32):
    """Steps with the gradients of each step under the name that the optimizer reads."""
    params = [p for group in optimizer.param_groups for p in group["params"]]
    for step in range(first, first + steps):
        for param, grad in zip(params, grads_of(params, step, dtype), strict=True):
            if optimizer.use_decoupled_grad:
                param.decoupled_grad = grad
            else:
                param.grad = grad.to(param.dtype)
        optimizer.step()


class Truth:
    """Kingma and Ba's formula in float64, with decoupled (Loshchilov and Hutter) or L2 decay."""

    def __init__(self, values, decoupled=True, corrected=True):
        self.p = [value.detach().double() for value in values]
        self.m = [torch.zeros_like(p) for p in self.p]
        self.v = [torch.zeros_like(p) for p in self.p]
        self.decoupled, self.corrected = decoupled, corrected

    def step(self, grads, t):
        beta1, beta2 = BETAS
        c1, c2 = (1 - beta1**t, 1 - beta2**t) if self.corrected else (1.0, 1.0)
        for p, m, v, grad in zip(self.p, self.m, self.v, grads, strict=True):
            g = grad.double()
            if not self.decoupled:
                g = g + DECAY * p
            m.mul_(beta1).add_((1 - beta1) * g)
            v.mul_(beta2).add_((1 - beta2) * g * g)
            if self.decoupled:
                p.mul_(1 - LR * DECAY)
            p.sub_(LR * (m / c1) / ((v / c2).sqrt() + EPS))


def bound_of(values, steps):
    """How far float32 steps may be from float64's.

    Each step rounds a parameter once (2^-24 of it, which its decay changes by less), and an update
    of at most 11 lr (without bias correction, its largest is lr * 0.1 / sqrt(0.01)) is wrong by
    some 16 roundings: of moments, which carry those of the steps before, a root and a quotient.
    """
    largest = max((value.abs().max().item() for value in values if value.numel()), default=0.0)
    return steps * 2.0**-24 * (2 * largest + 16 * steps * 11 * LR)
