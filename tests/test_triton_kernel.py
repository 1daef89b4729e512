"""The Triton kernel: its steps in Triton's interpreter or on a GPU, and its code for GPUs not here.

Triton decides when it is imported whether it interprets. Tests of one kind are therefore skipped in
a process of the other kind, and `test_in_the_other_mode` runs them in a process of their own.
"""

import ctypes
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from support import interpreter
from support.triton_arguments import Hyper, Recipe, bf16, f16, f32, f64

pytest.importorskip("triton")
from warpstep.kernels import launch_triton as kernel

NESTED = "WARPSTEP_TEST_NESTED"
KERNELS = Path(__file__).parents[1] / "kernels"

DEVICE = "cpu" if kernel.INTERPRETED else "cuda" if torch.cuda.is_available() else None
runs = pytest.mark.skipif(DEVICE is None, reason="Triton compiles in this process, and for no GPU")
compiles = pytest.mark.skipif(kernel.INTERPRETED, reason="Triton interprets in this process")


AMSGRAD, MIXED = Recipe(f32, f32, f32, True), Recipe(bf16, bf16, f32)
RECIPES = [Recipe(x, x, x) for x in (f64, f32, bf16, f16)]
RECIPES += [AMSGRAD, MIXED, Recipe(bf16, bf16, bf16, True)]
RECIPES += [Recipe(bf16, f32, f32), Recipe(f32, f32, bf16)]


# Among them: weights on both sides of lerp's middle, no decay, coupled decay, maximize, addresses.
GROUPS = [
    Hyper(),
    Hyper(lr=3e-2, beta1=0.3, beta2=0.45, eps=1e-3, weight_decay=0.1, maximize=True),
    Hyper(lr=0.1, beta1=0.0, beta2=0.95, weight_decay=0.3, decoupled=False),
    Hyper(torch.tensor(2e-3).to(DEVICE), 0.8, torch.tensor(0.99, dtype=f64).to(DEVICE)),
    Hyper(weight_decay=0.0, decoupled=False),
]
# Elements by which param, exp_avg, exp_avg_sq, max_exp_avg_sq and grad are off a boundary.
OFFSETS = ["1 0 0 0 0", "0 2 1 3 0", "0 0 0 0 1", "3 3 3 3 3", "8 8 8 8 8"]
NAMES = ("param", "exp_avg", "exp_avg_sq", "max_exp_avg_sq")
Lists = dict[str, list[Tensor]]


class Model:
    """Tensors of one recipe with random contents, each between sevens; their state and table."""

    def __init__(
        self, recipe: Recipe, sizes: list[int], groups: list[Hyper], offsets: str = OFFSETS[-1]
    ) -> None:
        self.recipe, self.sizes, self.groups = recipe, sizes, groups
        self.offsets = [int(n) for n in offsets.split()]
        self.generator = torch.Generator().manual_seed(0)
        group_of = [index % len(groups) for index in range(len(sizes))]
        dtypes = (recipe.param, *[recipe.moment] * (3 if recipe.amsgrad else 2))
        self.states: Lists = {
            name: [self.view(numel, dtype, offset).zero_() for numel in sizes]
            for name, dtype, offset in zip(NAMES, dtypes, self.offsets, strict=False)
        }
        for param in self.states["param"]:
            param.copy_(self.random(param.numel()))
        self.steps = [torch.zeros((), device=DEVICE) for _ in sizes]
        streams = [*map(self.states.get, NAMES), None]
        self.table = kernel.TensorTable(*streams, self.steps, group_of, DEVICE)

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
        kernel.launch(self.table, addresses, hypers, recipe=self.recipe, **tensors)

    def snapshot(self) -> Lists:
        streams = {**self.states, "step": self.steps}
        return {name: [t.clone().cpu() for t in stream] for name, stream in streams.items()}


def assert_same_bits(actual: Lists, expected: Lists) -> None:
    for name, tensors in expected.items():
        for index, tensor in enumerate(tensors):
            found, want = (t.reshape(-1).view(torch.uint8) for t in (actual[name][index], tensor))
            assert found.equal(want), f"{name} of {index}"


