"""Building and installing: nothing stale, nothing missing; and machines without compilers.

Most builds here are of a stand-in: the project's own setup.py and CMakeLists.txt with sources that
compile at once.
"""

import os
import re
import shutil
import subprocess
import sys
import tarfile
import time
import venv
import zipfile
from pathlib import Path

import pytest

import warpstep
from support.compilers import quick_compiler
from warpstep import backends

pytest.importorskip("setuptools", minversion="77")

ROOT = Path(__file__).parent.parent
FOLDERS = ("kernels", "csrc", "python", "tests", "bench", "docs", "examples")
MODULE = """
#include <Python.h>
#include "answer.h"
const char* why_no_cuda();
static PyModuleDef definition = {PyModuleDef_HEAD_INIT, "_native"};
PyMODINIT_FUNC PyInit__native() {
  PyObject* module = PyModule_Create(&definition);
  PyModule_AddIntConstant(module, "answer", ANSWER);
  PyModule_AddStringConstant(module, "why_no_cuda", why_no_cuda());
  return module;
}
"""
NO_CUDA = "const char* why_no_cuda() { return WARPSTEP_WHY_NO_CUDA; }"
NVCC = """#!/bin/sh
[ "$1" = --version ] && echo "Cuda compilation tools, release {version}, V{version}.89" && exit 0
echo "nvcc is broken" >&2; exit 1
"""


def run(*command, check=True, cwd=None, **environment):
    """Runs a command with further variables in its environment."""
    done = subprocess.run(
        list(map(str, command)),
        env={"WARPSTEP_CUDA": "OFF", **os.environ, **environment},
        cwd=cwd,
        capture_output=True,
        text=True,
    )
    done.output = done.stdout + done.stderr
    assert not check or done.returncode == 0, done.output
    return done


@pytest.fixture
def sources(tmp_path):
    """A copy of all that git tracks and packaging knows."""
    source = tmp_path / "source"
    caches = shutil.ignore_patterns("__pycache__", "*.so", "*.partial")
    for name in FOLDERS:
        shutil.copytree(ROOT / name, source / name, ignore=caches)
    for path in ROOT.iterdir():
        if path.is_file() and path.name != ".git":
            shutil.copy(path, source / path.name)
    return source


@pytest.fixture
def stand_in(sources):
    """The same with C++ and CUDA sources that compile at once: a module with an answer, 1."""
    for path in [*sources.glob("csrc/*.cpp"), *sources.glob("kernels/**/*.c*")]:
        path.write_text("")
    (sources / "csrc" / "bindings.cpp").write_text(MODULE)
    (sources / "kernels" / "cuda" / "none.cpp").write_text(NO_CUDA)
    set_answer(sources, "1")
    return sources


def set_answer(source, answer):
    (source / "csrc" / "answer.h").write_text(f"#define ANSWER {answer}\n")


def build_wheel(source, check=True, **environment):
    """Builds a wheel as pip does, by the build backend; what it said, and where it is unpacked."""
    folder = source.parent / "wheel"
    shutil.rmtree(folder, ignore_errors=True)
    program = f"from setuptools import build_meta; build_meta.build_wheel({str(folder)!r})"
    done = run(sys.executable, "-c", program, cwd=source, check=check, **environment)
    wheel = next(folder.glob("*.whl"), None)
    assert (wheel is None) == (done.returncode != 0)
    if wheel is not None:
        zipfile.ZipFile(wheel).extractall(folder / "site")
    return done, folder / "site"


def native_in(site):
    """The path of the native module, if there is one; there is never more than one."""
    found = list(Path(site).glob("**/_native*.so"))
    assert len(found) <= 1
    return found[0] if found else None


def look_at(module, name):
    """An attribute of a stand-in's native module."""
    program = (
        "import importlib.util as u\n"
        f"spec = u.spec_from_file_location('_native', {str(module)!r})\n"
        f"m = u.module_from_spec(spec); spec.loader.exec_module(m); print(m.{name})"
    )
    return run(sys.executable, "-c", program).stdout.strip()


def in_site(site, program, **environment):
    """Runs a program where warpstep is the package in `site`."""
    environment = {"PYTHONPATH": str(site), **environment}
    return run(sys.executable, "-c", program, cwd=site, **environment).stdout


STEP = (
    "import torch, warpstep\n"
    "p = torch.nn.Parameter(torch.ones(3)); p.grad = torch.ones(3)\n"
    "warpstep.AdamW([p], lr=0.5, weight_decay=0).step()\n"
    "assert torch.allclose(p, torch.full((3,), 0.5)), p\n"
    "print(warpstep.__file__)\n"
    "print(warpstep.status())\n"
)


