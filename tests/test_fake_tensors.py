"""Tensors without values (fake, on the meta device), and default devices."""

import math
from contextlib import nullcontext
from types import SimpleNamespace

import pytest
import torch
from torch._subclasses.fake_tensor import FakeTensor, FakeTensorMode
from torch.nn import Parameter

import warpstep
from support.modes import (
    ALL,
    LR,
    SHAPES,
    Called,
    Dispatched,
    assert_same_tensors,
    give_gradients,
    optimizer_of,
    tensors_of,
)
from support.parameters import params_of
from warpstep import modes

FAKE_OPTIONS = {**ALL, "not fused": {"fused": False}}
FAKE_OPTIONS["lr a tensor"] = {"lr": "tensor"}  # made inside
FAKE_OPTIONS["betas that are tensors"] = {"betas": "tensors"}


@pytest.mark.parametrize("options", FAKE_OPTIONS.values(), ids=FAKE_OPTIONS)
def test_fake_tensors(options):
    """Everything made inside FakeTensorMode: steps run, and make the state that a real one has."""
    options = dict(options)
    if "lr" not in options and "betas" not in options:
        real = optimizer_of(**options)
        give_gradients(real, 0)
        real.step()
        expected = {name: (t.shape, t.dtype, t.stride()) for name, t in tensors_of(real).items()}
    else:
        expected = None
    with FakeTensorMode():
        if "lr" in options:
            options["lr"] = torch.tensor(LR)
        if "betas" in options:
            options["betas"] = (torch.tensor(0.9), torch.tensor(0.99))
        optimizer = optimizer_of(**options)
        give_gradients(optimizer, 0)
        for _ in range(2):
            norm = optimizer.clip_grad_norm_(1.0)
            optimizer.step()
            optimizer.step(zero_grads=True)
        found = tensors_of(optimizer)
        assert all(isinstance(t, FakeTensor) for t in (norm, *found.values()))
        shapes = {name: (t.shape, t.dtype, t.stride()) for name, t in found.items()}
        assert expected is None or shapes == expected
        if options.get("stats"):
            assert optimizer.statistics().grad_norm.shape == (len(SHAPES),)


@pytest.mark.parametrize("fused", [None, False])
def test_fake_tensors_outside_of_their_mode(fused):
    """As torch's for-loop steps them."""
    with FakeTensorMode():
        param = Parameter(torch.ones(3))
        param.grad = torch.ones(3)
    for kind in (torch.optim.AdamW, warpstep.AdamW):
        optimizer = kind([param], lr=LR, fused=fused, foreach=False if fused is None else None)
        for _ in range(2):
            optimizer.step()
        assert isinstance(optimizer.state[param]["exp_avg"], FakeTensor)
        assert optimizer.state[param]["step"] == 2


def on_meta(kind, **options):
    param = Parameter(torch.ones(3, device="meta"))
    param.grad = torch.ones(3, device="meta")
    return kind([param], lr=LR, **options), param


def test_fused_on_meta_raises_as_torch_does():
    theirs, _ = on_meta(torch.optim.AdamW, fused=True)
    with pytest.raises(RuntimeError) as expected:
        theirs.step()
    for mode in (Dispatched(), nullcontext()):
        ours, _ = on_meta(warpstep.AdamW, fused=True)
        with mode, pytest.raises(RuntimeError) as found:
            ours.step()
        assert str(found.value).startswith(str(expected.value))
        assert "parameter 0 of group 0" in str(found.value)
        assert not ours.state


@pytest.mark.parametrize(
    "options", [{}, {"fused": False}, {"ema_decay": 0.5, "stats": True}], ids=str
)
def test_meta_parameters(options):
    """As torch's: the counter is on the CPU and counts, all else is on the meta device."""
    theirs, other = on_meta(torch.optim.AdamW)
    ours, param = on_meta(warpstep.AdamW, **options)
    for optimizer in (ours, theirs):
        optimizer.step()
        optimizer.step()
    for key, tensor in theirs.state[other].items():
        assert ours.state[param][key].device == tensor.device
    assert ours.state[param]["step"] == theirs.state[other]["step"] == 2


