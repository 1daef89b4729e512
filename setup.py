"""Packaging only: runs CMake for the native module, and installs without it where it cannot build.

Environment: WARPSTEP_CUDA=AUTO|ON|OFF and WARPSTEP_CUDA_ARCHS go to CMakeLists.txt, which explains
them. WARPSTEP_NATIVE=REQUIRED makes a failed native build an error instead of a line of output.
"""

import os
import subprocess
import sys
from pathlib import Path

from setuptools import Extension, setup
from setuptools.command.build_ext import build_ext

ROOT = Path(__file__).parent.resolve()


class BuildNative(build_ext):
    """Builds warpstep._native with CMake and Ninja."""

    def build_extension(self, ext: Extension) -> None:
        """Runs CMake; without a compiler, goes on without the module."""
        target = Path(self.get_ext_fullpath(ext.name)).resolve().parent
        try:
            self.run_cmake(target)
        except (OSError, subprocess.CalledProcessError) as error:
            if os.environ.get("WARPSTEP_NATIVE") == "REQUIRED":
                raise
            print(
                f"warpstep: installed WITHOUT the native module ({error}); a C++17 compiler is "
                "missing or failed. `python -m warpstep` tells what works.",
                file=sys.stderr,
            )

    def run_cmake(self, target: Path) -> None:
        """Configures, builds and installs into `target`."""
        import pybind11

        build = ROOT / "build" / f"cmake-{sys.implementation.cache_tag}"
        options = {
            "Python_EXECUTABLE": sys.executable,
            "pybind11_DIR": pybind11.get_cmake_dir(),
            "CMAKE_INSTALL_PREFIX": str(target),
            "WARPSTEP_CUDA": os.environ.get("WARPSTEP_CUDA", "AUTO"),
            "WARPSTEP_CUDA_ARCHS": os.environ.get("WARPSTEP_CUDA_ARCHS", "80;90"),
        }
        defines = [f"-D{name}={value}" for name, value in options.items()]
        cmake = ["cmake", "-G", "Ninja", "-S", str(ROOT), "-B", str(build), *defines]
        for command in (cmake, ["cmake", "--build", build], ["cmake", "--install", build]):
            subprocess.run(command, check=True)

    def copy_extensions_to_source(self) -> None:
        """Editable installs: CMake has already put the module where it belongs."""

    def get_outputs(self) -> list[str]:
        """The module, if it was built."""
        built = super().get_outputs()
        return [path for path in built if Path(path).exists()]


setup(
    packages=["warpstep", "warpstep.kernels"],
    package_dir={"warpstep": "python/warpstep", "warpstep.kernels": "kernels"},
    package_data={"warpstep": ["py.typed", "*.pyi"]},
    ext_modules=[Extension("warpstep._native", sources=[])],
    cmdclass={"build_ext": BuildNative},
)
