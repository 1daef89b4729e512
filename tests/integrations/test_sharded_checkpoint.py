"""FSDP2 and torch.distributed.checkpoint: two processes save, two others go on, bit for bit."""

import functools
import itertools
import warnings

import pytest
import torch
import torch.distributed.checkpoint as dcp
from torch import nn
from torch.distributed.checkpoint.state_dict import (
    StateDictOptions,
    get_state_dict,
    set_state_dict,
)
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.optim.lr_scheduler import CosineAnnealingLR, LinearLR, SequentialLR

import warpstep
from training import OPTIONS, assert_same_bits, on_two_ranks, weights

STEPS = 4  # before the restart, and after
KINDS = {
    "warpstep": (warpstep.AdamW, {}),
    "warpstep averages": (warpstep.AdamW, {"fused": True, "ema_decay": 0.9}),
    "torch": (torch.optim.AdamW, {"fused": True}),
}
FLAT = {"nested": False, "flat": True}
WAYS = [
    *itertools.product(KINDS, FLAT, [True]),
    *itertools.product(KINDS, ["nested"], [False]),
]


def new(kind, scheduled, seed):
    """A sharded model (unevenly, one shard empty), its optimizer and, in warm-up, its scheduler."""
    torch.manual_seed(seed)
    mesh = init_device_mesh("cpu", (2,))
    model = nn.Sequential(nn.Linear(6, 33), nn.GELU(), nn.Linear(33, 1))
    for part in (model[0], model[2], model):
        fully_shard(part, mesh=mesh)
    cls, options = KINDS[kind]
    optimizer = cls(model.parameters(), **OPTIONS, **options)
    if not scheduled:
        return model, optimizer, None
    parts = [LinearLR(optimizer, 0.1, total_iters=6), CosineAnnealingLR(optimizer, 10)]
    return model, optimizer, SequentialLR(optimizer, parts, milestones=[6])


def train(run, first, last, rank):
    model, optimizer, scheduler = run
    for step in range(first, last):
        generator = torch.Generator().manual_seed(2 * step + rank)
        optimizer.zero_grad()
        model(torch.randn((5, 6), generator=generator)).square().mean().backward()
        optimizer.step()
        if scheduler is not None:
            scheduler.step()


def results(run):
    model, optimizer, _ = run
    found = weights(model)
    for name, param in model.named_parameters():
        for key, value in optimizer.state[param].items():
            found[f"{name} {key}"] = value.full_tensor() if key != "step" else value
    return found, [group["lr"] for group in optimizer.param_groups]


def in_all_ways(folder, one, rank):
    """Runs ``one`` in every way, all in the same two processes."""
    warnings.simplefilter("ignore")  # of SequentialLR and checkpointing, in this process
    return {way: one(*way, f"{folder}/{'-'.join(map(str, way))}", rank) for way in WAYS}


def through(kind, form, scheduled, folder, rank):
    """The run that is not interrupted; it leaves a checkpoint on its way."""
    run = new(kind, scheduled, seed=0)
    train(run, 0, STEPS, rank)
    model, optimizer, scheduler = run
    options = StateDictOptions(flatten_optimizer_state_dict=FLAT[form])
    weights_of, state = get_state_dict(model, optimizer, options=options)
    saved = {"model": weights_of, "optimizer": state}
    if scheduled:
        saved["scheduler"] = scheduler.state_dict()
    dcp.save(saved, checkpoint_id=folder)
    train(run, STEPS, 2 * STEPS, rank)
    return results(run)


def resumed(kind, form, scheduled, folder, rank):
    run = new(kind, scheduled, seed=1)
    model, optimizer, scheduler = run
    options = StateDictOptions(flatten_optimizer_state_dict=FLAT[form])
    weights_of, state = get_state_dict(model, optimizer, options=options)
    saved = {"model": weights_of, "optimizer": state}
    if scheduled:
        saved["scheduler"] = scheduler.state_dict()
    dcp.load(saved, checkpoint_id=folder)
    if scheduled:
        scheduler.load_state_dict(saved["scheduler"])
    set_state_dict(
        model,
        optimizer,
        model_state_dict=saved["model"],
        optim_state_dict=saved["optimizer"],
        options=options,
    )
    train(run, STEPS, 2 * STEPS, rank)
    return results(run)


@pytest.fixture(scope="module")
def runs(tmp_path_factory):
    """What each rank found, in the run that went through and in the one that was resumed."""
    folder = tmp_path_factory.mktemp("checkpoints")
    found = []
    for one in (through, resumed):
        processes = tmp_path_factory.mktemp(one.__name__)
        worker = functools.partial(in_all_ways, folder, one)
        found.append(on_two_ranks(worker, processes, timeout=180))
    return found


@pytest.mark.parametrize(("kind", "form", "scheduled"), WAYS)
def test_a_resumed_run_is_the_uninterrupted_one(kind, form, scheduled, runs):
    for ours, theirs in zip(*runs, strict=True):
        found, rates = theirs[kind, form, scheduled]
        expected, expected_rates = ours[kind, form, scheduled]
        assert_same_bits(found, expected)
        assert rates == expected_rates
