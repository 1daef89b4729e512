"""The Triton kernel's steps, in Triton's interpreter or on a GPU.

Triton decides when it is imported whether it interprets. Tests of one kind are therefore skipped in
a process of the other kind, and `test_in_the_other_mode` runs them in a process of their own.
"""

import ctypes
import os
import shutil
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

pytest.importorskip("triton")
from support import interpreter
from support.triton_model import (
    COUPLED,
    DEVICE,
    GROUPS,
    OFFSETS,
    RECIPES,
    SELECTIVE,
    SGD,
    AdamW,
    Lists,
    Model,
    Recipe,
    adamw,
    assert_same_bits,
    bf16,
    f16,
    f32,
    f64,
    kernel,
    runs,
    sgd,
)

NESTED = "WARPSTEP_TEST_NESTED"
if kernel.INTERPRETED:
    interpreter.fuse_multiply_adds()
    if NESTED in os.environ:
        interpreter.look_up_once()
KERNELS = Path(__file__).parents[1] / "kernels"

# What a step makes of a tensor: a name, its value, and how far a result may be from it.
Bounds = Iterator[tuple[str, Tensor, Tensor]]


def gradient(
    hyper: Any, p: Tensor, grad: Tensor, scale: float, u: float
) -> tuple[Tensor, Tensor, Tensor]:
    """What the rule's formula sees of a gradient, the size of its terms, and its error."""
    g = (-grad if hyper.maximize else grad).double() / scale
    coupled = float(hyper.weight_decay) if hyper.decay == COUPLED else 0.0
    size = g.abs() + coupled * p.abs()
    return g + coupled * p, size, 5 * u * size


def adamw_oracle(h: AdamW, old: dict[str, Tensor], grad: Tensor, t: int, scale: float) -> Bounds:
    """Textbook AdamW in float64 from the state as stored.

    Bounds are those of one step: no error of a step before enters. u is half an ulp, relative, of
    the type computed in; a line's bound is what its operations may round off and what it inherits,
    to first order, where interpreted multiply-adds round twice and, to check float64, the oracle
    rounds as well.
    """
    lr, weight_decay, beta1, beta2, eps = map(float, h[:5])
    u64 = torch.finfo(f64).eps / 2
    u = unit_of(old["param"].dtype)
    p, m, v = (old[name].double() for name in ("param", "exp_avg", "exp_avg_sq"))
    g, size_g, error_g = gradient(h, p, grad, scale, u)
    new_m = beta1 * m + (1 - beta1) * g
    error_m = 5 * u * (m.abs() + size_g) + error_g
    new_v = beta2 * v + (1 - beta2) * g * g
    error_v = 6 * u * (v + (1 - beta2) * size_g**2) + (1 - beta2) * 2 * size_g * error_g
    peak = torch.maximum(old.get("max_exp_avg_sq", torch.zeros(())).double(), new_v)
    correction1, correction2 = 1 - beta1**t, 1 - beta2**t
    denominator = (peak / correction2).sqrt() + eps
    update = lr * new_m / correction1 / denominator
    error_root = torch.where(peak > 0, error_v / (2 * peak.sqrt() * correction2**0.5), 0.0)
    error_update = lr / correction1 * error_m / denominator
    # A power is some products, all at most 1; the corrections are what it leaves of 1.
    error_corrections = (2 * t.bit_length() + 2) * u64 * (1 / correction1 + 1 / correction2)
    error_update += update.abs() * (error_root / denominator + 8 * u + error_corrections)
    decay = lr * weight_decay * p * (h.decay != COUPLED)
    new_p = p - decay - update
    yield "param", new_p, error_update + 3 * u * (decay.abs() + new_p.abs())
    yield "exp_avg", new_m, error_m
    yield "exp_avg_sq", new_v, error_v
    yield "max_exp_avg_sq", peak, error_v


