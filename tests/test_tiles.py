"""The CUDA kernel through tiles gives the CPU's bits: runs tests/emulation/tiles.cpp."""

import re
import shutil
import subprocess
from pathlib import Path

import pytest

KERNELS = Path(__file__).parent.parent / "kernels"
EMULATION = Path(__file__).parent / "emulation"
OPTIONS = ["-std=c++17", "-pthread", "-Og", "-ffp-contract=off", "-Wall", "-Wno-unknown-pragmas"]
OF_CUDA = ["-x", "c++", "-include", "cuda_runtime.h"]
OF_CUDA += ['-DWARPSTEP_CUDA_ARCHITECTURES=""', '-DWARPSTEP_CUDA_DEVICE_TYPE="cpu"']


@pytest.fixture(scope="module")
def program(tmp_path_factory):
    """It has kernels of their own for float64 only: all else goes through tiles."""
    compiler = shutil.which("g++")
    if compiler is None:
        pytest.skip("needs g++")
    folder = tmp_path_factory.mktemp("tiles")
    kernels = shutil.copytree(KERNELS, folder / "kernels")
    recipes = kernels / "recipes.h"
    fewer, times = re.subn(
        r"using (Uniform|Mixed)Formats = List<.*?>>;",
        r"using \1Formats = List<Formats<float64, float64, float64>>;",
        recipes.read_text(),
        flags=re.DOTALL,
    )
    assert times == 2
    recipes.write_text(fewer)
    units = {
        EMULATION / "cuda_runtime.cpp": [],
        EMULATION / "tiles.cpp": [],
        kernels / "cpu" / "kernels.cpp": ["-DWARPSTEP_COPY=baseline"],
        kernels / "cuda" / "step.cu": OF_CUDA,
        kernels / "cuda" / "tiles.cu": OF_CUDA,
    }
    for source, options in units.items():
        includes = [f"-I{EMULATION}", f"-I{kernels}"]
        command = [compiler, *OPTIONS, *includes, *options, "-c", source]
        subprocess.run([*command, "-o", folder / f"{source.name}.o"], check=True)
    objects = [folder / f"{source.name}.o" for source in units]
    subprocess.run([compiler, "-pthread", *objects, "-o", folder / "tiles"], check=True)
    return folder / "tiles"


def test_the_bits_are_the_cpus(program):
    """Formats, sizes, alignments, shards, the tail and hyper-parameters as they are drawn."""
    done = subprocess.run([program, "3000"], capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr
    assert done.stdout == "3000 cases\n"