def test_meta_parameters_with_a_state_that_is_there():
    """With fused=True torch steps these too: nothing is read on the host."""
    for kind in (torch.optim.AdamW, warpstep.AdamW):
        optimizer, param = on_meta(kind, fused=True)
        moments = {key: torch.zeros(3, device="meta") for key in ("exp_avg", "exp_avg_sq")}
        optimizer.state[param] = {"step": torch.zeros((), device="meta"), **moments}
        optimizer.step()
        assert optimizer.state[param]["step"].is_meta


@pytest.fixture(params=["with", "set_default_device"])
def meta_by_default(request):
    if request.param == "with":
        with torch.device("meta"):
            yield
    else:
        torch.set_default_device("meta")
        yield
        torch.set_default_device(None)


def everything(backend, device):
    """One of each call, from a first step on; what came of it."""
    shapes = [(5,), (3, 4), (0,)]
    cpu = torch.device("cpu")
    values = [torch.arange(math.prod(s), dtype=torch.float32, device=cpu) for s in shapes]
    params = [Parameter(v.reshape(s).to(device)) for v, s in zip(values, shapes, strict=True)]
    strided = torch.ones((3, 4), device=device)[:, ::2]
    params.append(Parameter(strided))  # by the reference, on every backend
    optimizer = warpstep.AdamW(
        params, lr=LR, backend=backend, stats=True, ema_decay=0.5, decay_form="independent"
    )
    norms = [optimizer.clip_grad_norm_(1.0)]  # of none
    for kind in (2.0, math.inf, 3.0):
        for p in params:
            p.grad = torch.ones_like(p) * kind if kind < 9 else torch.ones_like(p)
        norms.append(optimizer.clip_grad_norm_(1.0, kind))
        optimizer.step(zero_grads=True)
        found = optimizer.statistics()
        norms += [found.grad_norm, found.param_norm, found.update_norm, found.nonfinite]
    saved = optimizer.state_dict()
    for of_param in saved["state"].values():
        of_param["step"] = float(of_param["step"])  # as torch once saved it
    optimizer.load_state_dict(saved)
    for p in params:
        p.grad = torch.ones_like(p)
    optimizer.step()
    with optimizer.swap_ema():
        norms += [p.detach().clone() for p in params]
    return [t.cpu() for t in norms] + [t.cpu() for t in tensors_of(optimizer).values()]


def test_a_default_device_changes_nothing(backend, device, meta_by_default):
    """Tensors that warpstep makes are on the parameters' device, or the CPU."""
    found = everything(backend, device)
    with torch.device("cpu"):
        expected = everything(backend, device)
    for a, b in zip(found, expected, strict=True):
        assert torch.equal(a, b)


def test_a_default_device_is_no_watcher(meta_by_default):
    """Though it is a mode to torch, steps are launches, and functional calls kernels."""
    with torch.device("cpu"):
        optimizer = optimizer_of()
        give_gradients(optimizer, 0)
    assert not modes.are_active()
    optimizer.step()
    assert optimizer.plan.lasts
    with Called():
        assert modes.are_active()
    assert not modes.are_active()


def test_only_dtensors_are_sharded():
    """An attribute that is called as DTensor's is no shard."""
    import torch.distributed.tensor  # where there is a class to compare with

    optimizer, plain = optimizer_of(), optimizer_of()
    for step in range(2):
        for p in params_of(optimizer):
            p._spec = SimpleNamespace(mesh="mine", placements=("mine",))
            p._local_tensor = torch.zeros(1)
        for one in (optimizer, plain):
            give_gradients(one, step)
            one.step()
    assert_same_tensors(optimizer, plain)
    assert str(optimizer.plan) == str(plain.plan)
