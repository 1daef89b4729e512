"""The CPU's loops are SIMD code: read from what the compiler makes of them.

A loop that is not has the right results at a tenth of the speed, so nothing else would tell. Forms
of decay other than AdamW's once were none.
"""

import platform
import re
import shutil
import subprocess
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
RULES = {
    "adamw": ("AdamW<false>", 2),
    "amsgrad": ("AdamW<true>", 3),
    "sgd": ("Sgd<false>", 0),
    "momentum": ("Sgd<true>", 1),
}
FORMATS = ("float64", "float32", "bfloat16", "float16")
PARTS = ("usual", "whole")
CASES = [(rule, number, part) for rule in RULES for number in FORMATS for part in PARTS]
LOOPS = 2  # of each step: whole runs of elements, and what they leave (in_runs)
# Of AdamW, in pairs: how the parameter lies, beside bfloat16 moments, the second rounded at random.
IN_PAIRS = ("MasterHalves", "RandomHalves", "Halves")

pytestmark = [
    pytest.mark.not_quick,
    pytest.mark.skipif(platform.machine() not in ("x86_64", "AMD64"), reason="reads x86-64 code"),
]


def function(rule, number, part):
    kind, moments = RULES[rule]
    recipe = ", ".join([kind] + [number] * (2 + moments))
    return f"""
extern "C" void {rule}_{number}_{part}(const Constants<{kind}, {number}::Compute>& c,
                                       const Stepper<Recipe<{recipe}>>::Operands& at, long count) {{
  Stepper<Recipe<{recipe}>>::step_part<Part::{part}>(c, at, count, count);
}}"""


def function_in_pairs(param, part):
    kinds = f"{param}, Halves, RandomHalves"
    return f"""
extern "C" void adamw_{param}_{part}(const Constants<AdamW<false>, float>& c, long count, {param} p,
                                     Halves g, Halves m, RandomHalves v) {{
  step_pairs<AdamW<false>, Part::{part}, {kinds}>(c, count, count, p, g, m, v);
}}"""


def compiled(functions, isa, folder):
    """By function, what the flags of the build's kernels make of it."""
    if shutil.which("g++") is None:
        pytest.skip("needs g++")
    source, target = folder / "loops.cpp", folder / "loops.s"
    begin = '#include "cpu/eight_bit.h"\nusing namespace warpstep;\n'
    source.write_text(begin + "".join(functions))
    text = (ROOT / "CMakeLists.txt").read_text()
    names = ("ARITHMETIC", f"ISA_FLAGS_{isa}")
    flags = [re.search(rf"set\({name} (.*?)\)", text, re.DOTALL)[1] for name in names]
    flags = [*" ".join(flags).split(), "-fno-access-control", "-w", "-S"]
    command = ["g++", "-std=c++17", *flags, f"-I{ROOT / 'kernels'}"]
    subprocess.run([*command, source, "-o", target], check=True)
    code = target.read_text()
    return dict(re.findall(r"^([\w.]+):\n(.*?)^\s*\.size\s+\1", code, re.DOTALL | re.MULTILINE))


@pytest.fixture(scope="module")
def assembly(tmp_path_factory):
    in_pairs = [function_in_pairs(param, part) for param in IN_PAIRS for part in PARTS]
    functions = [*(function(*case) for case in CASES), *in_pairs]
    return compiled(functions, "avx2", tmp_path_factory.mktemp("avx2"))


def test_bfloat16_is_rounded_by_the_instruction(tmp_path):
    """And all stays in the registers: nothing is written but each result, once."""
    whole = """
extern "C" long run(const Constants<AdamW<false>, float>& c, long count, bfloat16* p, bfloat16* g,
                    bfloat16* m, bfloat16* v) {
  return step_even_odd<AdamW<false>, Part::usual>(c, count, count, Halves{p}, Halves{g}, Halves{m},
                                              Halves{v});
}"""
    (code,) = (
        code
        for name, code in compiled([whole], "avx512", tmp_path).items()
        if "step_even_odd" in name
    )
    assert len(re.findall("vcvtne2ps2bf16", code)) == 3
    # By the instruction, and where there are subnormal numbers.
    assert len(re.findall(r"vmov\w+\s+%zmm\d+, [^%]*\(", code)) == 2 * 3
    assert len(re.findall(r"vsqrtps\s.*%zmm", code)) == 2
    assert not re.search("vsqrtss|vdivss", code)
    assert not re.search(r"vmov\w+\s+%zmm\d+, \S*\(%r[bs]p", code), "kept in memory"


