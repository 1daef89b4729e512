"""Low-precision lists for warpstep.functional, which hold what an optimizer of them has."""

import torch

import warpstep
from support.lists import HYPERS
from support.low_precision import BF16, RECIPES, key_in, moments_of, new_params
from support.parameters import params_of, random
from support.recipes import set_grad

CLASS = {"lr": 1e-2, "betas": (0.9, 0.99), "weight_decay": 0.1, "eps": 1e-8, "seed": 2**63 + 5}
SHAPES = [(64, 64), (65, 128), (17,), (0,), ()]


def stepped(kind, backend, device, steps=2, shapes=SHAPES, dtype=BF16, copies=None, **options):
    """An optimizer that has taken some steps."""
    params = new_params(dtype, shapes, device)
    to = None if copies is None else [torch.zeros_like(p, dtype=copies) for p in params]
    optimizer = kind(params, **options, copies=to, backend=backend)
    for step in range(steps):
        give_grads(optimizer, step)
        optimizer.step()
    return optimizer


def give_grads(optimizer, step, dtype=None):
    for i, p in enumerate(params_of(optimizer)):
        p.grad = None
        set_grad(p, random(p.shape, 100 * step + i, p.device).to(dtype or p.dtype))


def lists_of(optimizer):
    """Clones of what an optimizer has, as arguments by name; gradients apart."""
    params, moments = params_of(optimizer), {}
    states = [optimizer.state[p] for p in params]
    for key in moments_of(states[0]):
        moments[f"{key}s"] = [s[key_in(s, key)].clone() for s in states]
        if any(f"{key}_scale" in s for s in states):  # else nothing has 8 bits
            none = torch.zeros(0, device=params[0].device)
            moments[f"{key}_scales"] = [s.get(f"{key}_scale", none).clone() for s in states]
    found = {"params": [p.detach().clone() for p in params], **moments}
    found["state_steps"] = [s["step"].clone() for s in states if "step" in s]
    if "master_param" in states[0]:
        found["residuals"] = [s["master_param"].clone() for s in states]
    if optimizer.copies:
        found["copies"] = [optimizer.copies[p].clone() for p in params]
    return found


def grads_of(optimizer):
    return [p.grad.clone() for p in params_of(optimizer)]


def rounding_of(recipe, has_squares=True):
    """What an optimizer's options round: see warpstep.functional.adamw_."""
    if recipe.get("rounding") is None and recipe.get("state_dtype") and has_squares:
        return "stochastic_exp_avg_sq"
    return recipe.get("rounding")


def operator_arguments(recipe="residual-8bit"):
    optimizer = stepped(
        warpstep.AdamW, "cpu", "cpu", steps=1, shapes=[(64, 64), (3,)], **CLASS, **RECIPES[recipe]
    )
    lists, grads = lists_of(optimizer), grads_of(optimizer)
    names = ("params", "exp_avgs", "exp_avg_sqs", "state_steps")
    params, exp_avgs, exp_avg_sqs, steps = (lists.pop(name) for name in names)
    options = {"rounding": rounding_of(RECIPES[recipe]), "seed": 7, "param_indices": [4, 9]}
    return (params, grads, exp_avgs, exp_avg_sqs, [], steps), {**HYPERS, **lists, **options}
