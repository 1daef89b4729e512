"""Recipes (dtypes of parameter, gradient, moments), options, and tensors and optimizers of them."""

import torch
from torch.nn import Parameter

import warpstep
from support.environment import INTERPRETED
from support.oracle import Options

F64, F32, BF16, F16 = torch.float64, torch.float32, torch.bfloat16, torch.float16
RECIPES = {
    "float64": (F64, F64, F64),
    "float32": (F32, F32, F32),
    "bfloat16": (BF16, BF16, BF16),
    "float16": (F16, F16, F16),
    "bfloat16-moments-float32": (BF16, BF16, F32),
    "float16-moments-float32": (F16, F16, F32),
    "bfloat16-grads-float32": (BF16, F32, BF16),
    "bfloat16-grads-moments-float32": (BF16, F32, F32),
    "float16-grads-float32": (F16, F32, F16),
    "float16-grads-moments-float32": (F16, F32, F32),
    "float32-moments-bfloat16": (F32, F32, BF16),
}
OPTIONS = {
    "default": Options(),
    "amsgrad": Options(amsgrad=True),
    "maximize": Options(maximize=True),
    "adam": Options(decoupled=False, weight_decay=0.1),
    "adam-amsgrad-maximize": Options(
        decoupled=False, weight_decay=0.1, amsgrad=True, maximize=True
    ),
    "no-decay": Options(weight_decay=0),
    "no-momentum": Options(betas=(0.0, 0.0)),
    "low-beta1": Options(betas=(0.3, 0.99)),
    "low-beta2": Options(betas=(0.9, 0.4)),
    "high-betas": Options(betas=(0.99, 0.99999), lr=1e-5),
    "large-eps": Options(eps=1e-2, lr=0.1, weight_decay=0.3),
    "independent-decay": Options(decay_form="independent", lr=2e-3, base_lr=0.1, weight_decay=0.1),
    "l1-decay": Options(decay_form="l1", lr=0.1, weight_decay=0.1),
    "cautious-decay": Options(decay_form="cautious", lr=0.1, weight_decay=0.3),
    "l1l2-decay": Options(decay_form="l1l2", lr=0.1, weight_decay=0.3),
    "min-decay": Options(decay_form="min", lr=0.1, weight_decay=0.3),
}
KERNELS = ("default", "amsgrad")  # those that are kernels of their own; others are read
# Around the edges of vectors.
SIZES = (0, 1, 2, 3, 4, 5, 7, 8, 9, 15, 16, 17, 31, 63, 64, 65, 127, 257, 1000, 1023)
# The edges of vectors, of the CPU's tiles and of chunks.
EDGES = (0, 1, 7, 64, 1023, 1024, 1025, 2049, 16_384, 40_001)
if INTERPRETED:  # at some 5 ms a tensor and chunk, in vectors of 16 elements and without tiles
    SIZES = (0, 1, 3, 15, 16, 17, 64, 257, 1023)
    EDGES = (0, 1, 7, 64, 1025, 16_384, 20_011)


def make(shape, dtype, device, generator, scale=1.0):
    return (torch.randn(shape, generator=generator) * scale).to(device=device, dtype=dtype)


def set_grad(param, grad):
    if grad.dtype != param.dtype:
        param.grad_dtype = grad.dtype
    param.grad = grad


def optimizer_for(groups, options, recipe, backend, **more):
    kind = warpstep.AdamW if options.decoupled else warpstep.Adam
    optimizer = kind(
        groups,
        lr=options.lr,
        betas=options.betas,
        eps=options.eps,
        weight_decay=options.weight_decay,
        amsgrad=options.amsgrad,
        maximize=options.maximize,
        state_dtype=None if recipe[2] == recipe[0] else recipe[2],
        rounding="nearest",  # at random, see support/low_precision.py
        decay_form=options.decay_form,
        backend=backend,
        **more,
    )
    for group in optimizer.param_groups if options.base_lr else ():
        group["base_lr"] = options.base_lr
    return optimizer


def model(recipe, device, sizes=EDGES, seed=0):
    """Parameters with gradients, and the generator that both are from."""
    generator = torch.Generator().manual_seed(seed)
    params = [Parameter(make(n, recipe[0], device, generator)) for n in sizes]
    give_gradients(params, recipe, generator)
    return params, generator


def give_gradients(params, recipe, generator, scale=1.0):
    for param in params:
        grad = make(param.shape, recipe[1], param.device, generator) * scale
        set_grad(param, grad.to(recipe[1]))
