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
def entered(backend, monkeypatch):
    """The devices that were made current. GPU 1 was, until then, and where none is, it is again."""
    if backend != "cuda" or not EMULATED:
        pytest.skip("pretends two GPUs of the emulated CUDA runtime")
    devices = []

    class Device:
        def __init__(self, index):
            self.index = index

        def __enter__(self):
            devices.append(self.index)
            os.environ["EMULATED_DEVICE"] = str(self.index)

        def __exit__(self, *exception):
            assert exception == (None, None, None)
            os.environ["EMULATED_DEVICE"] = "1"

    monkeypatch.setenv("EMULATED_DEVICE", "1")  # what a step leaves is put back, too
    monkeypatch.setattr(torch.cuda, "device", Device)
    backends._asked_device.cache_clear()
    yield devices
    backends._asked_device.cache_clear()
    assert os.environ["EMULATED_DEVICE"] == "1"


def made(**options):
    params = [Parameter(torch.ones(5)) for _ in range(3)]
    for param in params:
        param.grad = torch.full((5,), 0.5)
    return params, warpstep.AdamW(params, lr=0.1, backend="cuda", **options)


def test_a_step_and_a_norm(entered):
    params, optimizer = made(decay_form="min")
    norm = optimizer.clip_grad_norm_(1e9)
    optimizer.step()
    assert norm == pytest.approx((15 * 0.25) ** 0.5)
    assert params[0][0].item() == pytest.approx(0.8)  # a step of 0.1, and as much decay
    # Asked whether it can; the norm, the least magnitudes and the step.
    assert entered == [0] * 4


def test_lists(entered):
    """Their GPU is asked whether it captures a graph: here it does, and they lack tables there."""
    lists = streams()
    adamw_(*lists, **HYPERS, backend="cuda")
    assert entered[-1] == 0
    captured = ctypes.CDLL(backends.native()[0].__file__)
    captured.emulated_capture_begin()
    try:
        with pytest.raises(RuntimeError, match="a graph capture before"):
            adamw_(*streams(), **HYPERS, backend="cuda")
    finally:
        captured.emulated_capture_end()


def test_the_current_device_is_left_alone(entered, monkeypatch):
    monkeypatch.setenv("EMULATED_DEVICE", "0")
    _, optimizer = made()
    optimizer.step()
    monkeypatch.setenv("EMULATED_DEVICE", "1")
    assert entered == []


def test_what_cannot_be_made_current_is_not_stepped(entered, monkeypatch):
    params, optimizer = made()
    optimizer.step()
    before = [p.detach().clone() for p in params]

    class Refusing:
        def __init__(self, index):
            raise RuntimeError("no such device")

    monkeypatch.setattr(torch.cuda, "device", Refusing)
    with pytest.raises(RuntimeError, match="no such device"):
        optimizer.step()
    assert all(torch.equal(p, b) for p, b in zip(params, before, strict=True))
