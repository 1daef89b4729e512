"""The compiled CUDA code, read: 16-byte accesses, no local memory, for every architecture built."""

import itertools
import re
import shutil
import subprocess
import sys
from collections import Counter
from pathlib import Path

import pytest

from support.environment import EMULATED
from warpstep import backends

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

from bench import machine_code  # noqa: E402
from bench.machine_code import FORMAT_BYTES  # noqa: E402

pytestmark = pytest.mark.xdist_group("the machine code, which is read once")

# Instructions an element of the loop over aligned elements, of sm_80 or sm_90, whichever has more:
# of a step, and with the tail of one that averages, one with statistics, one with all of it. (SGD's
# shortest way with the tail is that of a step that is not taken: it has no root to be told by.)
BUDGETS = {
    "float32": (42, 63, 77, 80),
    "float32, bfloat16 moments": (43, 59, 71, 76),
    "bfloat16, float32 gradients, float32 moments": (43, 58, 71, 80),
    "bfloat16, float32 gradients": (45, 62, 75, 84),
    "bfloat16, float32 moments": (45, 69, 81, 88),
    "bfloat16": (46, 72, 85, 92),
    "float16, float32 gradients, float32 moments": (43, 57, 69, 76),
    "float16, float32 gradients": (43, 58, 71, 77),
    "float16, float32 moments": (42, 65, 76, 81),
    "float16": (44, 68, 78, 84),
    "float32, amsgrad": (46, 68, 79, 84),
    "bfloat16, amsgrad": (52, 82, 94, 102),
    "float16, amsgrad": (50, 73, 83, 89),
    "Sgd: bfloat16": (12,),
    "Sgd: bfloat16, momentum": (18,),
    "Sgd: float16": (10,),
    "Sgd: float16, momentum": (16,),
    "Sgd: float32": (10,),
    "Sgd: float32, momentum": (13,),
}

# Of the plain kernels through tiles that have formats of their own, by the machine code's table.
TILED_BUDGETS = {
    "bfloat16 with a residual, float32 moments": 39,
    "bfloat16 with a residual, bfloat16 and bfloat16_stochastic moments": 49,
    "bfloat16 with a residual, e4m3 and ue5m3 moments": 68,
    "bfloat16_stochastic, e4m3 and ue5m3 moments": 70,
    "float32, bfloat16 gradients, float32 moments, bfloat16 copy": 36,
}


@pytest.fixture(scope="module")
def kernels():
    native, _ = backends.native()
    if native is None or native.cuda_architectures is None or EMULATED:
        pytest.skip("the native module has no CUDA code")
    if missing := machine_code.missing_tool():
        pytest.skip(f"needs {missing}")
    return machine_code.read(native.__file__)


def name_of(kernel):
    return f"{kernel.architecture}: {kernel.name}"


def of_the_step(kernels):
    return [kernel for kernel in kernels if kernel.is_step]


def test_every_recipe_was_compiled_for_every_architecture(kernels):
    native, _ = backends.native()
    architectures = {kernel.architecture for kernel in kernels}
    built = {f"sm_{a.split('-')[0]}" for a in native.cuda_architectures.split()}
    assert architectures == built
    for architecture in architectures:
        here = [kernel for kernel in kernels if kernel.architecture == architecture]
        recipes = {kernel.recipe for kernel in of_the_step(here)}
        of_rule = Counter((recipe.rule, len(recipe.moments), recipe.tail) for recipe in recipes)
        kinds = {("AdamW", 2): 11, ("AdamW", 3): 4, ("Sgd", 1): 4, ("Sgd", 0): 4}
        assert of_rule == {(*kind, tail): n for kind, n in kinds.items() for tail in (False, True)}
        assert len([kernel for kernel in here if kernel.is_norm]) == len(FORMAT_BYTES)
        tiled = Counter(kernel.tiled.label for kernel in here if kernel.is_tiled)
        rules = ("AdamW of any formats", "AdamW of any formats, amsgrad")
        rules += ("Sgd of any formats", "Sgd of any formats, momentum")
        assert tiled == Counter([*TILED_BUDGETS, *rules, *(f"{rule}; tail" for rule in rules)])


