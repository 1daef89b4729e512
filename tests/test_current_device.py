"""Launches go to the GPU that has the tensors, whichever is current; torch makes it so and back."""

import ctypes
import os

import pytest
import torch
from torch.nn import Parameter

import warpstep
from support.environment import EMULATED
from support.lists import HYPERS, streams
from warpstep import backends
from warpstep.functional import adamw_


@pytest.fixture
def exchanged(backend, monkeypatch):
    """The GPUs that torch was told to make the current one. GPU 1 is; GPU 0 has all tensors."""
    if backend != "cuda" or not EMULATED:
        pytest.skip("pretends two GPUs of the emulated CUDA runtime")
    devices = []

    def exchange(index):
        previous = int(os.environ["EMULATED_DEVICE"])
        os.environ["EMULATED_DEVICE"] = str(index)
        devices.append(index)
        return previous

    monkeypatch.setenv("EMULATED_DEVICE", "1")
    for name in ("_cuda_exchangeDevice", "_cuda_maybeExchangeDevice"):
        monkeypatch.setattr(torch._C, name, exchange, raising=False)
    backends._asked_device.cache_clear()
    yield devices
    backends._asked_device.cache_clear()
    assert os.environ["EMULATED_DEVICE"] == "1"


def made(**options):
    params = [Parameter(torch.ones(5)) for _ in range(3)]
    for param in params:
        param.grad = torch.full((5,), 0.5)
    return params, warpstep.AdamW(params, lr=0.1, backend="cuda", **options)


def test_a_step_and_a_norm(exchanged):
    params, optimizer = made(decay_form="min")
    norm = optimizer.clip_grad_norm_(1e9)
    optimizer.step()
    assert norm == pytest.approx((15 * 0.25) ** 0.5)
    assert params[0][0].item() == pytest.approx(0.8)  # a step of 0.1, and as much decay
    # Whether it can is asked; then the norm, the least magnitudes and the step.
    assert exchanged == [0, 1] * 4


def test_lists(exchanged):
    """Their GPU is asked whether it captures a graph: here it does, and they lack tables there."""
    adamw_(*streams(), **HYPERS, backend="cuda")
    captured = ctypes.CDLL(backends.native()[0].__file__)
    captured.emulated_capture_begin()
    try:
        with pytest.raises(RuntimeError, match="a graph capture before"):
            adamw_(*streams(), **HYPERS, backend="cuda")
    finally:
        captured.emulated_capture_end()


def test_the_current_gpu_stays_so(exchanged, monkeypatch):
    monkeypatch.setenv("EMULATED_DEVICE", "0")
    _, optimizer = made()
    optimizer.step()
    monkeypatch.setenv("EMULATED_DEVICE", "1")
    assert exchanged == []


def test_nothing_is_stepped_on_a_gpu_that_cannot_be_made_current(exchanged, monkeypatch):
    params, optimizer = made()
    optimizer.step()
    before = [p.detach().clone() for p in params]

    def refuse(index):
        raise RuntimeError("no such GPU")

    monkeypatch.setattr(torch._C, "_cuda_exchangeDevice", refuse)
    with pytest.raises(RuntimeError, match="no such GPU"):
        optimizer.step()
    assert all(torch.equal(p, b) for p, b in zip(params, before, strict=True))
