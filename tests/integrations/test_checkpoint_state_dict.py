"""torch.distributed.checkpoint: optimizer states by parameter name, across a restart."""

import pytest
import torch
import torch.distributed.checkpoint as dcp
from torch.distributed.checkpoint import CheckpointException
from torch.distributed.checkpoint.state_dict import (
    StateDictOptions,
    get_optimizer_state_dict,
    set_optimizer_state_dict,
)

import warpstep
from training import (
    LR,
    OPTIONS,
    SideBySide,
    assert_agree,
    assert_same_bits,
    batches,
    launches,
    train,
    weights,
)

STEPS = 3
TORCH = {"cls": torch.optim.AdamW, "fused": True}
WARPSTEP = {"cls": warpstep.AdamW}


def new(kind, seed=0):
    options = {**OPTIONS, **kind}
    model = SideBySide(seed)
    return model, options.pop("cls")(model.parameters(), **options)


def run_with_restart(first, second, flatten, folder=None):
    """Steps with one optimizer, moves weights and state into another's model, and steps on."""
    options = StateDictOptions(flatten_optimizer_state_dict=flatten)
    model, optimizer = new(first)
    train(model, optimizer, batches(2 * STEPS)[:STEPS])
    saved = get_optimizer_state_dict(model, optimizer, options=options)
    names = {name for name, _ in model.named_parameters()}
    if flatten:
        assert {f"state.{name}.exp_avg" for name in names} <= saved.keys()
    else:
        assert saved["state"].keys() == names

    other, other_optimizer = new(second, seed=9)
    other.load_state_dict(model.state_dict())
    if folder is not None:
        dcp.save(saved, checkpoint_id=folder, no_dist=True)
        saved = get_optimizer_state_dict(other, other_optimizer, options=options)
        dcp.load(saved, checkpoint_id=folder, no_dist=True)
    set_optimizer_state_dict(other, other_optimizer, saved, options=options)
    assert all(state["step"] == STEPS for state in other_optimizer.state.values())
    assert all(group["lr"] == LR for group in other_optimizer.param_groups)
    train(other, other_optimizer, batches(2 * STEPS)[STEPS:])
    return weights(other), other_optimizer


def run_through(kind):
    model, optimizer = new(kind)
    train(model, optimizer, batches(2 * STEPS))
    return weights(model)


@pytest.mark.parametrize("on_disk", [False, True], ids=["memory", "disk"])
@pytest.mark.parametrize("flatten", [False, True], ids=["nested", "flat"])
def test_restart(flatten, on_disk, tmp_path):
    # torch makes the new optimizer's state by one more step, with lr and gradients of zero.
    with launches(2 * STEPS + 1):
        ours, optimizer = run_with_restart(
            WARPSTEP, WARPSTEP, flatten, tmp_path if on_disk else None
        )
    assert optimizer.plan.buckets
    assert_same_bits(ours, run_through(WARPSTEP))
    assert_agree(ours, run_through(TORCH), 2 * STEPS)


@pytest.mark.parametrize("flatten", [False, True], ids=["nested", "flat"])
@pytest.mark.parametrize(("first", "second"), [(TORCH, WARPSTEP), (WARPSTEP, TORCH)])
def test_restart_with_the_other_optimizer(first, second, flatten):
    crossed, _ = run_with_restart(first, second, flatten)
    assert_agree(crossed, run_through(TORCH), 2 * STEPS)


@pytest.mark.parametrize("flatten", [False, True], ids=["nested", "flat"])
@pytest.mark.parametrize("state_dtypes", [("8bit", None), (None, "8bit")], ids=str)
def test_codes_are_not_loaded_as_numbers_nor_the_other_way(state_dtypes, flatten, tmp_path):
    """dcp.load misses the key that the other precision has."""
    options = StateDictOptions(flatten_optimizer_state_dict=flatten)
    models = [torch.nn.Linear(64, 64) for _ in state_dtypes]
    first, second = (
        warpstep.AdamW(model.parameters(), state_dtype=state_dtype)
        for model, state_dtype in zip(models, state_dtypes, strict=True)
    )
    saved = get_optimizer_state_dict(models[0], first, options=options)
    dcp.save(saved, checkpoint_id=tmp_path, no_dist=True)
    wanted = get_optimizer_state_dict(models[1], second, options=options)
    with pytest.raises(CheckpointException, match=r"Missing key .*state\.weight\.exp_avg"):
        dcp.load(wanted, checkpoint_id=tmp_path, no_dist=True)
