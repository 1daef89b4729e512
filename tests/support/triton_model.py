"""Tensors in a table of Triton's: recipes, hyper-parameters and state, for tests of the kernels."""

import struct
from typing import Any, NamedTuple

import pytest
import torch
from torch import Tensor
from warpstep.kernels.triton import launch as kernel

from warpstep import recipes

f64, f32, bf16, f16 = torch.float64, torch.float32, torch.bfloat16, torch.float16
DEVICE = "cpu" if kernel.INTERPRETED else "cuda" if torch.cuda.is_available() else None
runs = pytest.mark.skipif(DEVICE is None, reason="Triton compiles in this process, and for no GPU")
compiles = pytest.mark.skipif(kernel.INTERPRETED, reason="Triton interprets in this process")
COUPLED, DECOUPLED, INDEPENDENT, L1, CAUTIOUS, L1L2, MIN = range(7)  # `Decay` in layout.h
MOMENTS = {"adamw": ("exp_avg", "exp_avg_sq", "max_exp_avg_sq"), "sgd": ("momentum_buffer",)}
Lists = dict[str, list[Tensor]]


class Recipe(recipes.Recipe):
    """A rule and the formats of its operands, all in its name."""

    __slots__ = ()

    def __str__(self) -> str:
        return "-".join((self.rule, *filter(None, self.formats())))


def adamw(
    param: torch.dtype,
    grad: torch.dtype | None = None,
    moment: torch.dtype | None = None,
    amsgrad: bool = False,
    ema: torch.dtype | None = None,
) -> Recipe:
    """A recipe of AdamW; gradients and moments are as the parameter unless given."""
    return Recipe("adamw", param, grad or param, (moment or param,) * (3 if amsgrad else 2), ema)


def sgd(
    param: torch.dtype,
    grad: torch.dtype | None = None,
    moment: torch.dtype | None = None,
    momentum: bool = True,
) -> Recipe:
    """A recipe of SGD; gradients and moments are as the parameter unless given."""
    return Recipe("sgd", param, grad or param, (moment or param,) if momentum else ())


ADAMW_RECIPES = [*map(adamw, (f64, f32, bf16, f16)), adamw(f32, amsgrad=True)]
ADAMW_RECIPES += [adamw(bf16, bf16, f32), adamw(bf16, amsgrad=True)]
ADAMW_RECIPES += [adamw(bf16, f32, f32), adamw(f32, f32, bf16)]
SGD_RECIPES = [*map(sgd, (f64, f32, bf16, f16)), sgd(f32, momentum=False), sgd(bf16, f32, f32)]
RECIPES = ADAMW_RECIPES + SGD_RECIPES
# What the interpreter's tests have in test_triton_recipes.py.
STOCHASTIC = recipes.BFLOAT16_STOCHASTIC
LOW_PRECISION = [
    adamw(bf16, bf16, f32)._replace(has_master=True),
    Recipe("adamw", bf16, bf16, (bf16, STOCHASTIC), has_master=True),
    Recipe("adamw", STOCHASTIC, bf16, (bf16, STOCHASTIC)),
    Recipe("adamw", bf16, bf16, (recipes.E4M3, recipes.UE5M3), has_master=True),
    Recipe("adamw", STOCHASTIC, bf16, (recipes.E4M3, recipes.UE5M3)),
    Recipe("adamw", f32, bf16, (recipes.E4M3, recipes.UE5M3), copy=bf16),
    Recipe("sgd", bf16, bf16, (recipes.E4M3,)),
]


def packed(hyper: Any) -> bytes:
    """The C struct `Hyper`: the first five are its numbers, and tensors go by address."""
    numbers = [float(x) if isinstance(x, bool) else x for x in hyper[:5]]
    kinds = [{f32: 1, f64: 2}[x.dtype] if isinstance(x, Tensor) else 0 for x in numbers]
    words = [x.data_ptr() if isinstance(x, Tensor) else x for x in numbers]
    types = "".join("Q" if kind else "d" for kind in kinds)
    flags = (*kinds, hyper.decay, hyper.maximize)
    return struct.pack(f"<{types}d7Bx", *words, 0.0, *flags)


class AdamW(NamedTuple):
    """Hyper-parameters of a group."""

    lr: float | Tensor = 1e-3
    weight_decay: float | Tensor = 1e-2
    beta1: float | Tensor = 0.9
    beta2: float | Tensor = 0.999
    eps: float | Tensor = 1e-8
    maximize: bool = False
    decay: int = DECOUPLED

    pack = packed


class SGD(NamedTuple):
    """Hyper-parameters of a group."""

    lr: float | Tensor = 1e-3
    weight_decay: float | Tensor = 0.0
    momentum: float | Tensor = 0.9
    dampening: float | Tensor = 0.0
    nesterov: bool = False
    maximize: bool = False
    decay: int = COUPLED

    pack = packed


def number(value: float, dtype: torch.dtype = f32) -> Tensor:
    """A number on the device, which kernels read there."""
    return torch.tensor(value, dtype=dtype).to(DEVICE)


