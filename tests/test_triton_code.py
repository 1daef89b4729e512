"""The Triton kernels' machine code, for GPUs that are not here."""

import math
import re
import subprocess
from pathlib import Path

import pytest
import torch

pytest.importorskip("triton")
from support.triton_model import (
    LOW_PRECISION,
    RECIPES,
    Recipe,
    adamw,
    bf16,
    compiles,
    f32,
    f64,
    kernel,
    sgd,
)

TARGETS = ["cuda 80 32", "cuda 90 32", "hip gfx942 64"]
H100 = kernel.GPUTarget("cuda", 90, 32)


def target_of(text: str) -> kernel.GPUTarget:
    return kernel.GPUTarget(*(int(x) if x.isdigit() else x for x in text.split()))


@compiles
@pytest.mark.parametrize("target", TARGETS)
@pytest.mark.parametrize("recipe", [*RECIPES, *LOW_PRECISION], ids=str)
def test_compiled_code(recipe: Recipe, target: str, tmp_path: Path) -> None:
    # Two loops make accesses of 16 bytes; in one of them the gradient is not aligned. Of codes a
    # thread takes eight bytes.
    kept = [one if isinstance(one, torch.dtype) else one.dtype for one in recipe.moments]
    kept = [dtype for dtype in kept if dtype != torch.uint8]
    kept += [recipe.param if isinstance(recipe.param, torch.dtype) else recipe.param.dtype]
    kept += [torch.int16] if recipe.has_master else []
    copied = 0 if recipe.copy is None else recipe.copy.itemsize
    vectors = 2 * kernel.THREAD_ELEMENTS * sum(dtype.itemsize for dtype in kept) // 16
    loads = vectors + kernel.THREAD_ELEMENTS * recipe.grad.itemsize // 16
    stores = vectors + 2 * kernel.THREAD_ELEMENTS * copied // 16
    code = kernel.compile_for(target_of(target), recipe)
    assert not code.metadata.enable_fp_fusion
    if target.startswith("hip"):
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
    assert recipe.has_master or bf16 not in (recipe.param, *recipe.moments) or "cvt.rn.bf16" in ptx
    cubin = tmp_path / "kernel.cubin"
    cubin.write_bytes(code.asm["cubin"])
    command = [kernel.triton.knobs.nvidia.cuobjdump.path, "-res-usage", "-sass", str(cubin)]
    sass = subprocess.run(command, check=True, capture_output=True, text=True).stdout
    assert re.search(r"STACK:0 .*LOCAL:0 ", sass)
    assert not re.search(r"\b(LDL|STL)\b", sass)
    assert sass.count("LDG.E.128") == loads
    assert sass.count("STG.E.128") == stores
    # Four programs a multiprocessor, of 65,536 registers; in float64 three with Triton 3.6.
    programs = 3 if recipe.param == f64 and kernel.triton.__version__.startswith("3.6.") else 4
    assert int(re.findall(r"REG:(\d+)", sass)[0]) <= 65_536 // programs // (32 * kernel.NUM_WARPS)


@compiles
@pytest.mark.parametrize("recipe", LOW_PRECISION, ids=str)
def test_random_bits_and_numbers_of_blocks_stay_in_their_thread(recipe: Recipe) -> None:
    """In the loops over whole vectors.

    Float32 operands beside 16-bit ones change threads: Triton writes those 16 bytes at a time.
    """
    code = kernel.compile_for(H100, recipe).asm["ttgir"]
    block = kernel.block_of(H100)
    moved = re.findall(r"ttg.convert_layout .* : tensor<(\S+)x(\w+), .* -> ", code)
    shapes = [([int(size) for size in shape.split("x")], kind) for shape, kind in moved]
    # Other loops take half a block, or fewer.
    kinds = {kind for s, kind in shapes if math.prod(s) >= block or s[0] == block // 8}
    assert kinds <= ({"f32"} if f32 in (recipe.param, *recipe.moments) else set())


@compiles
@pytest.mark.parametrize("target", TARGETS[1:])  # as many registers as sm_80 has: seconds each
@pytest.mark.parametrize(
    "recipe",
    [
        adamw(f32, amsgrad=True, ema=f32),
        adamw(bf16, bf16, f32, ema=f32),
        adamw(f64),
        sgd(bf16)._replace(ema=f32),
        *(recipe._replace(ema=f32) for recipe in LOW_PRECISION[2:5]),
    ],
    ids=str,
)
def test_compiled_code_with_the_tail(recipe: Recipe, target: str) -> None:
    """All of it at once compiles, computes as IEEE says, and spills nothing."""
    gpu = target_of(target)
    whole = kernel.Tail(True, True, False, True, True)
    codes = [
        kernel.compile_for(gpu, recipe, tail)
        for tail in (whole, whole._replace(zero_grads=False, unscale_grads=True))
    ]
    codes += [kernel.compile_grad_norm_for(gpu, recipe, largest) for largest in (False, True)]
    codes.append(kernel.compile_least_magnitude_for(gpu, recipe))
    for code in codes:
        if gpu.backend == "hip":
            text = code.asm["amdgcn"]
            # Scalar registers go to lanes of vector registers, where there are too many.
            spilt = r"\.(?:vgpr_spill_count|private_segment_fixed_size): +(\d+)"
            assert set(re.findall(spilt, text)) == {"0"}
        else:
            assert not re.search(r"\.(ftz|approx|full)\b", code.asm["ptx"])
            assert not re.search(r"\b(ld|st)\.local\b", code.asm["ptx"])


@compiles
@pytest.mark.parametrize("recipe", [adamw(f32, amsgrad=True, ema=f32), sgd(f32)], ids=str)
def test_all_operands_are_asked_for_before_any_is_written(recipe: Recipe) -> None:
    """A load behind a store, which may be of the same memory, would wait for memory alone."""
    tail = kernel.NO_TAIL._replace(statistics=True, unscale_grads=True)
    ptx = kernel.compile_for(H100, recipe, tail).asm["ptx"]
    blocks = [re.findall(r"\b(ld|st)\.global\.v4", block) for block in ptx.split("$L__BB")]
    vectors = 4 * kernel.THREAD_ELEMENTS // 16  # of one operand
    loops = [block for block in blocks if len(block) > vectors]
    # In the second the gradient is not aligned, and not accessed in vectors.
    operands = 2 + len(recipe.moments) + (recipe.ema is not None)
    counts = (operands, operands - 1)
    assert loops == [["ld"] * n * vectors + ["st"] * n * vectors for n in counts]


@compiles
@pytest.mark.parametrize("largest", [False, True])
def test_the_norms_last_program_asks_for_many_shares_at_once(largest: bool) -> None:
    """They are thousands, and it waits for each batch of them."""
    ptx = kernel.compile_grad_norm_for(H100, adamw(f32), largest).asm["ptx"]
    assert len(re.findall(r"ld\.volatile\.global\S*64", ptx)) == 4 * kernel.THREAD_ELEMENTS
