"""The CUDA source under the thread sanitizer: no data race, and deliberate ones are found.

Emulated threads are fibers (tests/emulation), and only what orders them on a GPU orders them here:
barriers within a block, the memory order of atomics between blocks, launches one after the other.
"""

import os
import re
import shutil
import subprocess
from pathlib import Path

import pytest

pytestmark = pytest.mark.xdist_group("the kernels without a race, which are compiled once")

KERNELS = Path(__file__).parent.parent / "kernels"
EMULATION = Path(__file__).parent / "emulation"
OPTIONS = [
    "-std=c++17",
    "-pthread",
    "-O0",
    "-g1",
    "-ffp-contract=off",
    "-Wall",
    "-Wno-unknown-pragmas",
]

# What the sanitizer would only take longer for: the other recipes have the same source.
SMALLER = {
    "recipes.h": [
        (
            r"UniformFormats = List<.*?>>;",
            "UniformFormats = List<Formats<float32, float32, float32>>;",
        ),
        (
            r"using AllBuilt = .*?using AllRules = .*?;",
            "using AllBuilt = List<Built<AdamW<false>, UniformFormats>>;\n"
            "using AllRules = List<AdamW<false>>;",
        ),
    ],
    "cuda/tiles.cu": [(r"using UsedMost =.*?;", "using UsedMost = FormatsList<>;")],
}

# What shows a race in a header. Tiles would, too, and take as long again to compile.
SHOWING = ("step.cu", "grad_norm.cu")

# What is made wrong: a file of kernels/, what stands there, what takes its place; and the function
# in which the sanitizer finds one of the two accesses.
BARRIER = r"  __syncthreads\(\);\n"
RACES = {
    "no barrier after the constants": ("cuda/block.cuh", BARRIER, "", "step_kernel"),
    "no barrier before a block's scale": (
        "cuda/tiles.cu",
        r"__syncwarp\([^;]*;",
        "",
        "tile_kernel",
    ),
    "a block's scale written by all of its threads": (
        "cuda/tiles.cu",
        "threadIdx.x % kBlockThreads == 0",
        "true",
        "tile_kernel",
    ),
    "the step counter relaxed": (
        "cuda/block.cuh",
        r"atomic_add_acq_rel\(arrivals, 1\)",
        "atomicAdd(arrivals, 1u)",
        "take_step",
    ),
    "the step counter written by the first": (
        "cuda/block.cuh",
        r"== row.chunks - 1",
        "== 0",
        "take_step",
    ),
    "the step counter written by all": ("cuda/block.cuh", r"row.chunks == 1", "true", "take_step"),
    "an arrival that does not acquire": ("cuda/launch.cuh", "_ACQ_REL", "_RELEASE", "take_step"),
    "an arrival that does not release": ("cuda/launch.cuh", "_ACQ_REL", "_ACQUIRE", "take_step"),
    "the norm's shares relaxed": (
        "cuda/grad_norm.cu",
        r"atomic_add_acq_rel\(done, 1\)",
        "atomicAdd(done, 1u)",
        "finish",
    ),
    "no barrier before the norm's end": ("cuda/grad_norm.cu", BARRIER, "", "finish"),
    "the least magnitudes' shares relaxed": (
        "cuda/least_magnitude.cu",
        r"atomic_add_acq_rel\(arrivals, 1\)",
        "atomicAdd(arrivals, 1u)",
        "least_magnitude_kernel",
    ),
    "no barrier before a least magnitude's end": (
        "cuda/least_magnitude.cu",
        BARRIER,
        "",
        "least_magnitude_kernel",
    ),
    "no barrier within a sum": ("cuda/launch.cuh", f"  {BARRIER}", "", "combine_block"),
    "no barrier after a sum": (
        "cuda/launch.cuh",
        r"__syncthreads\(\);  // before the next use",
        "",
        "combine_block",
    ),
}


