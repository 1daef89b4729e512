"""Whether a device can run the CUDA kernels is asked of the device itself, once."""

import pytest
import torch
from torch.nn import Parameter

import warpstep
from support.environment import EMULATED
from warpstep import backends

REASONS = {
    "EMULATED_LOADING": ("209", "the CUDA kernels do not load there"),  # no image for the device
    "EMULATED_DRIVER": ("12000", r"its driver's CUDA 12\.0"),
    "EMULATED_CAPABILITY": ("6", r"its is 6\.x"),
}


@pytest.fixture
def asked(backend, monkeypatch):
    """Devices that were asked; what an earlier test was told is forgotten."""
    if backend != "cuda" or not EMULATED:
        pytest.skip("pretends failures of the emulated CUDA runtime")
    module, _ = backends.native()
    devices, ask = [], module.cuda_device_reason
    monkeypatch.setattr(
        module, "cuda_device_reason", lambda index: devices.append(index) or ask(index)
    )
    backends._asked_device.cache_clear()
    yield devices
    backends._asked_device.cache_clear()


def step(backend):
    param = Parameter(torch.ones(2))
    param.grad = torch.ones(2)
    warpstep.AdamW([param], backend=backend).step()


@pytest.mark.parametrize("fact", REASONS)
def test_a_device_that_cannot_run_the_kernels_says_why(backend, asked, monkeypatch, fact):
    value, reason = REASONS[fact]
    monkeypatch.setenv(fact, value)
    for _ in range(2):
        with pytest.raises(backends.BackendUnavailableError, match=reason):
            step(backend)
    assert asked == [0]
    assert reason.replace("\\", "") in warpstep.status().unavailable["cpu", "cuda"]


@pytest.mark.parametrize("fact", [None, *REASONS])
def test_triton_serves_such_a_gpu(backend, asked, monkeypatch, fact):
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda index: (9, 0))
    if fact is not None:
        monkeypatch.setenv(fact, REASONS[fact][0])
    gpu = torch.device("cuda", 0)
    assert backends.choose("auto", gpu) == ("cuda" if fact is None else "triton")
    assert backends.choose("auto", gpu) == ("cuda" if fact is None else "triton")
    assert asked == [0]
    assert not backends.unavailable_reason("cuda", gpu, in_use=False)


def test_a_step_asks_once(backend, asked):
    for _ in range(3):
        step(backend)
    assert asked == [0]
