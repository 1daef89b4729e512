"""The wheel: what is in it, and what a machine with no C++ compiler gets."""

import os
import shutil
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest

import warpstep
from warpstep import backends

ROOT = Path(__file__).parent.parent
SOURCES = ("kernels", "csrc", "python")
FILES = ("setup.py", "pyproject.toml", "CMakeLists.txt", "README.md", "LICENSE")


def build_wheel(folder, **environment):
    """Builds a wheel from a copy of the sources, with the packages that are installed."""
    pytest.importorskip("setuptools", minversion="77")
    source = folder / "source"
    for name in SOURCES:
        shutil.copytree(ROOT / name, source / name)
    for name in FILES:
        shutil.copy(ROOT / name, source / name)
    run = subprocess.run(
        [
            *(sys.executable, "-m", "pip", "wheel", "-v", "--no-build-isolation"),
            *("--no-deps", "--no-index", "-w", str(folder), str(source)),
        ],
        env={**os.environ, **environment},
        capture_output=True,
        text=True,
    )
    return run, next(folder.glob("*.whl"), None)


def test_no_compiler_still_gives_a_package_that_steps(tmp_path):
    run, wheel = build_wheel(tmp_path, CXX="/bin/false", WARPSTEP_CUDA="OFF")
    assert run.returncode == 0, run.stdout + run.stderr
    output = run.stdout + run.stderr
    assert "installed WITHOUT the native module" in output
    assert "a C++17 compiler is missing or failed" in output

    site = tmp_path / "site"
    zipfile.ZipFile(wheel).extractall(site)
    program = (
        "import torch, warpstep\n"
        "p = torch.nn.Parameter(torch.ones(3)); p.grad = torch.ones(3)\n"
        "warpstep.AdamW([p], lr=0.5, weight_decay=0).step()\n"
        "assert torch.allclose(p, torch.full((3,), 0.5)), p\n"
        "print(warpstep.__file__)\n"
        "print(warpstep.status())\n"
    )
    environment = {**os.environ, "PYTHONPATH": str(site)}
    run = subprocess.run(
        [sys.executable, "-c", program], env=environment, capture_output=True, text=True
    )
    assert run.returncode == 0, run.stderr
    assert run.stdout.startswith(str(site))
    assert "steps run on the 'reference' backend" in run.stdout
    assert "install a C++ compiler" in run.stdout


def test_a_required_native_build_that_fails_is_an_error(tmp_path):
    run, wheel = build_wheel(
        tmp_path, CXX="/bin/false", WARPSTEP_CUDA="OFF", WARPSTEP_NATIVE="REQUIRED"
    )
    assert run.returncode != 0
    assert wheel is None


def test_the_installed_package_is_whole():
    package = Path(warpstep.__file__).parent
    for name in ("py.typed", "_native.pyi", "kernels/launch_triton.py"):
        assert (package / name).exists(), name
    native, reason = backends.native()
    assert native is not None, reason
    assert Path(native.__file__).stat().st_size < 10e6