# What is built again.


@pytest.mark.not_quick
def test_a_second_build_has_what_was_edited_and_a_broken_one_is_an_error(stand_in):
    _, site = build_wheel(stand_in)
    assert look_at(native_in(site), "answer") == "1"

    set_answer(stand_in, "wrong")
    done, _ = build_wheel(stand_in, check=False)
    assert done.returncode != 0
    assert "wrong" in done.output  # what the compiler says

    set_answer(stand_in, "2")
    _, site = build_wheel(stand_in)
    assert look_at(native_in(site), "answer") == "2"


def test_a_build_whose_tools_have_gone_starts_anew(stand_in, tmp_path):
    """As with pip, which removes the environment that it has built in, its ninja with it."""
    tools = tmp_path / "tools"
    tools.mkdir()
    (tools / "ninja").symlink_to(shutil.which("ninja"))
    compiler = shutil.which("c++")
    (tools / "compiler").write_text(f'#!/bin/sh\nexec {compiler} "$@"\n')
    (tools / "compiler").chmod(0o755)
    path = f"{tools}{os.pathsep}{os.environ['PATH']}"
    build_wheel(stand_in, PATH=path, CXX=str(tools / "compiler"))
    assert str(tools) in next(stand_in.glob("build/cmake-*/CMakeCache.txt")).read_text()
    shutil.rmtree(tools)

    set_answer(stand_in, "2")
    _, site = build_wheel(stand_in)
    assert look_at(native_in(site), "answer") == "2"


@pytest.mark.not_quick
def test_sources_put_there_with_an_older_date_are_compiled(stand_in):
    """As rsync and tar do."""
    earlier = time.time() - 3600
    build_wheel(stand_in)
    set_answer(stand_in, "2")
    os.utime(stand_in / "csrc" / "answer.h", (earlier, earlier))
    _, site = build_wheel(stand_in)
    assert look_at(native_in(site), "answer") == "2"


@pytest.mark.not_quick
def test_a_second_build_compiles_only_what_has_changed(stand_in):
    build_wheel(stand_in)
    done, _ = build_wheel(stand_in)
    assert "ninja: no work to do" in done.output
    (stand_in / "csrc" / "bindings.cpp").touch()
    done, _ = build_wheel(stand_in)
    assert "_native.dir/Unity" in done.output
    assert "kernels.cpp.o" not in done.output


@pytest.mark.not_quick
def test_a_changed_setting_counts(stand_in):
    _, site = build_wheel(stand_in, WARPSTEP_CUDA="OFF")
    assert look_at(native_in(site), "why_no_cuda") == "WARPSTEP_CUDA was OFF"
    _, site = build_wheel(stand_in, WARPSTEP_CUDA="AUTO", CUDACXX="/none/nvcc")
    assert "/none/nvcc" in look_at(native_in(site), "why_no_cuda")
    done, _ = build_wheel(stand_in, check=False, WARPSTEP_CUDA="MAYBE")
    assert "WARPSTEP_CUDA is 'MAYBE', not AUTO, ON or OFF" in done.output
    _, site = build_wheel(stand_in, WARPSTEP_NATIVE="OFF")
    assert native_in(site) is None


@pytest.mark.not_quick
def test_nothing_is_packed_that_has_left_the_sources(stand_in):
    extra = stand_in / "python" / "warpstep" / "extra.py"
    extra.write_text('"""Here for one build."""\n')
    _, site = build_wheel(stand_in)
    assert (site / "warpstep" / "extra.py").exists()
    extra.unlink()
    _, site = build_wheel(stand_in)
    assert not (site / "warpstep" / "extra.py").exists()


# Machines without compilers.


@pytest.mark.not_quick
def test_no_compiler_still_gives_a_package_that_steps(stand_in):
    build_wheel(stand_in)  # whose module must not be packed again
    done, site = build_wheel(stand_in, CXX="/bin/false")
    assert done.output.count("installed WITHOUT the native module: no C++ compiler was found") == 1
    assert native_in(site) is None
    printed = in_site(site, STEP)
    assert printed.startswith(str(site))
    assert "steps run on the 'reference' backend" in printed
    assert "install a C++ compiler" in printed