def sgd_oracle(h: SGD, old: dict[str, Tensor], grad: Tensor, t: int, scale: float) -> Bounds:
    """torch.optim.SGD in float64 from the state as stored; bounds as adamw_oracle's."""
    lr, weight_decay, momentum, dampening, nesterov = map(float, h[:5])
    momentum *= "momentum_buffer" in old
    u = unit_of(old["param"].dtype)
    p = old["param"].double()
    coupled, decoupled = (weight_decay, 0.0) if h.decay == COUPLED else (0.0, weight_decay)
    nesterov, dampening = bool(nesterov and momentum), dampening * (momentum != 0)
    param = torch.nn.Parameter(p.clone())
    param.grad = grad.double() / scale
    reference = torch.optim.SGD([param], lr, momentum, dampening, coupled, maximize=h.maximize)
    reference.param_groups[0]["nesterov"] = nesterov  # torch refuses it beside a dampening
    if momentum and t > 1:
        reference.state[param]["momentum_buffer"] = old["momentum_buffer"].double()
    reference.step()
    decay = lr * decoupled * p
    new_p = param.detach() - decay

    _, size, error = gradient(h, p, grad, scale, u)
    if momentum:
        b, weight = (old["momentum_buffer"].double(), 1 - dampening) if t > 1 else (0 * p, 1.0)
        size_b = (momentum * b).abs() + weight * size
        error_b = 5 * u * size_b + weight * error
        yield "momentum_buffer", reference.state[param]["momentum_buffer"], error_b
        if nesterov:
            size, error = size + momentum * size_b, error + momentum * error_b
            error += 4 * u * size
        else:
            size, error = size_b, error_b
    yield "param", new_p, lr * (error + 3 * u * size) + 3 * u * (decay.abs() + new_p.abs())


ORACLES = {"adamw": adamw_oracle, "sgd": sgd_oracle}


def unit_of(param: torch.dtype) -> float:
    """Half an ulp of the type that is computed in; for float64, of the oracle's too."""
    return torch.finfo(f64).eps if param == f64 else torch.finfo(f32).eps / 2


def assert_step(model: Model, old: Lists, grads: list[Tensor | None], scale: float = 1.0) -> None:
    """The oracle's step of each tensor, stored: by half an ulp, or half its smallest number."""
    new = model.snapshot()
    for index, grad in enumerate(grads):
        before, after = ({n: ts[index] for n, ts in lists.items()} for lists in (old, new))
        if grad is None:
            assert_same_bits({n: [x] for n, x in after.items()}, {n: [before[n]] for n in before})
            continue
        t = int(before["step"]) + 1
        assert after["step"] == t
        found = ORACLES[model.recipe.rule](model.group_of(index), before, grad.cpu(), t, scale)
        for name, value, bound in found:
            if name not in after:
                continue
            info = torch.finfo(after[name].dtype)
            bound += value.abs() * info.eps / 2 * (1 + 1e-6) + info.smallest_normal * info.eps / 2
            right = (after[name].double() - value).abs() <= bound
            assert right.all(), f"{name} of {index} at step {t}: {(~right).nonzero().flatten()}"
    model.assert_untouched_around()


@runs
@pytest.mark.parametrize("recipe", RECIPES, ids=str)
def test_steps_agree_with_the_oracle(recipe: Recipe) -> None:
    # Sizes around the vector, the granule and the block; groups of every kind, in one launch.
    sizes = [1, 3, 17, 1025, 4097, 0, 16, 5, 64, 4096, 33]
    model = Model(recipe, sizes)
    for step in range(5):
        old, grads = model.snapshot(), model.gradients(without=(3, 5) if step == 2 else ())
        launches = kernel.launches
        model.step(grads)
        assert kernel.launches == launches + 1
        assert_step(model, old, grads)
    assert [int(s) for s in model.steps] == [5, 5, 5, 4, 5, 4, 5, 5, 5, 5, 5]


