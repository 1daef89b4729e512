"""Low precision of an FSDP2 model: the same bits on 1, 2 and 4 processes, and across reshardings.

Every process is given its shards of the same gradients, so nothing but the optimizer can differ.
"""

import functools
import warnings

import pytest
import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from torch import nn
from torch.distributed.checkpoint.state_dict import (
    StateDictOptions,
    get_state_dict,
    set_state_dict,
)
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor, distribute_tensor

import warpstep
from support.bits import raw_bits
from support.parameters import random
from training import on_ranks

BF16 = torch.bfloat16
RECIPES = {
    "residual-8bit": {"master": "residual", "state_dtype": "8bit", "ema_decay": 0.9},
    "stochastic": {"rounding": "stochastic", "state_dtype": BF16},
    "stochastic-8bit": {"rounding": "stochastic", "state_dtype": "8bit", "backend": "reference"},
    "residual": {"master": "residual"},
}
FLAT = {"residual-8bit", "stochastic"}  # whose checkpoints are; the others' are nested
STEPS = 2  # before a checkpoint, and after


class Layers(nn.Module):
    """Rows of one block and of several, unevenly shared, fewer than processes; and of none."""

    def __init__(self):
        super().__init__()
        shapes = [(97, 64), (33, 192), (3, 4096), (50, 100), (4099,), (5, 9, 128), (66_000,)]
        self.weights = nn.ParameterList(
            nn.Parameter(random(shape, i).to(BF16)) for i, shape in enumerate(shapes)
        )


# Which of them have 8 bits, if that is asked for.
OF_8_BITS = [True, True, True, False, False, True, False]


def new(recipe, ranks, seed=0):
    model = Layers()
    with torch.no_grad():
        for p in model.parameters():
            p.add_(seed)
    fully_shard(model, mesh=init_device_mesh("cpu", (ranks,)))
    options = {"lr": 1e-2, "seed": 42, **RECIPES[recipe]}
    return model, warpstep.AdamW(model.parameters(), **options)


def train(model, optimizer, first, last):
    for step in range(first, last):
        for i, p in enumerate(model.parameters()):
            grad = random(p.shape, 100 * step + i).to(BF16)
            p.grad = distribute_tensor(grad, p.device_mesh, p.placements)
        optimizer.step()


def results(model, optimizer):
    """All bits, whole; and what is to be sharded as parameters are."""
    found = {}
    for i, p in enumerate(model.parameters()):
        found[f"{i}"] = raw_bits(p.full_tensor().flatten())
        for key, value in optimizer.state[p].items():
            if key != "step":
                assert isinstance(value, DTensor), key
                assert value.placements == p.placements, key
                assert value.to_local().shape[0] == p.to_local().shape[0], key
                if value.dtype == torch.int16:  # which gloo does not gather
                    value = value.to(torch.int32)
                value = value.full_tensor()
            found[f"{i} {key}"] = raw_bits(value.flatten())
        if optimizer.state_dtype == "8bit":
            assert ("exp_avg_codes" in optimizer.state[p]) == OF_8_BITS[i], i
    if "master" in optimizer.defaults:
        for i, master in enumerate(optimizer.master_parameters().values()):
            found[f"{i} master"] = raw_bits(master.full_tensor().flatten())
    return found


def form_of(recipe):
    return StateDictOptions(flatten_optimizer_state_dict=recipe in FLAT)


def through(ranks, folder, rank):
    """A run that is not interrupted; it leaves checkpoints on its way, one of them meanwhile."""
    warnings.simplefilter("ignore")
    found = {}
    for recipe in RECIPES:
        model, optimizer = new(recipe, ranks)
        train(model, optimizer, 0, STEPS)
        weights, state = get_state_dict(model, optimizer, options=form_of(recipe))
        saved = {"model": weights, "optimizer": state}
        if recipe == "residual-8bit":
            dcp.async_save(saved, checkpoint_id=f"{folder}/{ranks}-{recipe}").result()
        else:
            dcp.save(saved, checkpoint_id=f"{folder}/{ranks}-{recipe}")
        train(model, optimizer, STEPS, 2 * STEPS)
        found[recipe] = results(model, optimizer)
    return found


