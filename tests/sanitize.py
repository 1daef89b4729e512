"""A small but complete set of CUDA steps, for compute-sanitizer: every recipe, edge and table.

Run as ``compute-sanitizer --tool memcheck python tests/sanitize.py`` (also racecheck, initcheck).
It prints a line and exits with 0 if all bits are the CPU kernel's.
"""

import sys

import torch
from torch.nn import Parameter

import warpstep
from test_bits import assert_same_bits, train, train_tail
from test_conformance import OPTIONS, RECIPES

BOTH = (("cuda", "cuda"), ("cpu", "cpu"))


def main() -> None:
    cases = 0
    for recipe in RECIPES.values():
        for options in (OPTIONS["default"], OPTIONS["adam-amsgrad-maximize"]):
            sizes = (0, 1, 3, 64, 1000, 16_385)
            optimizers = [
                train(recipe, options, backend, device, steps=2, sizes=sizes)
                for backend, device in BOTH
            ]
            assert_same_bits(*optimizers)
            cases += 1
    # The tail, and the norm's own kernel.
    for recipe in RECIPES.values():
        assert_same_bits(*(train_tail(recipe, backend, device) for backend, device in BOTH))
        cases += 1
    # More groups than fit the arguments, misaligned views, a missing gradient.
    base = torch.randn(4096, device="cuda")
    params = [Parameter(base[i * 5 + i % 3 : i * 5 + 4]) for i in range(800)]
    optimizer = warpstep.AdamW([{"params": [p], "lr": 1e-3 + i} for i, p in enumerate(params)])
    for step in range(2):
        for i, param in enumerate(params):
            param.grad = None if (i + step) % 7 == 0 else torch.ones_like(param)
        optimizer.step()
    torch.cuda.synchronize()
    print(f"{cases + 1} cases, all bits as on the CPU")


if __name__ == "__main__":
    sys.exit(main())