def oracle(hyper: Hyper, old: dict[str, Tensor], grad: Tensor, t: int, grad_scale: float) -> Any:
    """Textbook AdamW in float64 from the state as stored, and how far a result may be from it.

    Bounds are those of one step: no error of a step before enters. u is half an ulp, relative, of
    the type computed in; a line's bound is what its operations may round off and what it inherits,
    to first order, where interpreted multiply-adds round twice and, to check float64, the oracle
    rounds as well. Storing adds half an ulp of the format, or half its smallest subnormal number.
    """
    lr, beta1, beta2 = map(float, hyper[:3])
    u64 = torch.finfo(f64).eps / 2
    u = 2 * u64 if old["param"].dtype == f64 else torch.finfo(f32).eps / 2
    p, m, v, g = (x.double() for x in (old["param"], old["exp_avg"], old["exp_avg_sq"], grad))
    g = (-g if hyper.maximize else g) / grad_scale
    coupled = 0.0 if hyper.decoupled else hyper.weight_decay
    g, size_g = g + coupled * p, g.abs() + coupled * p.abs()
    error_g = 5 * u * size_g
    new_m = beta1 * m + (1 - beta1) * g
    error_m = 5 * u * (m.abs() + size_g) + error_g
    new_v = beta2 * v + (1 - beta2) * g * g
    error_v = 6 * u * (v + (1 - beta2) * size_g**2) + (1 - beta2) * 2 * size_g * error_g
    peak = torch.maximum(old.get("max_exp_avg_sq", torch.zeros(())).double(), new_v)
    correction1, correction2 = 1 - beta1**t, 1 - beta2**t
    denominator = (peak / correction2).sqrt() + hyper.eps
    update = lr * new_m / correction1 / denominator
    error_root = torch.where(peak > 0, error_v / (2 * peak.sqrt() * correction2**0.5), 0.0)
    error_update = lr / correction1 * error_m / denominator
    # A power is some products, all at most 1; the corrections are what it leaves of 1.
    error_corrections = (2 * t.bit_length() + 2) * u64 * (1 / correction1 + 1 / correction2)
    error_update += update.abs() * (error_root / denominator + 8 * u + error_corrections)
    decay = lr * hyper.weight_decay * p * hyper.decoupled
    new_p = p - decay - update
    error_p = error_update + 3 * u * (decay.abs() + new_p.abs())
    errors = (error_p, error_m, error_v, error_v)
    for name, value, error in zip(NAMES, (new_p, new_m, new_v, peak), errors, strict=True):
        if name in old:
            info = torch.finfo(old[name].dtype)
            half_ulp = value.abs() * info.eps / 2 * (1 + 1e-6) + info.smallest_normal * info.eps / 2
            yield name, value, error + half_ulp


def assert_step(model: Model, old: Lists, grads: list[Tensor | None], scale: float = 1.0) -> None:
    new = model.snapshot()
    for index, grad in enumerate(grads):
        before, after = ({n: ts[index] for n, ts in lists.items()} for lists in (old, new))
        if grad is None:
            assert_same_bits({n: [x] for n, x in after.items()}, {n: [before[n]] for n in before})
            continue
        t = int(before["step"]) + 1
        assert after["step"] == t
        group = model.groups[index % len(model.groups)]
        for name, value, bound in oracle(group, before, grad.cpu(), t, scale):
            right = (after[name].double() - value).abs() <= bound
            assert right.all(), f"{name} of {index} at step {t}: {(~right).nonzero().flatten()}"
    assert not model.table.arrivals.any()
    for t in (t for tensors in model.states.values() for t in tensors):
        whole = t.new_empty(0).set_(t.untyped_storage())
        around = (whole[: t.storage_offset()], whole[t.storage_offset() + t.numel() :])
        assert (torch.cat(around) == 7).all()


@runs
@pytest.mark.parametrize("recipe", RECIPES, ids=str)
def test_steps_agree_with_the_oracle(recipe: Recipe) -> None:
    # Sizes around the vector, the granule and the block; groups of every kind, in one launch.
    sizes = [1, 3, 17, 1025, 4097, 0, 16, 5, 64, 4096, 33]
    model = Model(recipe, sizes, GROUPS)
    for step in range(5):
        old, grads = model.snapshot(), model.gradients(without=(3, 5) if step == 2 else ())
        launches = kernel.launches
        model.step(grads)
        assert kernel.launches == launches + 1
        assert_step(model, old, grads)
    assert [int(s) for s in model.steps] == [5, 5, 5, 4, 5, 4, 5, 5, 5, 5, 5]


@runs
@pytest.mark.parametrize("offsets", OFFSETS)
@pytest.mark.parametrize("recipe", [AMSGRAD, MIXED], ids=str)
def test_misaligned_views(recipe: Recipe, offsets: str) -> None:
    model = Model(recipe, [1, 17, 2049], GROUPS, offsets)
    for scale in (1.0, 3.0):
        old, grads = model.snapshot(), model.gradients()
        model.step(grads, grad_scale=scale, found_inf=0.0)
        assert_step(model, old, grads, scale)


@runs
def test_bits_do_not_depend_on_chunks_and_blocks(monkeypatch: pytest.MonkeyPatch) -> None:
    snapshots = []
    for chunk, block in [(16384, 4096), (1024, 4096), (16384, 256), (1024, 512)]:
        monkeypatch.setattr(kernel, "CHUNKS", (chunk,))
        monkeypatch.setattr(kernel, "INTERPRETER_BLOCK", block)
        model = Model(Recipe(bf16, bf16, bf16), [4097, 1, 1024], GROUPS)
        for step in range(3):
            model.step(model.gradients())
            assert [int(s) for s in model.steps] == [step + 1] * 3
            assert not model.table.arrivals.any()
        snapshots.append(model.snapshot())
        assert_same_bits(snapshots[-1], snapshots[0])


