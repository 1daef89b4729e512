"""Modes that remember what they see, and optimizers with every option that a mode meets."""

import torch
from torch.nn import Parameter
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode

import warpstep
from support.parameters import params_of, random, set_grads

SHAPES = [(3,), (4, 5), (0,), ()]
LR = 1e-2
# What the operators express: the same kernels, the same bits.
BY_OPERATOR = {
    "adamw": {},
    "adam": {"kind": warpstep.Adam, "weight_decay": 0.1},
    "amsgrad": {"amsgrad": True},
    "maximize": {"maximize": True, "weight_decay": 0.1},
    "fused": {"fused": True},
    "capturable": {"capturable": True},
    "lr a tensor": {"lr": torch.tensor(LR)},
    "bfloat16": {"dtype": torch.bfloat16},
    "moments of float32": {"dtype": torch.bfloat16, "state_dtype": torch.float32},
    "complex": {"dtype": torch.complex64},
    "coupled": {"decay_form": "coupled", "weight_decay": 0.1},
}
# What they do not: the reference's operations, seen one by one.
BY_REFERENCE = {
    "reference": {"backend": "reference"},
    "independent": {"decay_form": "independent", "weight_decay": 0.1},
    "l1": {"decay_form": "l1", "weight_decay": 0.1},
    "cautious": {"decay_form": "cautious", "weight_decay": 0.1},
    "min": {"decay_form": "min"},
    "ema": {"ema_decay": 0.5},
    "ema of float32": {"ema_decay": 0.5, "dtype": torch.bfloat16},
    "stats": {"stats": True},
    "betas that are tensors": {"betas": (torch.tensor(0.9), torch.tensor(0.99))},
}
ALL = {**BY_OPERATOR, **BY_REFERENCE}


class Dispatched(TorchDispatchMode):
    """Remembers the operators that are dispatched."""

    def __init__(self):
        super().__init__()
        self.seen = []

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        self.seen.append(str(function))
        return function(*args, **(kwargs or {}))


class Called(TorchFunctionMode):
    """Remembers the functions of torch that are called."""

    def __init__(self):
        super().__init__()
        self.seen = []

    def __torch_function__(self, function, types, args=(), kwargs=None):
        self.seen.append(str(function))
        return function(*args, **(kwargs or {}))


def optimizer_of(kind=warpstep.AdamW, dtype=torch.float32, shapes=SHAPES, **options):
    params = [Parameter(random(shape, i, dtype=dtype)) for i, shape in enumerate(shapes)]
    groups = [{"params": params[:2]}, {"params": params[2:], "lr": 2 * LR}]
    return kind([group for group in groups if group["params"]], **{"lr": LR, **options})


def give_gradients(optimizer, step):
    set_grads(params_of(optimizer), step)


def tensors_of(optimizer):
    """Parameters and state, by name."""
    named = {}
    for i, p in enumerate(params_of(optimizer)):
        named[f"param {i}"] = p.detach()
        named.update({f"{key} {i}": t for key, t in optimizer.state[p].items()})
    return named


def assert_same_tensors(a, b):
    ours, theirs = tensors_of(a), tensors_of(b)
    assert list(ours) == list(theirs)
    for name, tensor in ours.items():
        assert torch.equal(tensor, theirs[name]), name
