"""torchao's CPUOffloadOptimizer with warpstep.AdamW stepping what it keeps on the CPU.

It needs a GPU for its streams and pinned memory. Without one these are stood in for, so that all
memory is the CPU's: what is tested is how it makes its optimizers, steps, saves and loads them.
"""

import contextlib
from types import SimpleNamespace

import pytest
import torch
from torch import nn

import warpstep
from support.tolerance import bound

cpu_offload = pytest.importorskip("torchao.optim.cpu_offload")
LR, STEPS = 0.01, 3


class WithoutGpu:
    """torch, with streams that do what is asked of them at once, and memory that is not pinned."""

    stream = SimpleNamespace(
        wait_stream=lambda other: None,
        synchronize=lambda: None,
        record_event=lambda: SimpleNamespace(synchronize=lambda: None),
    )
    cuda = SimpleNamespace(
        Stream=lambda: WithoutGpu.stream,
        current_stream=lambda: None,
        stream=lambda stream: contextlib.nullcontext(),
    )

    def __getattr__(self, name):
        return getattr(torch, name)

    def empty_like(self, tensor, *, pin_memory, **options):
        return torch.empty_like(tensor, **options)


@pytest.fixture(autouse=True)
def device(monkeypatch):
    if torch.cuda.is_available():
        return "cuda"
    monkeypatch.setattr(cpu_offload, "torch", WithoutGpu())
    monkeypatch.setattr(cpu_offload, "get_available_devices", lambda: ["cpu", "cuda"])
    return "cpu"


def make(cls, device, dtype=torch.float32, **options):
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(64, 80), nn.Linear(80, 64)).to(device, dtype)
    options = {"lr": LR, "weight_decay": 0.1, **options}
    return model, cpu_offload.CPUOffloadOptimizer(model.parameters(), cls, **options)


def train(model, optimizer, steps):
    """Gradients that depend on the data alone: see NOTE [same gradients] in training.py."""
    for step in steps:
        generator = torch.Generator().manual_seed(step)
        for p in model.parameters():
            factor = torch.randn(p.shape, generator=generator).to(p)
            (p * factor).sum().backward()
        optimizer.step()
        optimizer.zero_grad()
    return [p.detach().clone() for p in model.parameters()]


def test_offloaded(device):
    """Weights on the CPU, of 5,120 elements each, and biases, which it leaves where they are."""
    ours = train(*make(warpstep.AdamW, device), range(STEPS))
    theirs = train(*make(torch.optim.AdamW, device, fused=True), range(STEPS))
    for mine, other in zip(ours, theirs, strict=True):
        torch.testing.assert_close(mine, other, rtol=0, atol=bound(STEPS, LR, other))


@pytest.mark.parametrize("recipe", [{}, {"master": "residual", "state_dtype": "8bit"}], ids=str)
def test_resumed(device, recipe):
    """A run that is saved and loaded goes on bit for bit, bfloat16 with exact masters too."""
    dtype = torch.bfloat16 if recipe else torch.float32
    model, optimizer = make(warpstep.AdamW, device, dtype, **recipe)
    train(model, optimizer, range(STEPS))
    other, resumed = make(warpstep.AdamW, device, dtype, **recipe)
    other.load_state_dict(model.state_dict())
    for param, host in resumed.param_d2h_map.items():
        host.copy_(param.detach())
    resumed.load_state_dict(optimizer.state_dict())
    more = range(STEPS, 2 * STEPS)
    ours, theirs = train(model, optimizer, more), train(other, resumed, more)
    assert all(map(torch.equal, ours, theirs))