def test_the_documents_table_is_of_these_kernels(kernels):
    """Of sm_90 by the nvcc that it names."""
    page = (ROOT / "docs" / "gpu.md").read_text()
    (version,) = set(re.findall(r"by nvcc (\d+\.\d+)", page))
    nvcc = shutil.which("nvcc")
    told = subprocess.run([nvcc, "--version"], capture_output=True, text=True) if nvcc else None
    here = [kernel for kernel in kernels if kernel.architecture == "sm_90"]
    if told is None or f"release {version}," not in told.stdout or not here:
        pytest.skip(f"needs nvcc {version}, and code for sm_90")
    shown = re.findall(r"^\| .*\d \|.* \|$", page, re.MULTILINE)
    assert len(shown) > 40
    assert set(shown) <= set(machine_code.table(here).splitlines())


def test_formats_have_the_numbers_of_the_kernels():
    layout = (ROOT / "kernels" / "layout.h").read_text()
    (body,) = re.findall(r"enum class Format [^{]*\{(.*?)\};", layout, re.DOTALL)
    assert re.findall(r"^ *(\w+)", body, re.MULTILINE) == machine_code.FORMATS


def test_aligned_streams_are_accessed_16_bytes_at_a_time(kernels):
    for kernel in of_the_step(kernels):
        recipe = kernel.recipe
        stores = recipe.vectors(recipe.param, *recipe.moments)
        loads = stores + recipe.vectors(recipe.grad)
        if recipe.tail:  # gradients are written, and averages of the parameter's format or float32
            averages = {recipe.param} | ({"float32"} if recipe.param != "float64" else set())
            stores = loads = loads + recipe.vectors(*averages)
        for kind, least in (("LDG", loads), ("STG", stores)):
            found = [c for c in kernel.hot_loop.code if c.kind == kind and c.moves_16_bytes]
            assert len(found) >= least, name_of(kernel)


def test_tiles_access_operands_of_16_bits_and_more_16_bytes_at_a_time(kernels):
    """In the loop over aligned elements, where only 8-bit codes and scales take fewer bytes."""
    for kernel in (kernel for kernel in kernels if kernel.is_tiled):
        tiled = kernel.tiled
        moments = {"AdamW": 2, "Sgd": 0}[tiled.rule] + tiled.more
        # Of any formats: each operand has at least one (of another format, the same may serve), and
        # is asked whether it has codes. Of these formats: in a quick way, and again in the one for
        # elements that are not usual.
        less = 8 * moments if tiled.param else 4 * moments + 10
        loads, stores = 2 + moments, 1 + moments
        if tiled.param:
            loads, stores = (2 * accesses for accesses in tiled.accesses)
        assert any(
            sum(c.kind == "LDG" and c.moves_16_bytes for c in loop.code) >= loads
            and sum(c.kind == "STG" and c.moves_16_bytes for c in loop.code) >= stores
            and sum(c.moves_less for c in loop.code) <= less
            for loop in kernel.loops
        ), name_of(kernel)


def test_an_iteration_waits_for_memory_once(kernels):
    """Every load, that of the average too, is under way before the first root is taken; where the
    rule has none, before the first product.
    """
    for kernel in kernels:
        if kernel.is_tiled and kernel.tiled.param is not None:
            kinds = [c.kind for c in kernel.hot_loop.code if c.kind in ("LDG", "MUFU")]
            turns = [kind for kind, _ in itertools.groupby(kinds)]
            assert turns == ["LDG", "MUFU"] * 2, name_of(kernel)  # two ways, one of which is taken
    for kernel in of_the_step(kernels):
        kinds = [c.kind for c in kernel.hot_loop.code]
        begins = {"MUFU"} if kernel.recipe.rule == "AdamW" else {"FMUL", "FFMA", "DMUL", "DFMA"}
        first = next(i for i, kind in enumerate(kinds) if kind in begins)
        assert "LDG" not in kinds[first:], name_of(kernel)


