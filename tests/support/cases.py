"""What tests are parametrized with."""

import pytest

from support.recipes import OPTIONS, RECIPES

each_recipe = pytest.mark.parametrize("recipe", RECIPES.values(), ids=RECIPES.keys())
each_options = pytest.mark.parametrize("options", OPTIONS.values(), ids=OPTIONS.keys())