RULE = r"""
#include "rule.h"
using namespace warpstep;
extern "C" void run(const Hyper* hyper, float step, float grad_scale, long numel, FORMAT* param,
                    FORMAT* m, FORMAT* v, FORMAT* peak, const FORMAT* grad) {
  Tail tail{};
  tail.grad_scale = &grad_scale;
  const Constants<float> c = constants_of<float>(*hyper, step, tail);
  for (long i = 0; i < numel; ++i) {
    Moments<float> moments{load(m[i]), load(v[i]), load(peak[i])};
    store(adamw_rule<true, Part::whole>(c, load(param[i]), load(grad[i]), moments), param[i]);
    store(moments.exp_avg, m[i]);
    store(moments.exp_avg_sq, v[i]);
    store(moments.max_exp_avg_sq, peak[i]);
  }
}
"""


@runs
@pytest.mark.parametrize("dtype", [f32, bf16, f16], ids=str)
def test_same_bits_as_rule_h(dtype: torch.dtype, tmp_path: Path) -> None:
    compiler = shutil.which("c++") or pytest.skip("needs a C++ compiler")
    flags = ["-std=c++17", "-shared", "-fPIC", "-ffp-contract=off", f"-DFORMAT={str(dtype)[6:]}"]
    command = [compiler, *flags, f"-I{KERNELS}", "-xc++", "-", "-o", str(tmp_path / "rule.so")]
    subprocess.run(command, input=RULE.encode(), check=True)
    run = ctypes.CDLL(str(tmp_path / "rule.so")).run
    if kernel.INTERPRETED:
        interpreter.fuse_multiply_adds()
    groups = [group for group in GROUPS if not any(isinstance(x, Tensor) for x in group)]
    model = Model(Recipe(dtype, dtype, dtype, True), [5000] * len(groups), groups)
    for step in range(20):
        expected, grads = model.snapshot(), model.gradients()
        for index, group in enumerate(groups):
            tensors = [*(expected[name][index] for name in NAMES), grads[index].cpu()]
            addresses = [ctypes.c_void_p(t.data_ptr()) for t in tensors]
            run(group.pack(), ctypes.c_float(step), ctypes.c_float(3), 5000, *addresses)
            expected["step"][index] += 1
        model.step(grads, grad_scale=3.0)
        assert_same_bits(model.snapshot(), expected)


@runs
@pytest.mark.parametrize("found_inf", [1.0, 2.0, torch.inf, torch.nan])
def test_found_inf_leaves_everything_alone(found_inf: float) -> None:
    model = Model(AMSGRAD, [0, 1, 17, 20000], GROUPS)
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
    model = Model(recipe, [25], [Hyper(lr=0.5)])
    model.states["param"][0].fill_(1)
    param = torch.nn.Parameter(torch.ones(25, dtype=f64))
    reference = torch.optim.AdamW([param], lr=0.5, amsgrad=recipe.amsgrad, foreach=False)
    for values in torch.cartesian_prod(special, special).T.contiguous():
        if recipe.amsgrad and reference.state:  # a maximum may be NaN where exp_avg_sq is not
            reference.state[param]["exp_avg_sq"].zero_()
            model.states["exp_avg_sq"][0].zero_()
        param.grad = values
        model.step([values.to(DEVICE, recipe.grad)])
        reference.step()
        for name, (found,) in model.states.items():
            want = param.detach() if name == "param" else reference.state[param][name]
            assert found.cpu().isnan().equal(want.isnan()), name
            assert found.cpu().isinf().equal(want.isinf()), name