# Weights on both sides of lerp's middle, every use of momentum, no decay, coupled decay, maximize,
# addresses.
GROUPS = {
    "adamw": [
        AdamW(),
        AdamW(3e-2, 0.1, 0.3, 0.45, 1e-3, maximize=True),
        AdamW(0.1, 0.3, 0.0, 0.95, decay=COUPLED),
        AdamW(number(2e-3), number(1e-2), 0.8, number(0.99, f64), number(1e-7)),
        AdamW(weight_decay=0.0, decay=COUPLED),
    ],
    "sgd": [
        SGD(),
        SGD(0.1, 0.01, 0.7, dampening=0.3, maximize=True),
        SGD(0.05, 0.1, 0.95, nesterov=True),
        SGD(number(2e-3), number(1e-2), number(0.8), number(0.25, f64), decay=DECOUPLED),
        SGD(1e-2, momentum=0.0),
    ],
}
SELECTIVE = {
    "adamw": [AdamW(0.1, 0.3, decay=form) for form in (L1, L1L2, MIN)],
    "sgd": [SGD(0.1, 0.3, decay=form) for form in (L1, L1L2, MIN)],
}
SELECTIVE["adamw"].append(AdamW(0.1, 0.3, maximize=True, decay=CAUTIOUS))
SELECTIVE["sgd"].append(SGD(0.1, 0.3, nesterov=True, decay=CAUTIOUS))
# Elements by which param, three moments and grad are off a boundary.
OFFSETS = ["1 0 0 0 0", "0 2 1 3 0", "0 0 0 0 1", "3 3 3 3 3", "8 8 8 8 8"]


class Model:
    """Tensors of one recipe with random contents, each between sevens; their state and table."""

    def __init__(
        self,
        recipe: Recipe,
        sizes: list[int],
        groups: list[Any] | None = None,
        offsets: str = OFFSETS[-1],
        counted: bool = True,
    ) -> None:
        self.recipe, self.sizes, self.groups = recipe, sizes, groups or GROUPS[recipe.rule]
        self.offsets = [int(n) for n in offsets.split()]
        self.generator = torch.Generator().manual_seed(0)
        group_of = [index % len(self.groups) for index in range(len(sizes))]
        moments = zip(MOMENTS[recipe.rule], recipe.moments, strict=False)
        named = {"param": recipe.param, **dict(moments)}
        self.states: Lists = {
            name: [self.view(numel, dtype, offset).zero_() for numel in sizes]
            for (name, dtype), offset in zip(named.items(), self.offsets, strict=False)
        }
        for param in self.states["param"]:
            param.copy_(self.random(param.numel()))
        self.steps = [torch.zeros((), device=DEVICE) for _ in sizes] if counted else []
        operands = [*self.states.values()]
        operands += [None] * (kernel.STABLE - len(operands))
        self.table = kernel.TensorTable(operands, self.steps or None, group_of, DEVICE)

    @staticmethod
    def view(numel: int, dtype: torch.dtype, offset: int) -> Tensor:
        return torch.full((offset + numel + 64,), 7, dtype=dtype, device=DEVICE)[offset:][:numel]

    def random(self, numel: int) -> Tensor:
        decades = 1 if f16 in self.recipe else 3  # of magnitudes, on either side of 1
        exponents = (torch.rand(numel, generator=self.generator, dtype=f64) * 2 - 1) * decades
        return torch.randn(numel, generator=self.generator, dtype=f64) * 10**exponents

    def gradients(self, without: tuple[int, ...] = ()) -> list[Tensor | None]:
        views = [self.view(n, self.recipe.grad, self.offsets[4]) for n in self.sizes]
        filled = (view.copy_(self.random(view.numel())) for view in views)
        return [None if index in without else grad for index, grad in enumerate(filled)]

    def step(self, grads: list[Tensor | None], **scales: float) -> None:
        addresses = torch.tensor([0 if g is None else g.data_ptr() or 1 for g in grads])
        hypers = b"".join(group.pack() for group in self.groups)
        tensors = {name: torch.tensor(x, device=DEVICE) for name, x in scales.items()}
        if any(group.decay == MIN for group in self.groups):
            tensors["least"] = self.least(addresses)
        kernel.launch(self.table, addresses, hypers, recipe=self.recipe, **tensors)

    def least(self, addresses: Tensor) -> Tensor:
        """What the launch is told of the smallest magnitudes."""
        least = torch.zeros(len(self.sizes) + self.table.programs, dtype=f64, device=DEVICE)
        hypers = b"".join(group.pack() for group in self.groups)
        kernel.least_magnitudes(self.table, addresses, hypers, least, recipe=self.recipe)
        return least

    def group_of(self, index: int) -> Any:
        return self.groups[index % len(self.groups)]

    def snapshot(self) -> Lists:
        lists = {**self.states, **({"step": self.steps} if self.steps else {})}
        return {name: [t.clone().cpu() for t in tensors] for name, tensors in lists.items()}

    def assert_untouched_around(self) -> None:
        """What lies around the tensors is as it was, and no arrival is left over."""
        assert not self.table.arrivals.any()
        for t in (t for tensors in self.states.values() for t in tensors):
            whole = t.new_empty(0).set_(t.untyped_storage())
            around = (whole[: t.storage_offset()], whole[t.storage_offset() + t.numel() :])
            assert (torch.cat(around) == 7).all()


def assert_same_bits(actual: Lists, expected: Lists) -> None:
    for name, tensors in expected.items():
        for index, tensor in enumerate(tensors):
            found, want = (t.reshape(-1).view(torch.uint8) for t in (actual[name][index], tensor))
            assert found.equal(want), f"{name} of {index}"
