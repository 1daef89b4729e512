"""A quick C++ compiler, for tests of what is built and not of its speed."""

import stat
from pathlib import Path


def quick_compiler(folder: Path) -> str:
    """Puts one into ``folder``, which optimises nothing whatever it is told: its path, for CXX."""
    path = folder / "quick-c++"
    path.write_text('#!/bin/sh\nexec c++ "$@" -O0 -fno-lto\n')
    path.chmod(path.stat().st_mode | stat.S_IXUSR)
    return str(path)