REGISTERS = {"avx2": "ymm", "avx512": "zmm"}
SINGLES = {"avx2": 3, "avx512": 1}  # of a loop's last elements: after four at once, and masked ones


@pytest.mark.parametrize("isa", REGISTERS)
@pytest.mark.parametrize("param", ["Singles", *IN_PAIRS])
def test_blocks_of_8_bits_are_stepped_in_registers(tmp_path, param, isa):
    """One group in a loop, of vectors only, and no constant made anew by a general register."""
    grad = "Singles" if param == "Singles" else "Halves"
    blocks = f"InBlocks<AdamW<false>, {param}, {grad}>"
    whole = f"""
extern "C" bool run(const {blocks}& blocks, const {blocks}::CInLanes& c, long at) {{
  return blocks.step(c, at);
}}"""
    code = compiled([whole], isa, tmp_path)["run"]
    register = REGISTERS[isa]
    assert len(re.findall(rf"vsqrtps\s.*%{register}", code)) == 4
    assert len(re.findall(rf"vdivps\s.*%{register}", code)) == 4
    assert not re.search("vsqrtss|vdivss", code)
    # The bases of a block's two scales, the index of a group's random bits and its upper word, and
    # before all loops the two factors of random bits.
    assert len(re.findall(r"vpbroadcast\w\s+%", code)) <= 2 + 2 + 2


@pytest.mark.parametrize("isa", REGISTERS)
def test_tiles_beside_blocks_of_8_bits_are_simd_code(tmp_path, isa):
    """Where GCC took it for rare, it once copied the loop, and made that of single elements."""
    whole = """
extern "C" void run(const Launch& launch) {
  InBlocks<AdamW<false>, MasterHalves, Halves>::step_chunks(launch, 0, 1);
}"""
    code = "".join(compiled([whole], isa, tmp_path).values())
    register = REGISTERS[isa]
    of_tiles = len(re.findall(rf"vsqrtps\s.*%{register}", code)) - 4
    assert of_tiles == LOOPS * len(PARTS)
    singles = len(re.findall("vsqrtss", code))
    assert singles <= SINGLES[isa] * len(PARTS), "more than the last elements of vectors"


@pytest.mark.parametrize("part", PARTS)
@pytest.mark.parametrize("param", IN_PAIRS)
def test_a_step_in_pairs_is_simd_code(assembly, param, part):
    code = assembly[f"adamw_{param}_{part}"]
    assert len(re.findall(r"vdivps\s.*%ymm", code)) == 2 * LOOPS, "no quotients of vectors"
    assert not re.search(r"vpunpck|vpack|vpmovzx", code), "halves shuffled between vectors"


@pytest.mark.parametrize(("rule", "number", "part"), CASES)
def test_a_step_is_simd_code(assembly, rule, number, part):
    code = assembly[f"{rule}_{number}_{part}"]
    suffix = "d" if number == "float64" else "s"
    vectors = rf"p{suffix}\s.*%ymm"
    if rule in ("sgd", "momentum"):
        assert re.search(rf"v(?:sub|fn?m\w+\d+){vectors}", code), "no differences of vectors"
    else:
        loops = LOOPS * (2 if number in ("bfloat16", "float16") else 1)  # two elements in a lane
        assert len(re.findall(f"vsqrt{vectors}", code)) == loops, "no roots of vectors"
        assert len(re.findall(f"vdiv{vectors}", code)) == loops, "no quotients of vectors"
