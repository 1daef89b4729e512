"""The suite again in processes where another backend can run, or another CPU kernel is chosen.

* The CUDA source compiled for the host, under the address sanitizer: tables, heads and rests, chunk
  edges and counters are executed, and the bits must be the CPU kernel's.
* Triton's kernel in Triton's interpreter.
* The CPU's kernel with tensors read through DLPack, as where torch's own functions are not found.
"""

import importlib.util
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from support import cases, recipes, sgd
from support.environment import EMULATED, INTERPRETED
from support.recipes import RECIPES

ROOT = Path(__file__).parent.parent
SUITE = [
    "test_conformance.py",
    "test_sgd.py",
    "test_tail.py",
    "test_tail_edges.py",
    "test_decay_min.py",
    "test_low_precision.py",
    "test_low_precision_tail.py",
    "test_unscaled_grads.py",
    "test_bits.py",
    "test_formats.py",
    "test_flush_denormal.py",
    "test_every_value.py",
    "test_launches.py",
    "test_stress.py",
    "test_fake_tensors.py",
    "test_without_native.py",
]

# The CPU's kernel meets the oracle there, in the suite itself, and here test_bits.py compares its
# bits: not those of float64 in Triton's interpreter, which does not fuse there.
BY_BITS = ("test_every_recipe_and_option_agrees_with_the_oracle", "test_a_thousand_steps")


pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(EMULATED or INTERPRETED, reason="this process is one of those started here"),
]


def run_suite(name, files, may_skip=False, **environment):
    """Runs tests by what is in their names, a backend's say, in a process of their own; how many
    passed, and all must.
    """
    for other in BY_BITS:
        name += f" and (float64 or not {other})"
    run = subprocess.run(
        [sys.executable, "-m", "pytest", "-p", "no:cacheprovider", "-k", name, *files],
        cwd=ROOT / "tests",
        env={**os.environ, **environment},
        capture_output=True,
        text=True,
    )
    print(run.stdout[-4000:], run.stderr[-4000:])
    assert run.returncode == 0
    passed = re.search(r"(\d+) passed", run.stdout)
    assert passed is not None
    assert may_skip or not re.search(r"\d+ skipped", run.stdout)
    return int(passed.group(1))


@pytest.fixture(scope="session")
def emulated_module(tmp_path_factory):
    """The native module with the CUDA source compiled for the host."""
    import pybind11

    if shutil.which("cmake") is None or shutil.which("g++") is None:
        pytest.skip("needs cmake and g++")
    build = tmp_path_factory.mktemp("emulated")
    configure = ["cmake", "-G", "Ninja", "-S", str(ROOT), "-B", str(build)]
    configure += ["-DWARPSTEP_EMULATE_CUDA=ON", f"-DPython_EXECUTABLE={sys.executable}"]
    configure += [f"-Dpybind11_DIR={pybind11.get_cmake_dir()}"]
    for command in (configure, ["cmake", "--build", str(build)]):
        done = subprocess.run(command, capture_output=True, text=True)
        assert done.returncode == 0, done.stdout + done.stderr
    return next(build.glob("_native*.so"))


@pytest.mark.parametrize(
    ("options", "always"),
    [(recipes.OPTIONS, recipes.KERNELS), (sgd.OPTIONS, sgd.KERNELS)],
    ids=["AdamW", "SGD"],
)
def test_the_pairs_of_recipe_and_options_there_cover_both(options, always):
    pairs = list(cases.covering_pairs(options, always))
    assert len(pairs) == len(set(pairs)) < len(RECIPES) * len(options) / 2
    for recipe in RECIPES:
        chosen = {options for r, options in pairs if r == recipe}
        assert chosen >= set(always)
        assert len(chosen) >= len(always) + 2
    for name in options:
        assert sum(o == name for _, o in pairs) >= 2


def test_cuda_source_on_the_host(emulated_module):
    # libstdc++ too, so that the sanitizer finds what throws: torch does, at tensors without memory.
    libraries = [
        subprocess.run(
            ["g++", f"-print-file-name={name}"], capture_output=True, text=True, check=True
        ).stdout.strip()
        for name in ("libasan.so", "libstdc++.so")
    ]
    passed = run_suite(
        "cuda",
        [
            *SUITE,
            "test_huge.py",
            "test_functional.py",
            "test_functional_sgd.py",
            "test_functional_low_precision.py",
            "test_functional_low_precision_errors.py",
            "test_device_tables.py",
            "test_capture.py",
            "test_asked_devices.py",
            "test_current_device.py",
        ],
        WARPSTEP_TEST_NATIVE=str(emulated_module),
        LD_PRELOAD=" ".join(libraries),
        ASAN_OPTIONS="detect_leaks=0",  # of Python and torch, there are many
    )
    assert passed > 250


def test_triton_in_its_interpreter():
    if importlib.util.find_spec("triton") is None:
        pytest.skip("needs triton")
    passed = run_suite("triton", [*SUITE, "test_triton_recipes.py"], TRITON_INTERPRET="1")
    assert passed > 250


def test_reading_through_dlpack():
    files = ["test_stale_memory.py", "test_stale_plans.py", "test_failures.py", "test_clipping.py"]
    files += [
        "test_clipping_scaled.py",
        "test_torch_layouts.py",
        "test_functional.py",
        "test_tail_edges.py",
    ]
    # Some changes of theirs do not go with each case.
    passed = run_suite("cpu", files, may_skip=True, WARPSTEP_TORCH_ABI="0")
    assert passed > 400


def test_without_torchs_threads():
    # Without the tests that set WARPSTEP_TORCH_ABI themselves.
    name = "test and not forked_child_steps and not flush_subnormal"
    assert run_suite(name, ["test_threads.py"], WARPSTEP_TORCH_ABI="0") > 10
    files = ["--quick", "test_tensor_reader.py", "test_many_parameters.py"]
    assert run_suite("test", files, WARPSTEP_TORCH_ABI="0") > 12