def test_registers_leave_room_for_as_many_blocks_as_intended(kernels):
    """256 threads a block, 65,536 registers: four blocks, three, two with the tail."""
    for kernel in of_the_step(kernels):
        recipe = kernel.recipe
        if recipe.param == "float64":
            limit = 168 if recipe.tail and len(recipe.moments) > 2 else 128
        elif recipe.tail:
            limit = 128
        else:
            is_float32 = {recipe.param, recipe.grad, *recipe.moments} == {"float32"}
            limit = 64 if is_float32 and len(recipe.moments) < 3 else 80
        assert kernel.registers <= limit, name_of(kernel)
    assert all(kernel.registers <= 32 for kernel in kernels if kernel.is_norm)
    for kernel in (kernel for kernel in kernels if kernel.is_tiled):
        assert kernel.registers <= (128 if kernel.tiled.param is None else 80), name_of(kernel)


def test_the_loop_keeps_to_its_number_of_instructions(kernels):
    """Within a twentieth, or one: another nvcc schedules otherwise."""
    known = [k for k in of_the_step(kernels) if k.architecture in ("sm_80", "sm_90")]
    if not known:
        pytest.skip("the numbers are of sm_80 and sm_90")
    for kernel in known:
        if kernel.recipe.param == "float64":
            continue
        budgets = BUDGETS[kernel.recipe.label]
        budgets = budgets[1:] if kernel.recipe.tail else budgets[:1]
        if not budgets:
            continue
        counts = machine_code.instructions(kernel)
        for (what, count), budget in zip(counts.items(), budgets, strict=True):
            assert count <= max(1.05 * budget, budget + 1), (name_of(kernel), what)


def test_tiles_keep_to_their_number_of_instructions(kernels):
    """Within a twentieth, as above."""
    for kernel in kernels:
        if not kernel.is_tiled or kernel.tiled.param is None:
            continue
        if kernel.architecture in ("sm_80", "sm_90"):
            count = machine_code.instructions(kernel)["step"]
            assert count <= 1.05 * TILED_BUDGETS[kernel.tiled.label], name_of(kernel)


def test_hyper_parameters_are_read_at_once(kernels):
    """One thread reads them while the others of its block wait: no load waits for another."""
    for kernel in (kernel for kernel in kernels if kernel.is_step or kernel.is_tiled):
        together = most = 0
        for code in kernel.code:
            of_the_group = code.kind == "LDC" and "[R" in code.operands  # at a register's offset
            together = 0 if code.kind == "BRA" else together + of_the_group
            most = max(most, together)
        # Without momentum: lr and weight_decay, two words each, and what kind they are.
        is_least = "Sgd<false>" in kernel.name or "Sgd<(bool)0>" in kernel.name
        assert most >= (5 if is_least else 6), name_of(kernel)


def test_the_norms_last_block_has_eight_loads_under_way(kernels):
    for kernel in (kernel for kernel in kernels if kernel.is_norm):
        runs = re.split(r"\bD(?:ADD|SETP|MUL|FMA)\b", kernel.text)
        assert max(run.count("LDG.E.64") for run in runs) >= 8, name_of(kernel)


def test_the_norm_reads_16_bytes_at_a_time(kernels):
    norms = [kernel for kernel in kernels if kernel.is_norm]
    assert norms
    for kernel in norms:
        assert any(c.kind == "LDG" and c.moves_16_bytes for c in kernel.code), name_of(kernel)


def test_nothing_lives_in_local_memory(kernels):
    for kernel in kernels:
        assert not re.findall(r"\b(?:LDL|STL)\b", kernel.opcodes), name_of(kernel)


def test_blocks_count_their_arrivals_without_a_sequentially_consistent_fence(kernels):
    """Counting releases and acquires: an order of all fences on the device would only cost time."""
    for kernel in kernels:
        fences = re.findall(r"\bMEMBAR\.(\w+)\.GPU\b", kernel.opcodes)
        # The norm counts in two places, one for each kind of norm.
        assert fences == ["ALL"] * (2 if kernel.is_norm else 1), name_of(kernel)
        ordered = re.findall(
            r"\bMEMBAR\.ALL\.GPU\b.*?\bATOMG\.E\.ADD\b.*?\bCCTL\.IVALL\b", kernel.opcodes, re.S
        )
        assert len(ordered) == len(fences), name_of(kernel)
