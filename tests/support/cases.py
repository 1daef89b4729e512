"""What tests are parametrized with, wherever it stands more than once."""

import itertools

import pytest
import torch

import warpstep
from support.environment import EMULATED, HAS_GPU, INTERPRETED
from support.recipes import OPTIONS, RECIPES

# warpstep's class and torch's.
PAIRS = {
    "AdamW": (warpstep.AdamW, torch.optim.AdamW),
    "Adam": (warpstep.Adam, torch.optim.Adam),
}


def covering_pairs():
    """Some (recipe, options), by name: every recipe with and without amsgrad, which are kernels of
    their own, and with two options more; every option, which kernels read, with two recipes.
    """
    always = ["default", "amsgrad"]
    others = [name for name in OPTIONS if name not in always]
    for i, recipe in enumerate(RECIPES):
        rest = [name for j, name in enumerate(others) if (i + j) % 5 == 0]
        yield from itertools.product([recipe], always + rest)


each_recipe = pytest.mark.parametrize("recipe", RECIPES.values(), ids=RECIPES.keys())
each_options = pytest.mark.parametrize("options", OPTIONS.values(), ids=OPTIONS.keys())
# All pairs, but where a launch takes a hundred times as long as on the processor that it is for.
_PAIRS = covering_pairs() if EMULATED or INTERPRETED else itertools.product(RECIPES, OPTIONS)
each_recipe_with_options = pytest.mark.parametrize(
    ("recipe", "options"),
    [pytest.param(RECIPES[r], OPTIONS[o], id=f"{r}-{o}") for r, o in _PAIRS],
)
on_each_device = pytest.mark.parametrize("device", ["cpu", "cuda"] if HAS_GPU else ["cpu"])
