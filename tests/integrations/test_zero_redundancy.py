"""torch's ZeroRedundancyOptimizer: each of two ranks steps its share of the parameters."""

import torch
from torch.distributed.optim import ZeroRedundancyOptimizer
from torch.nn.parallel import DistributedDataParallel

import warpstep
from training import (
    OPTIONS,
    SideBySide,
    assert_agree,
    assert_same_bits,
    batches,
    launches,
    on_two_ranks,
    train,
    weights,
)

STEPS = 4


def run(rank, cls, **options):
    model = DistributedDataParallel(SideBySide())
    optimizer = ZeroRedundancyOptimizer(model.parameters(), cls, **OPTIONS, **options)
    train(model, optimizer, batches(STEPS, rank=rank, ranks=2))
    return weights(model.module), optimizer


def replaced_worker(rank):
    model = DistributedDataParallel(SideBySide())
    optimizer = ZeroRedundancyOptimizer(
        model.parameters(), torch.optim.AdamW, **OPTIONS, fused=True
    )
    data = batches(STEPS, rank=rank, ranks=2)
    train(model, optimizer, data[:1])
    warpstep.replace(optimizer.optim)
    with launches(STEPS - 1):
        train(model, optimizer, data[1:])
    return weights(model.module), run(rank, torch.optim.AdamW, fused=True)[0]


def test_replaced_in_mid_run(tmp_path):
    (ours, theirs), (twin, _) = on_two_ranks(replaced_worker, tmp_path)
    assert_same_bits(ours, twin)
    assert_agree(ours, theirs, STEPS)


def worker(rank):
    theirs, _ = run(rank, torch.optim.AdamW, fused=True)
    with launches(STEPS):
        ours, optimizer = run(rank, warpstep.AdamW)
    assert type(optimizer.optim) is warpstep.AdamW
    stepped = sum(len(bucket.entries) for bucket in optimizer.optim.plan.buckets)
    optimizer.consolidate_state_dict(to=0)
    whole = len(optimizer.state_dict()["state"]) if rank == 0 else None
    return ours, theirs, stepped, whole


def test_zero_redundancy_optimizer(tmp_path):
    (ours, theirs, stepped, whole), (twin, _, rest, _) = on_two_ranks(worker, tmp_path)
    assert_same_bits(ours, twin)
    assert_agree(ours, theirs, STEPS)
    assert min(stepped, rest) >= 1
    assert stepped + rest == whole == len(ours)