@pytest.fixture(scope="module")
def build(tmp_path_factory):
    """build(texts of changed files) -> the program. What does not change is compiled once."""
    compiler = shutil.which("g++")
    if compiler is None:
        pytest.skip("needs g++")

    def run(*command):
        done = subprocess.run(list(map(str, command)), capture_output=True, text=True)
        assert done.returncode == 0, done.stderr

    # What every CUDA source begins with is read once: half of the time to compile one.
    begin = tmp_path_factory.mktemp("begin")
    (begin / "begin.h").write_text('#include "cuda_runtime.h"\n')
    begins = [f"-I{begin}", *OPTIONS, f"-I{EMULATION}", "-fsanitize=thread"]
    header = begin / "cuda_runtime.h.gch"
    run(compiler, *begins, "-x", "c++-header", begin / "begin.h", "-o", header)

    def compile_all(changed, objects):
        folder = tmp_path_factory.mktemp("races")
        for source in KERNELS.rglob("*.[hc]*"):
            name = str(source.relative_to(KERNELS))
            (folder / name).parent.mkdir(exist_ok=True)
            (folder / name).write_text(changed.get(name, source.read_text()))
        options = [*OPTIONS, f"-I{EMULATION}", f"-I{folder}"]
        sanitized = [*options, "-fsanitize=thread"]
        of_cuda = [*begins, f"-I{folder}", "-x", "c++", "-include", "cuda_runtime.h"]
        of_cuda += ['-DWARPSTEP_CUDA_ARCHITECTURES=""', '-DWARPSTEP_CUDA_DEVICE_TYPE="cpu"']
        units = {
            EMULATION / "cuda_runtime.cpp": options,
            EMULATION / "races.cpp": sanitized,
            folder / "cuda/step.cu": of_cuda,
            folder / "cuda/tiles.cu": of_cuda,
            folder / "cuda/grad_norm.cu": of_cuda,
            folder / "cuda/least_magnitude.cu": of_cuda,
        }
        compiled = {source.name: folder / f"{source.stem}.o" for source in units} | objects
        for source, flags in units.items():
            if source.name not in objects:
                run(compiler, *flags, "-c", source, "-o", compiled[source.name])
        return compiled

    smaller = {name: change(name, *changes) for name, changes in SMALLER.items()}
    unchanged = compile_all(smaller, {})

    def build(changed):
        is_header = any(not name.endswith(".cu") for name in changed)
        old = {
            name: at
            for name, at in unchanged.items()
            if f"cuda/{name}" not in changed and not (is_header and name in SHOWING)
        }
        compiled = compile_all(smaller | changed, old)
        program = tmp_path_factory.mktemp("program") / "races"
        run(compiler, "-pthread", "-fsanitize=thread", *compiled.values(), "-o", program)
        return program

    return build


def change(name, *changes):
    """The text of a file of kernels/ with the first place changed that each pattern matches."""
    text = (KERNELS / name).read_text()
    for pattern, replacement in changes:
        text, times = re.subn(pattern, replacement, text, count=1, flags=re.DOTALL)
        assert times == 1, f"{name} has no {pattern} any more: this test makes it wrong"
    return text


def launch(program):
    environment = {**os.environ, "TSAN_OPTIONS": "halt_on_error=1"}
    return subprocess.run([program], env=environment, capture_output=True, text=True, timeout=120)


def test_the_kernels_have_no_data_race(build):
    done = launch(build({}))
    assert done.returncode == 0, done.stderr
    assert not done.stderr


@pytest.mark.parametrize("race", RACES)
def test_a_data_race_is_found(build, race):
    name, pattern, replacement, function = RACES[race]
    changes = [*SMALLER.get(name, ()), (pattern, replacement)]
    done = launch(build({name: change(name, *changes)}))
    assert done.returncode != 0
    assert "WARNING: ThreadSanitizer: data race" in done.stderr, done.stderr
    assert function in done.stderr