@compiles
@pytest.mark.parametrize("target", ["cuda 80 32", "cuda 90 32", "hip gfx942 64"])
@pytest.mark.parametrize("recipe", RECIPES, ids=str)
def test_compiled_code(recipe: Recipe, target: str, tmp_path: Path) -> None:
    # Two loops make accesses of 16 bytes; in one of them the gradient is not aligned.
    moments = (2 + recipe.amsgrad) * recipe.moment.itemsize
    stores = 2 * kernel.THREAD_ELEMENTS * (recipe.param.itemsize + moments) // 16
    loads = stores + kernel.THREAD_ELEMENTS * recipe.grad.itemsize // 16
    backend, arch, warp_size = (int(x) if x.isdigit() else x for x in target.split())
    code = kernel.compile_for(kernel.GPUTarget(backend, arch, warp_size), recipe)
    assert not code.metadata.enable_fp_fusion
    if backend == "hip":
        text = code.asm["amdgcn"]
        spilt = r"\.(?:[sv]gpr_spill_count|private_segment_fixed_size): +(\d+)"
        assert re.findall(spilt, text) == ["0", "0", "0"]
        assert text.count("global_load_dwordx4") >= loads  # what is read of the tables as well
        assert text.count("global_store_dwordx4") == stores
        return

    # IEEE's division and root, nothing flushed, no contraction: constants have no fma at all.
    ptx = code.asm["ptx"]
    assert not re.search(r"\.(ftz|approx|full)\b", ptx)
    assert recipe.param == f64 or "fma.rn.f64" not in ptx
    assert bf16 not in recipe or "cvt.rn.bf16" in ptx
    cubin = tmp_path / "kernel.cubin"
    cubin.write_bytes(code.asm["cubin"])
    command = [kernel.triton.knobs.nvidia.cuobjdump.path, "-res-usage", "-sass", str(cubin)]
    sass = subprocess.run(command, check=True, capture_output=True, text=True).stdout
    assert re.search(r"STACK:0 .*LOCAL:0 ", sass)
    assert not re.search(r"\b(LDL|STL)\b", sass)
    assert sass.count("LDG.E.128") == loads
    assert sass.count("STG.E.128") == stores


@compiles
@pytest.mark.parametrize("target", ["cuda 80 32", "cuda 90 32", "hip gfx942 64"])
@pytest.mark.parametrize(
    "recipe",
    [Recipe(f32, f32, f32, True, f32), Recipe(bf16, bf16, f32, False, f32), Recipe(f64, f64, f64)],
    ids=str,
)
def test_compiled_code_with_the_tail(recipe: Recipe, target: str) -> None:
    """All of it at once compiles, computes as IEEE says, and spills nothing."""
    backend, arch, warp_size = (int(x) if x.isdigit() else x for x in target.split())
    gpu = kernel.GPUTarget(backend, arch, warp_size)
    whole = kernel.Tail(True, True, False, True, True)
    codes = [
        kernel.compile_for(gpu, recipe, tail)
        for tail in (whole, whole._replace(zero_grads=False, unscale_grads=True))
    ]
    codes += [kernel.compile_grad_norm_for(gpu, recipe, largest) for largest in (False, True)]
    for code in codes:
        if backend == "hip":
            text = code.asm["amdgcn"]
            spilt = r"\.(?:[sv]gpr_spill_count): +(\d+)"
            assert set(re.findall(spilt, text)) == {"0"}
        else:
            assert not re.search(r"\.(ftz|approx|full)\b", code.asm["ptx"])
            assert not re.search(r"\b(ld|st)\.local\b", code.asm["ptx"])


@compiles
def test_all_operands_are_asked_for_before_any_is_written() -> None:
    """A load behind a store, which may be of the same memory, would wait for memory alone."""
    target = kernel.GPUTarget("cuda", 90, 32)
    tail = kernel.NO_TAIL._replace(statistics=True, unscale_grads=True)
    ptx = kernel.compile_for(target, Recipe(f32, f32, f32, True, f32), tail).asm["ptx"]
    blocks = [re.findall(r"\b(ld|st)\.global\.v4", block) for block in ptx.split("$L__BB")]
    vectors = 4 * kernel.THREAD_ELEMENTS // 16  # of one operand
    loops = [block for block in blocks if len(block) > vectors]
    # In one of the two the gradient is not aligned, and not accessed in vectors.
    assert loops == [["ld"] * n * vectors + ["st"] * n * vectors for n in (5, 6)]


@compiles
@pytest.mark.parametrize("largest", [False, True])
def test_the_norms_last_program_asks_for_many_shares_at_once(largest: bool) -> None:
    """They are thousands, and it waits for each batch of them."""
    target = kernel.GPUTarget("cuda", 90, 32)
    ptx = kernel.compile_grad_norm_for(target, Recipe(f32, f32, f32), largest).asm["ptx"]
    assert len(re.findall(r"ld\.volatile\.global\S*64", ptx)) == 4 * kernel.THREAD_ELEMENTS


@pytest.mark.not_quick
@pytest.mark.skipif(NESTED in os.environ, reason="this is the other process")
def test_in_the_other_mode() -> None:
    interpret = "0" if kernel.INTERPRETED else "1"
    environment = {**os.environ, NESTED: "1", "TRITON_INTERPRET": interpret, "PYTEST_ADDOPTS": ""}
    command = [sys.executable, "-m", "pytest", "-q", "--noconftest", "-p", "no:cacheprovider"]
    command += ["-c", os.devnull, "--rootdir", str(KERNELS.parent), __file__]
    result = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
    assert result.returncode == 0, result.stdout + result.stderr
    assert " passed" in result.stdout
