"""timm: warpstep.AdamW in timm's registry of optimizers.

timm needs torchvision, whose wheel on PyPI does not import beside a CPU build of torch. timm's
optimizers do not need it: where it is missing, timm.optim is imported past the rest of timm.
"""

import importlib
import importlib.util
import sys
import types

import pytest
import torch

import warpstep
from training import LR, OPTIONS, SideBySide, assert_agree, batches, launches, train, weights


def timm_optim():
    """The module timm.optim."""
    spec = importlib.util.find_spec("timm")
    if spec is None:
        pytest.skip("could not import 'timm'", allow_module_level=True)
    try:
        return importlib.import_module("timm.optim")
    except (ImportError, RuntimeError):  # torchvision is missing, or is for another torch
        for name in [name for name in sys.modules if name.split(".")[0] == "timm"]:
            del sys.modules[name]
    timm = sys.modules["timm"] = importlib.util.module_from_spec(spec)  # not executed
    timm.models = sys.modules["timm.models"] = types.ModuleType("timm.models")
    timm.models.group_parameters = None  # for layer-wise rates only
    return importlib.import_module("timm.optim")


optim = timm_optim()
registry = optim._optim_factory.default_registry
# No underscore in the name: timm takes what stands before it for a prefix such as lookahead's.
registry.register(optim.OptimInfo("warpstep", warpstep.AdamW, has_betas=True))

STEPS = 4
OTHERS = {key: value for key, value in OPTIONS.items() if key != "lr"}


def run(name, **options):
    model = SideBySide()
    optimizer = optim.create_optimizer_v2(model, name, lr=LR, **OTHERS, **options)
    train(model, optimizer, batches(STEPS))
    return weights(model), optimizer


def test_timm():
    theirs, twin = run("adamw", fused=True)
    assert type(twin) is torch.optim.AdamW
    with launches(STEPS):
        ours, optimizer = run("warpstep")
    assert type(optimizer) is warpstep.AdamW
    decays = [group["weight_decay"] for group in optimizer.param_groups]
    assert decays == [group["weight_decay"] for group in twin.param_groups]
    assert sorted(decays) == [0, OPTIONS["weight_decay"]]  # biases are not decayed
    assert [len(bucket.entries) for bucket in optimizer.plan.buckets] == [len(ours)]
    assert_agree(ours, theirs, STEPS)


def test_timm_lookahead():
    theirs, _ = run("lookahead_adamw", fused=True)
    with launches(STEPS):
        ours, _ = run("lookahead_warpstep")
    assert_agree(ours, theirs, STEPS)