@runs
@pytest.mark.parametrize("offsets", OFFSETS)
@pytest.mark.parametrize(
    "recipe", [adamw(f32, amsgrad=True), adamw(bf16, bf16, f32), sgd(f32)], ids=str
)
def test_misaligned_views(recipe: Recipe, offsets: str) -> None:
    model = Model(recipe, [1, 17, 2049], offsets=offsets)
    for scale in (1.0, 3.0):
        old, grads = model.snapshot(), model.gradients()
        model.step(grads, grad_scale=scale, found_inf=0.0)
        assert_step(model, old, grads, scale)


@runs
@pytest.mark.parametrize("recipe", [adamw(bf16), sgd(bf16)], ids=str)
def test_bits_do_not_depend_on_chunks_and_blocks(
    recipe: Recipe, monkeypatch: pytest.MonkeyPatch
) -> None:
    snapshots = []
    for chunk, block in [(16384, 4096), (1024, 4096), (16384, 256), (1024, 512)]:
        monkeypatch.setattr(kernel, "CHUNKS", (chunk,))
        monkeypatch.setattr(kernel, "INTERPRETER_BLOCK", block)
        model = Model(recipe, [4097, 1, 1024])
        for step in range(3):
            model.step(model.gradients())
            assert [int(s) for s in model.steps] == [step + 1] * 3
            assert not model.table.arrivals.any()
        snapshots.append(model.snapshot())
        assert_same_bits(snapshots[-1], snapshots[0])


RULE_CPP = r"""
#include "formats.h"
#include "rules/adamw.h"
#include "rules/sgd.h"
#include "tail.h"
using namespace warpstep;
extern "C" void run(const Hyper* hyper, float step, float grad_scale, long numel, FORMAT* param,
                    FORMAT* const* moments, const FORMAT* grad) {
  Tail tail{};
  tail.grad_scale = &grad_scale;
  float least = kInfinity;
  for (long i = 0; i < numel; ++i) least = minimum(least, std::fabs(load(param[i])));
  const auto c = constants_of<RULE, float>(*hyper, step, least, tail);
  for (long i = 0; i < numel; ++i) {
    float numbers[RULE::kMoments + 1];
    for (std::uint32_t k = 0; k < RULE::kMoments; ++k) numbers[k] = load(moments[k][i]);
    store(stepped<RULE, Part::whole>(c, load(param[i]), load(grad[i]), numbers), param[i]);
    for (std::uint32_t k = 0; k < RULE::kMoments; ++k) store(numbers[k], moments[k][i]);
  }
}
extern "C" float uncounted() { return kUncounted; }
"""
RULES = {"AdamW<false>": adamw, "AdamW<true>": lambda x: adamw(x, amsgrad=True)}
RULES |= {"Sgd<true>": sgd, "Sgd<false>": lambda x: sgd(x, momentum=False)}


@runs
@pytest.mark.parametrize("dtype", [f32, bf16, f16], ids=str)
@pytest.mark.parametrize("rule", RULES)
def test_same_bits_as_in_cpp(rule: str, dtype: torch.dtype, tmp_path: Path) -> None:
    compiler = shutil.which("c++") or pytest.skip("needs a C++ compiler")
    flags = ["-std=c++17", "-shared", "-fPIC", "-ffp-contract=off"]
    flags += [f"-DFORMAT={str(dtype)[6:]}", f"-DRULE={rule}", f"-I{KERNELS}"]
    command = [compiler, *flags, "-xc++", "-", "-o", str(tmp_path / "rule.so")]
    subprocess.run(command, input=RULE_CPP.encode(), check=True)
    library = ctypes.CDLL(str(tmp_path / "rule.so"))
    library.uncounted.restype = ctypes.c_float
    recipe = RULES[rule](dtype)
    groups = GROUPS[recipe.rule] + SELECTIVE[recipe.rule]
    if DEVICE != "cpu":  # whose addresses C++ cannot read
        groups = [group for group in groups if not any(isinstance(x, Tensor) for x in group)]
    for counted in (True, False):
        model = Model(recipe, [3000] * len(groups), groups, counted=counted)
        for step in range(12 if counted else 3):
            expected, grads = model.snapshot(), model.gradients()
            moments = [
                tensors for name, tensors in expected.items() if name not in ("param", "step")
            ]
            for index, group in enumerate(groups):
                addresses = [ctypes.c_void_p(tensors[index].data_ptr()) for tensors in moments]
                pointers = (ctypes.c_void_p * 3)(*addresses)
                param, grad = expected["param"][index], grads[index].cpu()
                before = ctypes.c_float(step if counted else library.uncounted())
                scale, numel = ctypes.c_float(3), ctypes.c_long(3000)
                tensors = (ctypes.c_void_p(param.data_ptr()), pointers)
                tensors = (*tensors, ctypes.c_void_p(grad.data_ptr()))
                library.run(group.pack(), before, scale, numel, *tensors)
                if counted:
                    expected["step"][index] += 1
            model.step(grads, grad_scale=3.0)
            assert_same_bits(model.snapshot(), expected)


