"""What comes from a GPU to the CPU, which has to wait for it: seen on fake tensors."""

import pytest
import torch
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode

from warpstep.norms import combined_norm, norm_of_norms
from warpstep.reference import constants_of
from warpstep.rules import ADAMW
from warpstep.statistics import statistics_of
from warpstep.tail import Tail
from warpstep.transfers import brought

CPU, CUDA = torch.device("cpu"), torch.device("cuda:0")


class Copies(TorchDispatchMode):
    """Notes which copies between devices were made, and whether the host waited for them."""

    def __init__(self):
        super().__init__()
        self.made = []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        if func is torch.ops.aten._to_copy.default:
            to = kwargs.get("device") or args[0].device
            if to.type != args[0].device.type:
                self.made.append((to.type, not kwargs.get("non_blocking", False)))
        return func(*args, **kwargs)


@pytest.fixture
def copies():
    """Copies of what is made meanwhile, on the CPU or on a GPU that there need not be."""
    with FakeTensorMode(), Copies() as found:
        yield found


def scalar(device, dtype=torch.float32):
    return torch.ones((), dtype=dtype, device=device)


WAYS = {
    "one tensor": lambda a, b: brought(scalar(a), b),
    "one tensor in another dtype": lambda a, b: brought(scalar(a), b, torch.float64),
    "shares of a norm": lambda a, b: combined_norm([scalar(b), scalar(a)], 2.0),
    "norms": lambda a, b: norm_of_norms([scalar(b), scalar(a)], 3.0),
    "what a tail asks for": lambda a, b: Tail(clip_coef=scalar(a)).on(b),
    "statistics": lambda a, b: statistics_of(
        [scalar(b), scalar(a)], [torch.ones((1, 4), device=b), torch.ones((1, 4), device=a)]
    ),
    "hyper-parameters": lambda a, b: constants_of(
        {"lr": scalar(a), "betas": (0.9, 0.99), "eps": 1e-8, "weight_decay": 0.0},
        ADAMW,
        scalar(b),
        b,
        torch.float32,
        on_host=False,
    ),
}


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize(("source", "to"), [(CUDA, CPU), (CPU, CUDA)], ids=["to-cpu", "to-cuda"])
def test_the_host_waits_for_what_comes_to_it_alone(copies, way, source, to):
    WAYS[way](source, to)
    waited = {waits for device, waits in copies.made if device == to.type}
    assert waited == {to == CPU}


def test_statistics_are_on_the_first_parameters_device(copies):
    """Also where a first parameter without gradient has its row from the host."""
    tables = [torch.ones((1, 4), device=CPU), torch.ones((1, 4), device=CUDA)]
    found = statistics_of([scalar(CUDA), scalar(CUDA)], tables)
    assert {x.device for x in (found.grad_norm, found.nonfinite)} == {CUDA}
    assert copies.made == [("cuda", False)]
