"""DistributedDataParallel and FSDP2 (fully_shard) in two processes on gloo."""

import functools

import pytest
import torch
from torch.distributed.checkpoint.state_dict import StateDictOptions, get_optimizer_state_dict
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor
from torch.nn.parallel import DistributedDataParallel

import warpstep
from training import (
    OPTIONS,
    SideBySide,
    assert_agree,
    assert_same_bits,
    batches,
    calls_taken,
    launches,
    on_two_ranks,
    train,
    weights,
)

STEPS = 4


def replicated(model):
    return DistributedDataParallel(model)


def sharded(model):
    mesh = init_device_mesh("cpu", (2,))
    for part in model.parts:
        fully_shard(part, mesh=mesh)
    return fully_shard(model, mesh=mesh)


def run(rank, wrap, cls, **options):
    model = SideBySide()
    wrapped = wrap(model)
    optimizer = cls(wrapped.parameters(), **OPTIONS, **options)
    train(wrapped, optimizer, batches(STEPS, rank=rank, ranks=2))
    return model, optimizer


def torch_run(rank, wrap):
    model, _ = run(rank, wrap, torch.optim.AdamW, fused=True)
    return weights(model)


def enabled_worker(wrap, rank):
    theirs = torch_run(rank, wrap)
    with calls_taken(STEPS):
        ours = torch_run(rank, wrap)
    return ours, theirs


def ddp_worker(rank):
    theirs = torch_run(rank, replicated)
    with launches(STEPS):
        model, optimizer = run(rank, replicated, warpstep.AdamW)
    assert [len(bucket.entries) for bucket in optimizer.plan.buckets] == [len(theirs)]
    return weights(model), theirs


def fsdp_worker(rank):
    theirs = torch_run(rank, sharded)
    with launches(STEPS):
        model, optimizer = run(rank, sharded, warpstep.AdamW)
    assert [len(bucket.entries) for bucket in optimizer.plan.buckets] == [len(theirs)]
    assert type(optimizer) is warpstep.AdamW
    assert all(isinstance(p, DTensor) for p in model.parameters())
    for p in model.parameters():
        state = optimizer.state[p]
        assert state["step"] == STEPS
        for key in ("exp_avg", "exp_avg_sq"):
            assert isinstance(state[key], DTensor)
            assert state[key].placements == p.placements
    options = StateDictOptions(full_state_dict=True)
    saved = get_optimizer_state_dict(model, optimizer, options=options)
    if rank == 0:  # the others get nothing
        shapes = {name: state["exp_avg"].shape for name, state in saved["state"].items()}
        assert shapes == {name: p.shape for name, p in theirs.items()}
    return weights(model), theirs


def tail_worker(rank):
    """Clipped to torch's norm, averaged as the whole weights would be, and counted."""
    torchs, ours = SideBySide(), SideBySide()
    theirs = torch.optim.AdamW(sharded(torchs).parameters(), **OPTIONS, fused=True)
    wrapped = sharded(ours)
    optimizer = warpstep.AdamW(wrapped.parameters(), **OPTIONS, ema_decay=0.5, stats=True)
    averages = {}
    for batch in batches(STEPS, rank=rank, ranks=2):
        for model, one in ((torchs, theirs), (wrapped, optimizer)):
            one.zero_grad()
            model(**batch)["loss"].backward()
        expected = torch.nn.utils.clip_grad_norm_(torchs.parameters(), 0.05).full_tensor()
        norm = optimizer.clip_grad_norm_(0.05)
        assert norm > 0.05
        torch.testing.assert_close(norm, expected, rtol=1e-6, atol=0)
        theirs.step()
        optimizer.step()
        for name, p in weights(ours).items():
            averages[name] = (averages.get(name, p) + p) / 2
    found = optimizer.statistics()
    assert found.nonfinite.eq(0).all()
    norms = torch.stack([p.full_tensor().detach().norm() for p in ours.parameters()])
    torch.testing.assert_close(found.param_norm, norms, rtol=1e-6, atol=0)
    with optimizer.swap_ema():
        for name, p in weights(ours).items():
            torch.testing.assert_close(p, averages[name], rtol=1e-6, atol=1e-8)
    return weights(ours), weights(torchs)


def sharded_whole(model):
    """The root module has all parameters, and keeps them gathered after a forward pass."""
    return fully_shard(model, mesh=init_device_mesh("cpu", (2,)))


def kept_gathered(model):
    for part in model.parts:
        fully_shard(part, mesh=init_device_mesh("cpu", (2,)), reshard_after_forward=False)
    return fully_shard(model, mesh=init_device_mesh("cpu", (2,)))


@torch.no_grad()
def loss_of(model, batch):
    return model(**batch)["loss"].clone()


def evaluated_worker(wrap, rank):
    """Forward passes compute with what the parameters are then, whatever was gathered before."""
    model, optimizer = run(rank, wrap, warpstep.AdamW, ema_decay=0.9)
    batch = batches(1)[0]
    before = loss_of(model, batch)
    with optimizer.swap_ema():
        inside = loss_of(model, batch)
    after = loss_of(model, batch)
    assert after == before != inside

    averages = optimizer.ema_state_dict(model)
    plain = SideBySide(seed=3)
    plain.load_state_dict({name: value.full_tensor() for name, value in averages.items()})
    assert inside == loss_of(plain, batch)
    return weights(model)


@pytest.mark.parametrize("wrap", [sharded, sharded_whole, kept_gathered], ids=lambda f: f.__name__)
def test_evaluated_with_averages(wrap, tmp_path):
    on_two_ranks(functools.partial(evaluated_worker, wrap), tmp_path)


def assert_ranks_agree(worker, folder):
    (ours, theirs), (twin, _) = on_two_ranks(worker, folder)
    assert_same_bits(ours, twin)
    assert_agree(ours, theirs, STEPS)


def test_ddp(tmp_path):
    assert_ranks_agree(ddp_worker, tmp_path)


def test_fsdp2(tmp_path):
    assert_ranks_agree(fsdp_worker, tmp_path)


def test_fsdp2_with_the_tail(tmp_path):
    assert_ranks_agree(tail_worker, tmp_path)


def test_ddp_enabled(tmp_path):
    assert_ranks_agree(functools.partial(enabled_worker, replicated), tmp_path)


def test_fsdp2_enabled(tmp_path):
    assert_ranks_agree(functools.partial(enabled_worker, sharded), tmp_path)


def local(tensor):
    return tensor.to_local() if isinstance(tensor, DTensor) else tensor


def average_worker(wrap, rank):
    model, optimizer = run(rank, wrap, warpstep.AdamW, ema_decay=0.5)
    found = optimizer.ema_state_dict(model)
    with optimizer.swap_ema():
        averages = weights(model)
        expected = model.state_dict()
        assert found.keys() == expected.keys()
        for key, value in expected.items():
            assert type(found[key]) is type(value)
            assert torch.equal(local(found[key]), local(value))
    other = SideBySide(seed=3)
    wrap(other)
    other.load_state_dict(found)
    assert_same_bits(weights(other), averages)
    assert not torch.equal(averages["parts.0.weight"], weights(model)["parts.0.weight"])


@pytest.mark.parametrize("wrap", [replicated, sharded], ids=lambda wrap: wrap.__name__)
def test_a_state_dict_of_averages(wrap, tmp_path):
    on_two_ranks(functools.partial(average_worker, wrap), tmp_path)
