"""FSDP1 (FullyShardedDataParallel), with flat parameters and with the original ones."""

import copy
import functools
import warnings

import pytest
import torch
from torch.distributed.fsdp import FullyShardedDataParallel, StateDictType

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

STEPS = 3


def sharded(original, seed=0):
    device = torch.device("cpu")
    return FullyShardedDataParallel(SideBySide(seed), use_orig_params=original, device_id=device)


def whole_weights(model):
    with FullyShardedDataParallel.summon_full_params(model):
        return {name.removeprefix("_fsdp_wrapped_module."): p for name, p in weights(model).items()}


def run_with_restart(original, cls, rank, **options):
    """Trains, moves weights and state into another model by name, and trains on."""
    data = batches(2 * STEPS, rank=rank, ranks=2)
    models = [sharded(original, seed) for seed in (0, 9)]
    optimizers = [cls(model.parameters(), **OPTIONS, **options) for model in models]
    train(models[0], optimizers[0], data[:STEPS])
    for model in models:
        FullyShardedDataParallel.set_state_dict_type(model, StateDictType.FULL_STATE_DICT)
    saved = FullyShardedDataParallel.optim_state_dict(models[0], optimizers[0])
    models[1].load_state_dict(models[0].state_dict())
    loaded = FullyShardedDataParallel.optim_state_dict_to_load(
        models[1], optimizers[1], copy.deepcopy(saved)
    )
    optimizers[1].load_state_dict(loaded)
    train(models[1], optimizers[1], data[STEPS:])
    return whole_weights(models[1]), saved


def worker(original, rank):
    warnings.simplefilter("ignore")  # FSDP1 is deprecated
    theirs, _ = run_with_restart(original, torch.optim.AdamW, rank, fused=True)
    with launches(2 * STEPS):
        ours, saved = run_with_restart(original, warpstep.AdamW, rank, ema_decay=0.5)
    averages = {name: state["ema"].shape for name, state in saved["state"].items()}
    assert averages == {name: p.shape for name, p in theirs.items()}
    return ours, theirs


@pytest.mark.parametrize("original", [False, True], ids=["flat", "original"])
def test_restart(original, tmp_path):
    (ours, theirs), (twin, _) = on_two_ranks(functools.partial(worker, original), tmp_path)
    assert_same_bits(ours, twin)
    assert_agree(ours, theirs, 2 * STEPS)


def swapping_worker(original, rank):
    """A forward pass might go on computing with what was gathered before."""
    warnings.simplefilter("ignore")
    model = sharded(original)
    optimizer = warpstep.AdamW(model.parameters(), **OPTIONS, ema_decay=0.5)
    train(model, optimizer, batches(STEPS, rank=rank, ranks=2))
    before = whole_weights(model)
    with pytest.raises(RuntimeError, match="FullyShardedDataParallel"), optimizer.swap_ema():
        pass
    assert_same_bits(whole_weights(model), before)
    train(model, optimizer, batches(STEPS, rank=rank, ranks=2))


@pytest.mark.parametrize("original", [False, True], ids=["flat", "original"])
def test_averages_are_not_swapped(original, tmp_path):
    on_two_ranks(functools.partial(swapping_worker, original), tmp_path)