@runs
@pytest.mark.parametrize("recipe", [adamw(f32, amsgrad=True), sgd(f32)], ids=str)
@pytest.mark.parametrize("found_inf", [1.0, 2.0, torch.inf, torch.nan])
def test_found_inf_leaves_everything_alone(recipe: Recipe, found_inf: float) -> None:
    model = Model(recipe, [0, 1, 17, 20000])
    model.step(model.gradients())
    old = model.snapshot()
    model.step(model.gradients(), found_inf=found_inf)
    launches = kernel.launches
    model.step([None] * 4)
    assert kernel.launches == launches
    assert_same_bits(model.snapshot(), old)


@runs
@pytest.mark.filterwarnings("ignore::RuntimeWarning")  # of NumPy, in the interpreter
@pytest.mark.parametrize("recipe", RECIPES, ids=str)
def test_nan_and_inf_propagate(recipe: Recipe) -> None:
    """As in torch's for-loop implementation."""
    special = torch.tensor([torch.nan, torch.inf, -torch.inf, 0.0, 1.0], dtype=f64)
    is_adamw, with_peak = recipe.rule == "adamw", len(recipe.moments) == 3
    momentum = 0.9 if recipe.moments else 0.0
    group = AdamW(lr=0.5) if is_adamw else SGD(0.5, 0.01, momentum, nesterov=bool(momentum))
    model = Model(recipe, [25], [group])
    model.states["param"][0].fill_(1)
    param = torch.nn.Parameter(torch.ones(25, dtype=f64))
    if is_adamw:
        reference = torch.optim.AdamW([param], lr=0.5, amsgrad=with_peak, foreach=False)
    else:
        options = {"momentum": momentum, "nesterov": bool(momentum), "foreach": False}
        reference = torch.optim.SGD([param], lr=0.5, weight_decay=0.01, **options)
    for values in torch.cartesian_prod(special, special).T.contiguous():
        if with_peak and reference.state:  # a maximum may be NaN where exp_avg_sq is not
            reference.state[param]["exp_avg_sq"].zero_()
            model.states["exp_avg_sq"][0].zero_()
        param.grad = values
        model.step([values.to(DEVICE, recipe.grad)])
        reference.step()
        for name, (found,) in model.states.items():
            want = param.detach() if name == "param" else reference.state[param][name]
            assert found.cpu().isnan().equal(want.isnan()), name
            assert found.cpu().isinf().equal(want.isinf()), name


@pytest.mark.slow
@pytest.mark.skipif(NESTED in os.environ, reason="this is the other process")
def test_in_the_other_mode() -> None:
    interpret = "0" if kernel.INTERPRETED else "1"
    environment = {**os.environ, NESTED: "1", "TRITON_INTERPRET": interpret, "PYTEST_ADDOPTS": ""}
    command = [sys.executable, "-m", "pytest", "-q", "--noconftest", "-p", "no:cacheprovider"]
    files = [Path(__file__), Path(__file__).with_name("test_triton_code.py")]
    command += ["-c", os.devnull, "--rootdir", str(KERNELS.parent), *map(str, files)]
    result = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
    assert result.returncode == 0, result.stdout + result.stderr
    assert " passed" in result.stdout