def test_a_required_native_build_that_fails_is_an_error(stand_in):
    done, _ = build_wheel(stand_in, check=False, CXX="/bin/false", WARPSTEP_NATIVE="REQUIRED")
    assert done.returncode != 0


def configure(source, build, **settings):
    """Configures without building."""
    import pybind11

    settings |= {"Python_EXECUTABLE": sys.executable, "pybind11_DIR": pybind11.get_cmake_dir()}
    options = ["-G", "Ninja", *(f"-D{name}={value}" for name, value in settings.items())]
    return run("cmake", "-S", source, "-B", build, *options, check=False, CUDACXX="")


@pytest.mark.not_quick
@pytest.mark.parametrize(
    ("version", "archs", "reason"),
    [
        pytest.param(
            "11.8", "80;90", r"nvcc 11\.8 was found \(.*\), and 12\.1 is needed", id="old"
        ),
        pytest.param("12.4", "release", r"nvcc 12\.4 was found .*, and 12\.8 is needed", id="new"),
        pytest.param("12.6", "90;100", r"nvcc 12\.6 was found .*, and 12\.8 is needed", id="100"),
        pytest.param("13.0", "80;90", r"nvcc 13\.0 .* does not compile .* for 80 90", id="broken"),
        pytest.param("none", "80;90", r"/nvcc does not tell an nvcc's version", id="no-version"),
    ],
)
def test_an_nvcc_that_does_not_do_leaves_the_cpu_kernels_and_says_why(
    stand_in, tmp_path, monkeypatch, version, archs, reason
):
    nvcc = tmp_path / "nvcc"
    nvcc.write_text(NVCC.format(version=version))
    nvcc.chmod(0o755)
    monkeypatch.setenv("PATH", f"{tmp_path}{os.pathsep}{os.environ['PATH']}")
    build = tmp_path / "build"

    done = configure(stand_in, build, WARPSTEP_CUDA="AUTO", WARPSTEP_CUDA_ARCHS=archs)
    assert done.returncode == 0, done.output
    said = re.findall(r"warpstep: built without the CUDA kernels: (.*)", done.output)
    assert len(said) == 1
    assert re.search(reason, said[0])
    run("cmake", "--build", build)
    assert look_at(native_in(build), "why_no_cuda") == said[0]

    shutil.rmtree(build)
    done = configure(stand_in, build, WARPSTEP_CUDA="ON", WARPSTEP_CUDA_ARCHS=archs)
    assert done.returncode != 0
    wanted = "Call Stack .*enable_language" if version == "13.0" else reason
    assert re.search(wanted, " ".join(done.output.split()))


def test_status_tells_why_there_is_no_cuda_code(monkeypatch):
    native, reason = backends.native()
    assert native is not None, reason
    assert (native.cuda_architectures is None) == bool(native.why_no_cuda)

    class WithoutCuda:
        cuda_architectures = None
        cuda_device_type = None
        why_no_cuda = "nvcc 11.8 was found, and 12.1 is needed"

        def __getattr__(self, name):
            return getattr(native, name)

    monkeypatch.setattr(backends, "native", lambda: (WithoutCuda(), ""))
    assert "CUDA code none: nvcc 11.8 was found, and 12.1 is needed" in str(warpstep.status())
    monkeypatch.setattr(backends, "_cuda_reason", backends._cuda_reason.__wrapped__)
    assert "built without CUDA kernels: nvcc 11.8 was found" in backends._cuda_reason(0)


# Other ways to install.


@pytest.fixture
def environment(tmp_path):
    """The Python of a fresh environment with all packages that are here but warpstep."""
    folder = tmp_path / "environment"
    venv.create(folder)
    (site,) = folder.glob("lib/*/site-packages")
    for path in filter(lambda path: path.name.endswith("-packages"), map(Path, sys.path)):
        for entry in path.iterdir() if path.is_dir() else ():
            link = site / entry.name
            if "warpstep" not in entry.name and entry.suffix != ".pth" and not link.exists():
                link.symlink_to(entry)
    return folder / "bin" / "python"


