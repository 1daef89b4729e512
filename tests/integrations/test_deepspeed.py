"""DeepSpeed's ZeRO: each of two ranks steps its part of the flat parameters."""

import os

import pytest
import torch

import warpstep
from training import (
    OPTIONS,
    SideBySide,
    assert_agree,
    assert_same_bits,
    batches,
    on_two_ranks,
)

pytest.importorskip("deepspeed")
STEPS = 3


def run(rank, stage, cls, **options):
    import deepspeed

    model = SideBySide()
    optimizer = cls(model.parameters(), **OPTIONS, **options)
    config = {
        "train_micro_batch_size_per_gpu": 4,
        "zero_allow_untested_optimizer": True,
        "zero_optimization": {"stage": stage},
    }
    engine, *_ = deepspeed.initialize(
        model=model, optimizer=optimizer, config=config, dist_init_required=False
    )
    before = warpstep.status().launches["cpu"]
    for batch in batches(STEPS, rank=rank, ranks=2):
        engine.backward(engine(**batch)["loss"])
        engine.step()
    launched = warpstep.status().launches["cpu"] - before
    params = dict(engine.module.named_parameters())
    with deepspeed.zero.GatheredParameters(list(params.values()), enabled=stage == 3):
        found = {name: p.detach().clone() for name, p in params.items()}
    return found, launched, str(getattr(optimizer, "plan", ""))


def worker(rank):
    os.environ |= {"RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": "2"}
    results = {}
    for stage in (1, 2, 3):
        theirs, _, _ = run(rank, stage, torch.optim.AdamW, fused=True)
        results[stage] = (*run(rank, stage, warpstep.AdamW), theirs)
    return results


@pytest.mark.slow
def test_zero(tmp_path, monkeypatch):
    """Every stage: the weights of torch's fused AdamW, the same on both ranks, from one launch."""
    monkeypatch.setenv("DS_ACCELERATOR", "cpu")
    ones, twins = on_two_ranks(worker, tmp_path, timeout=120)
    for stage, (ours, launched, plan, theirs) in ones.items():
        assert_agree(ours, theirs, STEPS)
        assert_same_bits(ours, twins[stage][0])
        assert launched == STEPS, stage
        assert "cpu: 1 tensors" in plan
        assert "reference" not in plan
