"""A small but complete set of CUDA steps, for compute-sanitizer: every recipe, edge and table.

`make gpu PARTS=sanitize` runs it under each of the tools, with settings that let them see something
(bench/gpu.py). It prints a line a recipe, and exits with 0 if all bits are the CPU kernel's.
"""

import sys
from collections.abc import Sequence

import torch
from torch.nn import Parameter

import warpstep
from support import low_precision
from support.bits import assert_same_bits, train, train_tail
from support.parameters import random
from support.recipes import OPTIONS, RECIPES

BOTH = (("cuda", "cuda"), ("cpu", "cpu"))
# Blocks of 8 bits and their ends; with the rest of a step, through the kernel of any formats.
TAIL = {"stats": True, "ema_decay": 0.9}
TILED = {
    name: low_precision.RECIPES[name]
    for name in ("residual-bf16", "residual-8bit", "stochastic-8bit")
}
TILED |= {f"{name}-tail": {**TILED[name], **TAIL} for name in ("residual-8bit", "stochastic-8bit")}


def train_tiled(options: dict, backend: str, device: str) -> warpstep.AdamW:
    """Two steps in a low precision."""
    params = low_precision.new_params(shapes=[(n,) for n in (0, 17, 64, 300, 16_385)])
    params = [Parameter(param.detach().to(device)) for param in params]
    optimizer = warpstep.AdamW(params, backend=backend, **options)
    for step in range(2):
        for index, param in enumerate(params):
            param.grad = random(param.shape, 100 * step + index, device).to(param.dtype)
        optimizer.step()
    return optimizer


def many_groups(backend: str, device: str) -> warpstep.AdamW:
    """More groups than fit the arguments, misaligned views, now and then a missing gradient."""
    base = torch.randn(4096, generator=torch.Generator().manual_seed(0)).to(device)
    params = [Parameter(base[i * 5 + i % 3 : i * 5 + 4]) for i in range(800)]
    groups = [{"params": [p], "lr": 1e-3 * (1 + i)} for i, p in enumerate(params)]
    optimizer = warpstep.AdamW(groups, backend=backend)
    for step in range(2):
        for i, param in enumerate(params):
            param.grad = None if (i + step) % 7 == 0 else torch.ones_like(param)
        optimizer.step()
    return optimizer


def main(pairs: Sequence[tuple[str, str]] = BOTH) -> None:
    """Compares the steps of two backends, each on its device."""
    sizes = (0, 1, 3, 64, 1000, 16_385)
    for name, recipe in RECIPES.items():
        for options in (OPTIONS["default"], OPTIONS["adam-amsgrad-maximize"], OPTIONS["min-decay"]):
            assert_same_bits(*(train(recipe, options, *pair, 2, sizes) for pair in pairs))
        # The tail, and the norm's own kernel.
        assert_same_bits(*(train_tail(recipe, *pair) for pair in pairs))
        print(f"{name}: all bits as on the CPU", flush=True)
    for name, options in TILED.items():
        assert_same_bits(*(train_tiled(options, *pair) for pair in pairs))
        print(f"{name}: all bits as on the CPU", flush=True)
    assert_same_bits(*(many_groups(*pair) for pair in pairs))
    print("many groups: all bits as on the CPU")


if __name__ == "__main__":
    sys.exit(main())
