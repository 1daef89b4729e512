"""What tests are parametrized with, wherever it stands more than once."""

import pytest
import torch

import warpstep
from support.environment import HAS_GPU
from support.recipes import OPTIONS, RECIPES

# warpstep's class and torch's.
PAIRS = {
    "AdamW": (warpstep.AdamW, torch.optim.AdamW),
    "Adam": (warpstep.Adam, torch.optim.Adam),
}

each_recipe = pytest.mark.parametrize("recipe", RECIPES.values(), ids=RECIPES.keys())
each_options = pytest.mark.parametrize("options", OPTIONS.values(), ids=OPTIONS.keys())
on_each_device = pytest.mark.parametrize("device", ["cpu", "cuda"] if HAS_GPU else ["cpu"])
