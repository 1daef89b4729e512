"""What tests are parametrized with, wherever it stands more than once."""

import itertools

import pytest
import torch

import warpstep
from support.environment import EMULATED, HAS_GPU, INTERPRETED
from support.recipes import KERNELS, OPTIONS, RECIPES

# warpstep's class and torch's.
PAIRS = {
    "AdamW": (warpstep.AdamW, torch.optim.AdamW),
    "Adam": (warpstep.Adam, torch.optim.Adam),
}


def covering_pairs(options, always):
    """Some (recipe, options), by name: every recipe with `always`, which are kernels of their own,
    and with a fifth of the other options; every option, which kernels read, with two recipes.
    """
    others = [name for name in options if name not in always]
    for i, recipe in enumerate(RECIPES):
        rest = [name for j, name in enumerate(others) if (i + j) % 5 == 0]
        yield from itertools.product([recipe], [*always, *rest])


def recipes_with(options, always):
    """A test of all pairs; of some where a launch takes a hundred times as long as elsewhere."""
    pairs = itertools.product(RECIPES, options)
    if EMULATED or INTERPRETED:
        pairs = covering_pairs(options, always)
    return pytest.mark.parametrize(
        ("recipe", "options"),
        [pytest.param(RECIPES[r], options[o], id=f"{r}-{o}") for r, o in pairs],
    )


each_recipe = pytest.mark.parametrize("recipe", RECIPES.values(), ids=RECIPES.keys())
each_options = pytest.mark.parametrize("options", OPTIONS.values(), ids=OPTIONS.keys())
each_recipe_with_options = recipes_with(OPTIONS, KERNELS)
on_each_device = pytest.mark.parametrize("device", ["cpu", "cuda"] if HAS_GPU else ["cpu"])
