"""How far parameters may be apart that two implementations have stepped.

NOTE [tolerance]
The two implementations run the same formula and differ in roundings only. Let ulp be the spacing
of the format that values are stored in, relative to 1. In one step, torch rounds p three times (the
decay factor, the decay, the update) and warpstep once: together 2 ulp of |p|. The update is at most
lr * R with R = |mhat| / sqrt(vhat) <= sqrt(t) (Cauchy-Schwarz, for weights of v that are nearly
equal, as for t << 1 / (1 - beta2)); some ten roundings make it (three of m and three of v, square
root, eps, division, product) in each of the two, so 10 ulp, and as m and v carry the errors of
earlier steps, t ulp more. Over n steps:

    |difference| <= n * ulp * (2 |p| + sqrt(n) * lr * (10 + n))
"""

import math

import torch


def bound(steps, lr, param, dtype=None):
    """See NOTE [tolerance]. The format is the parameter's, or `dtype`."""
    ulp = torch.finfo(dtype or param.dtype).eps
    size = param.detach().abs().max().item() if param.numel() else 0
    return steps * ulp * (2 * size + math.sqrt(steps) * lr * (10 + steps))


def assert_same_params(ours, theirs, steps, lr):
    for p, q in zip(ours, theirs, strict=True):
        torch.testing.assert_close(p.detach(), q.detach(), rtol=0, atol=bound(steps, lr, q))
