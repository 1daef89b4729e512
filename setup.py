"""Packaging only: CMake builds the native module, or says that there is no compiler to build it."""

import os
import shutil
import subprocess
import sys
from pathlib import Path

from setuptools import Extension, setup
from setuptools.command.build import build
from setuptools.command.build_ext import build_ext

ROOT = Path(__file__).parent.resolve()
PACKAGES = ("", ".compat", ".enabling", ".kernels", ".kernels.triton", ".rules")
# Environment variables for CMakeLists.txt, which explains them.
SETTINGS = ("WARPSTEP_NATIVE", "WARPSTEP_CUDA", "WARPSTEP_CUDA_ARCHS")


class BuildAfresh(build):
    """Builds into an empty folder: setuptools packs all that lies there, however old."""

    def run(self) -> None:
        """Empties it first."""
        shutil.rmtree(self.build_lib, ignore_errors=True)
        super().run()


class BuildNative(build_ext):
    """Builds warpstep._native with CMake and Ninja; any failure of theirs is one."""

    def run(self) -> None:
        """Removes the module of an earlier build: in an editable install, that in the sources."""
        for ext in self.extensions:
            Path(self.get_ext_fullpath(ext.name)).unlink(missing_ok=True)
        super().run()

    def build_extension(self, ext: Extension) -> None:
        """Builds the module, or nothing where CMake finds no compiler."""
        import pybind11

        options = {
            "CMAKE_INSTALL_PREFIX": str(Path(self.get_ext_fullpath(ext.name)).resolve().parent),
            "CMAKE_MAKE_PROGRAM": shutil.which("ninja") or "ninja",
            "Python_EXECUTABLE": sys.executable,
            "pybind11_DIR": pybind11.get_cmake_dir(),
            **{name: os.environ[name] for name in SETTINGS if name in os.environ},
        }
        defines = [f"-D{name}={value}" for name, value in options.items()]
        folder = self.build_folder()
        configure = ["cmake", "-G", "Ninja", "-S", ROOT, "-B", folder, *defines]
        for command in (configure, ["cmake", "--build", folder], ["cmake", "--install", folder]):
            subprocess.run(command, check=True)

    def build_folder(self) -> Path:
        """The folder of the compiled files of earlier builds, with nothing configured.

        Of these Ninja keeps what settings, tools and sources leave valid. It judges sources by
        their dates: one that was put there since, with a date from before, makes all invalid.
        """
        folder = ROOT / "build" / f"cmake-{sys.implementation.cache_tag}"
        cache = folder / "CMakeCache.txt"
        sources = [ROOT / "CMakeLists.txt", *ROOT.glob("kernels/**/*.[hc]*"), *ROOT.glob("csrc/*")]
        if not cache.exists() or any(
            s.stat().st_mtime < cache.stat().st_mtime < s.stat().st_ctime for s in sources
        ):
            shutil.rmtree(folder, ignore_errors=True)
        cache.unlink(missing_ok=True)
        for tools in folder.glob("CMakeFiles/[0-9]*"):
            shutil.rmtree(tools)
        return folder


setup(
    packages=[f"warpstep{package}" for package in PACKAGES],
    package_dir={"warpstep": "python/warpstep", "warpstep.kernels": "kernels"},
    include_package_data=False,  # which takes the folders of C++ sources for packages
    package_data={"warpstep": ["py.typed", "*.pyi"]},
    ext_modules=[Extension("warpstep._native", sources=[], optional=True)],
    cmdclass={"build": BuildAfresh, "build_ext": BuildNative},
)