def resumed(saved_by, ranks, folder):
    """The same run from another number of processes' checkpoints."""
    found = {}
    for recipe in RECIPES:
        model, optimizer = new(recipe, ranks, seed=1)
        weights, state = get_state_dict(model, optimizer, options=form_of(recipe))
        saved = {"model": weights, "optimizer": state}
        dcp.load(saved, checkpoint_id=f"{folder}/{saved_by}-{recipe}")
        set_state_dict(
            model,
            optimizer,
            model_state_dict=saved["model"],
            optim_state_dict=saved["optimizer"],
            options=form_of(recipe),
        )
        train(model, optimizer, STEPS, 2 * STEPS)
        found[recipe] = results(model, optimizer)
    return found


def trained_with_a_master(ranks, rank):
    """Forward, backward and FSDP2's gathering leave residuals alone; what is written counts.

    So it does for the root module, which has the last layer and keeps it gathered.
    """
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(64, 97), nn.GELU(), nn.Linear(97, 5)).to(BF16)
    exact = [nn.Parameter(p.detach().float()) for p in model.parameters()]
    mesh = init_device_mesh("cpu", (ranks,))
    for part in (model[0], model):
        fully_shard(part, mesh=mesh)
    params = list(model.parameters())
    optimizer = warpstep.AdamW(params, master="residual")
    other = warpstep.AdamW(exact)
    for step in range(4):
        model(random((4, 64), 10 * step + rank).to(BF16)).square().mean().backward()
        for p, q in zip(params, exact, strict=True):
            q.grad = p.grad.full_tensor().float()
        optimizer.step()
        other.step()
        optimizer.zero_grad()
    masters = optimizer.master_parameters()
    same = [torch.equal(masters[p].full_tensor(), q) for p, q in zip(params, exact, strict=True)]
    model.load_state_dict({key: value.clone() * 2 for key, value in model.state_dict().items()})
    masters = optimizer.master_parameters()
    same += [torch.equal(masters[p].full_tensor(), p.full_tensor().float()) for p in params]
    inputs = random((4, 64), 1).to(BF16)
    with torch.no_grad():
        outputs = model(inputs).clone()
        optimizer.set_master_parameters({p: 2 * masters[p] for p in params[-2:]})
        same.append(torch.equal(model(inputs), 2 * outputs))
    return {"all": same}


def worker(ranks, resumed_from, folder, rank):
    found = {"through": through(ranks, folder, rank)}
    found["trained"] = trained_with_a_master(ranks, rank)
    dist.barrier()
    for saved_by in resumed_from:
        found[f"from {saved_by}"] = resumed(saved_by, ranks, folder)
    return found


@pytest.fixture(scope="module")
def runs(tmp_path_factory):
    """What each rank found: two processes begin, one goes on, then four, each also on its own."""
    folder = tmp_path_factory.mktemp("checkpoints")
    found = {}
    for ranks, resumed_from in ((2, ()), (1, (2,)), (4, (1,))):
        processes = tmp_path_factory.mktemp(f"ranks{ranks}")
        one = functools.partial(worker, ranks, resumed_from, folder)
        for way in (of_rank := on_ranks(ranks, one, processes, timeout=180))[0]:
            found[ranks, way] = [each[way] for each in of_rank]
    return found


@pytest.mark.parametrize("recipe", RECIPES)
@pytest.mark.parametrize(
    "run", [(1, "through"), (4, "through"), (1, "from 2"), (4, "from 1")], ids=str
)
def test_bits_are_those_of_two_processes(run, recipe, runs):
    expected = runs[2, "through"][0][recipe]
    for found in runs[run]:
        assert found[recipe].keys() == expected.keys()
        for key, value in expected.items():
            differing = (found[recipe][key] != value).sum().item()
            assert differing == 0, f"{key}: {differing} of {value.numel()} bytes differ"


@pytest.mark.parametrize("ranks", [1, 2, 4])
def test_a_master_is_a_float32_models_run(ranks, runs):
    for found in runs[ranks, "trained"]:
        assert all(found["all"]), found
