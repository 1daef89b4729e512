"""A C++ compiler that is quick, for tests of what is built and installed and not of the code."""

import stat
from pathlib import Path


def quick_compiler(folder: Path, module: str) -> str:
    """Puts one into ``folder``, for CXX; its path.

    It compiles as c++ does, but of the module's sources it only finds all that they include, and
    what it links of them is a copy of ``module``, which was compiled of the same.
    """
    path = folder / "quick-c++"
    path.write_text(f"""#!/bin/sh
for argument; do
  [ "$before" = -o ] && output=$argument
  before=$argument
done
case $output in
  CMakeFiles/kernel_cuda.dir/*) exec c++ "$@" -O0 ;;  # there is no such code where there is no nvcc
  CMakeFiles/kernel_*|CMakeFiles/_native.dir/*) exec c++ "$@" -E ;;
  _native.*) exec cp "{module}" "$output" ;;
esac
exec c++ "$@" -O0 -fno-lto
""")
    path.chmod(path.stat().st_mode | stat.S_IXUSR)
    return str(path)
