"""Division and root are IEEE's for every significand, by whatever a kernel makes them of."""

import math

import numpy as np
import pytest
import torch
from torch.nn import Parameter

import warpstep
from support.bits import bits

# All significands of two octaves on a GPU, whose approximations are its own; else some of them.
OCTAVES = 2**24
RECIPES = {
    "float32": (torch.float32, {}),  # where the kernel divides as the compiler says
    "master": (torch.bfloat16, {"master": "residual"}),  # where CUDA's does it by multiply-adds
}


@pytest.mark.parametrize("scale", [2.0**-64, 1.0, 2.0**30], ids=["tiny", "one", "large"])
@pytest.mark.parametrize(("dtype", "recipe"), RECIPES.values(), ids=RECIPES)
def test_the_update_is_numpys(dtype, recipe, scale, backend, device):
    """The moments stay as they are, and so a parameter of 0 becomes -m / (sqrt(v) + eps_hat)."""
    every = 1 if device == "cuda" else 1021
    v = (np.arange(0, OCTAVES, every, dtype=np.int32) + 0x3F800000).view(np.float32)
    v *= np.float32(scale)
    generator = np.random.default_rng(0)
    m = generator.standard_normal(v.size, dtype=np.float32) * np.float32(math.sqrt(scale))
    param = Parameter(torch.zeros(v.size, dtype=dtype, device=device))
    param.grad = torch.zeros_like(param)
    betas, eps = (1 - 2.0**-30, 1 - 2.0**-40), 2.0**-30
    # lr / (1 - beta1) * sqrt(1 - beta2) is 1.
    optimizer = warpstep.AdamW(
        [param], lr=2.0**-10, betas=betas, eps=eps, backend=backend, **recipe
    )
    optimizer.state[param] |= {
        "step": torch.tensor(0.0),
        "exp_avg": torch.from_numpy(m).to(device),
        "exp_avg_sq": torch.from_numpy(v).to(device),
    }
    if recipe:
        residual = torch.zeros(v.size, dtype=torch.int16, device=device)
        optimizer.state[param]["master_param"] = residual
    optimizer.step()
    state = optimizer.state[param]
    assert torch.equal(bits(state["exp_avg"].cpu()), bits(torch.from_numpy(m)))
    assert torch.equal(bits(state["exp_avg_sq"].cpu()), bits(torch.from_numpy(v)))
    found = optimizer.master_parameters()[param] if recipe else param.detach()
    expected = torch.from_numpy(-m / (np.sqrt(v) + np.float32(eps * 2.0**-20)))
    if backend == "reference":  # five roundings of torch's own form
        assert torch.allclose(found.cpu(), expected, rtol=5 * 2.0**-24, atol=0)
    else:
        assert torch.equal(bits(found.cpu()), bits(expected))