@pytest.mark.not_quick
def test_an_editable_install_has_the_module_and_takes_edits(stand_in, environment, tmp_path):
    install = (environment, "-m", "pip", "install", "--no-build-isolation", "--no-deps")
    install += ("--no-index", "-e", stand_in)
    program = "import warpstep.version as v, warpstep._native as n; print(v.__version__, n.answer)"

    def answer(check=True):
        return run(environment, "-c", program, cwd=tmp_path, check=check, PYTHONPATH="").stdout

    # The package itself would call more of the module than a stand-in has.
    (stand_in / "python" / "warpstep" / "__init__.py").write_text("")
    run(*install)
    assert answer().split() == [warpstep.__version__, "1"]
    version = stand_in / "python" / "warpstep" / "version.py"
    version.write_text(version.read_text().replace(warpstep.__version__, "9.9"))
    assert answer().split() == ["9.9", "1"]
    set_answer(stand_in, "2")
    run(*install)
    assert answer().split() == ["9.9", "2"]

    # No old module stays under newer sources, neither after an error nor without a compiler.
    set_answer(stand_in, "wrong")
    assert run(*install, check=False).returncode != 0
    assert native_in(stand_in / "python") is None
    set_answer(stand_in, "3")
    run(*install)
    assert answer().split() == ["9.9", "3"]
    run(*install, CXX="/bin/false")
    assert native_in(stand_in / "python") is None
    assert answer(check=False) == ""


def test_a_wheel_does_not_take_the_module_of_an_editable_install(stand_in):
    (stand_in / "python" / "warpstep" / "_native.so").write_text("of an editable install")
    _, site = build_wheel(stand_in, CXX="/bin/false")
    assert native_in(site) is None
    assert (stand_in / "python" / "warpstep" / "_native.so").exists()


def build_sdist(source):
    """Builds a source distribution through the build backend's own function; its path."""
    program = "from setuptools import build_meta; print(build_meta.build_sdist('dist'))"
    name = run(sys.executable, "-c", program, cwd=source).stdout.splitlines()[-1]
    return source / "dist" / name


def test_a_source_distribution_has_all_sources(sources):
    """As they are: what compiles here compiles there."""
    with tarfile.open(build_sdist(sources)) as archive:
        names = {name.partition("/")[2] for name in archive.getnames()}
        for member in filter(tarfile.TarInfo.isfile, archive):
            source = sources / member.name.partition("/")[2]
            if source.exists() and ".egg-info" not in member.name:
                assert archive.extractfile(member).read() == source.read_bytes(), member.name
    wanted = {
        str(path.relative_to(sources))
        for folder in FOLDERS
        for path in (sources / folder).rglob("*")
        if path.is_file() and ".egg-info" not in str(path)
    }
    wanted |= {"CMakeLists.txt", "LICENSE", "Makefile", "mkdocs.yml", "pyproject.toml", "setup.py"}
    wanted |= {"CHANGELOG.md", "CITATION.cff", "CONTRIBUTING.md", "README.md", "SECURITY.md"}
    assert wanted - names == set()
    assert not [name for name in names if name.endswith((".so", ".pyc"))]


@pytest.mark.slow
def test_a_source_distribution_gives_the_native_backend(sources, environment, tmp_path):
    """First without a compiler; then by what the report says to run."""
    with tarfile.open(build_sdist(sources)) as archive:
        archive.extractall(tmp_path / "unpacked", filter="data")
    (source,) = (tmp_path / "unpacked").iterdir()
    bin = environment.parent
    (bin / "pip").write_text(f'#!/bin/sh\nexec "{environment}" -m pip "$@"\n')
    (bin / "pip").chmod(0o755)
    # The build's tools are those installed.
    alone = {"PIP_NO_INDEX": "1", "PIP_NO_BUILD_ISOLATION": "0", "PYTHONPATH": ""}
    alone["PATH"] = f"{bin}:{os.environ['PATH']}"

    def do(command, compiler, check=True):
        return run("bash", "-c", command, cwd=source, check=check, CXX=compiler, **alone)

    def report():
        return run(environment, "-c", STEP, cwd=tmp_path, PYTHONPATH="").stdout

    do("pip install --no-deps .", "/bin/false")
    printed = report()
    assert printed.startswith(str(environment.parent.parent))
    assert f"run `{backends.REINSTALL}` in warpstep's source folder." in printed
    assert do(backends.REINSTALL, "/bin/false", check=False).returncode != 0
    do(backends.REINSTALL, quick_compiler(tmp_path))
    printed = report()
    assert "cpu: steps run on the 'cpu' backend" in printed
    assert "CUDA code none: WARPSTEP_CUDA was OFF" in printed


def test_the_installed_package_is_whole():
    package = Path(warpstep.__file__).parent
    for name in ("py.typed", "_native.pyi", "kernels/triton/launch.py"):
        assert (package / name).exists(), name
    native, reason = backends.native()
    assert native is not None, reason
    assert Path(native.__file__).stat().st_size < 10e6
