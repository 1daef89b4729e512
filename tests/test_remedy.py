"""What warpstep says to do about a missing native module does give one."""

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from warpstep import backends

ROOT = Path(__file__).parent.parent
NOT_COPIED = shutil.ignore_patterns(".*", "build", "dist", "*.egg-info", "__pycache__", "bench")


def run(command, folder, **environment):
    here = {"PATH": f"{Path(sys.executable).parent}:{os.environ['PATH']}"}
    # The build's tools are those installed, and the place is a folder of our own.
    offline = {"PIP_NO_INDEX": "1", "PIP_NO_BUILD_ISOLATION": "0", "WARPSTEP_CUDA": "OFF"}
    offline |= {"PIP_TARGET": str(folder / "site"), "PIP_UPGRADE": "1"}
    return subprocess.run(
        ["bash", "-c", command],
        cwd=folder / "source",
        env={**os.environ, **here, **offline, **environment},
        capture_output=True,
        text=True,
    )


@pytest.mark.slow
def test_the_remedy_for_a_missing_native_module_works(tmp_path):
    pytest.importorskip("setuptools", minversion="77")
    shutil.copytree(ROOT, tmp_path / "source", ignore=NOT_COPIED)
    without = run("pip install --no-deps .", tmp_path, CXX="/bin/false")
    assert without.returncode == 0, without.stderr
    check = f"cd / && {sys.executable} -c 'import warpstep; print(warpstep.status())'"
    site = {"PYTHONPATH": str(tmp_path / "site")}
    report = run(check, tmp_path, **site).stdout
    assert f"run `{backends.REINSTALL}` in warpstep's source folder." in report

    again = run(backends.REINSTALL, tmp_path, CXX="/bin/false")
    assert again.returncode != 0  # and not another installation without a word

    done = run(backends.REINSTALL, tmp_path)
    assert done.returncode == 0, done.stderr
    report = run(check, tmp_path, **site).stdout
    assert "cpu: steps run on the 'cpu' backend" in report
    assert not (tmp_path / "site" / "torch").exists()
