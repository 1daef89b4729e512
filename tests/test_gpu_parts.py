"""`make gpu` without a GPU: its parts with programs that only say how they were called."""

import csv
import os
import re
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

from bench import gpu  # noqa: E402
from stress import SCENARIOS  # noqa: E402

PROGRAMS = ("cmake", "ninja", "nvcc", "nvidia-smi", "compute-sanitizer", "python")
# Fails where the line that it was called with has $FAIL in it; where it has $HANG, it and a process
# that it has started go on for a minute.
FAKE = """#!/bin/sh
line="$(basename "$0") $*"
echo "called: $line uncached=$PYTORCH_NO_CUDA_MEMORY_CACHING threads=$OMP_NUM_THREADS"
case "$line" in
  *get_device_properties*) printf 'NVIDIA H200\\n90\\n'; exit ;;
  *"${HANG:-no line}"*) echo "begun"; sleep 60 & echo "$!" > "$HANG_PID"; wait ;;
  *"${FAIL:-no line}"*) echo "a line without an end" | tr -d '\\n'; exit 3 ;;
esac
"""


@pytest.fixture
def machine(tmp_path, monkeypatch):
    """Where all programs are fakes; the results' folder."""
    programs = tmp_path / "bin"
    programs.mkdir()
    for name in PROGRAMS:
        (programs / name).write_text(FAKE)
        (programs / name).chmod(0o755)
    monkeypatch.setenv("PATH", f"{programs}:{os.environ['PATH']}")
    monkeypatch.setenv("HANG_PID", str(tmp_path / "hanging"))
    monkeypatch.setattr(gpu, "PYTHON", str(programs / "python"))
    monkeypatch.setattr(gpu, "POLL_SECONDS", 0.01)
    monkeypatch.setattr(gpu, "SITE", tmp_path / "site")
    (tmp_path / "site" / "warpstep").mkdir(parents=True)
    (tmp_path / "site" / "warpstep" / "_native.so").touch()
    handler = signal.getsignal(signal.SIGTERM)
    yield tmp_path / "results"
    signal.signal(signal.SIGTERM, handler)


def run(results, *arguments):
    return gpu.main([*arguments, "--results", str(results), "--commit", "abc123"])


def outcomes(results):
    with (results / "parts.csv").open() as file:
        return [(line["part"], line["outcome"]) for line in csv.DictReader(file)]


def test_all_parts_run_in_order_and_leave_their_logs(machine, capsys):
    assert run(machine) == 0
    parts = [part for part, _ in outcomes(machine)]
    assert list(dict.fromkeys(parts)) == list(gpu.PARTS)
    assert {outcome for _, outcome in outcomes(machine)} == {"passed"}
    said = capsys.readouterr().out
    assert "NVIDIA H200, commit abc123" in said
    for log in ("build", "stress-tail", "test", "sanitize-memcheck", "bench", "bench-cpu"):
        text = (machine / f"{log}.log").read_text()
        assert text.startswith("$ ")
        assert text.splitlines()[1] in said  # shown, too
    assert "-DWARPSTEP_CUDA_ARCHS=90" in (machine / "build.log").read_text()
    told = (machine / "test.log").read_text()
    assert f"-n {gpu.PROCESSES} --dist loadgroup -m not slow -k {gpu.ON_GPU} -vv" in told
    assert "threads=2" in (machine / "test.log").read_text()
    for log in ("bench", "bench-cpu"):
        assert "--commit abc123" in (machine / f"{log}.log").read_text()


def test_sanitizers_see_what_lies_between_tensors_and_only_own_kernels(machine):
    assert run(machine, "sanitize") == 0
    for tool in gpu.SANITIZERS:
        text = (machine / f"sanitize-{tool}.log").read_text()
        assert "uncached=1" in text
        assert f"--tool {tool} --error-exitcode 1 " in text
        assert ("--padding 64 --report-api-errors no" in text) == (tool == "memcheck")
        filtered = all(f"--kernel-name kns={name}" in text for name in gpu.KERNELS)
        assert filtered == (tool != "initcheck")


def test_sanitizers_look_for_all_kernels():
    sources = "".join(path.read_text() for path in (ROOT / "kernels").rglob("*.cu"))
    names = re.findall(r"__global__ [^{]*?(\w+)\(const __grid_constant__", sources)
    assert sources.count("__global__ ") == len(names)
    assert sorted(gpu.OWN_KERNELS[1::2]) == sorted(f"kns={name}" for name in names)


@pytest.mark.skipif(torch.cuda.is_available(), reason="of a machine without GPU")
def test_a_backend_that_cannot_step_is_told(capsys):
    with pytest.raises(SystemExit) as ended:
        gpu.step_by_each()
    assert ended.value.code
    told = capsys.readouterr().out.splitlines()
    assert [line.split(":")[0] for line in told] == ["A step by cuda", "A step by triton"]
    assert all("Error: " in line for line in told)


def test_every_scenario_is_stressed(machine):
    assert run(machine, "stress") == 0
    assert {path.stem for path in machine.glob("*.log")} == {f"stress-{n}" for n in SCENARIOS}


def test_one_part_keeps_what_others_left(machine):
    assert run(machine, "stress") == 0
    assert run(machine, "bench") == 0
    assert outcomes(machine) == [*[("stress", "passed")] * 3, ("bench", "passed")]
    assert run(machine, "stress") == 0
    assert (machine / "stress-plain.log").read_text().count("called:") == 1  # of the last time


def test_nothing_runs_after_a_build_that_fails(machine, monkeypatch, capsys):
    monkeypatch.setenv("FAIL", "cmake --build")
    assert run(machine, "build", "stress") == 1
    assert outcomes(machine)[-1] == ("build", "failed (3)")
    assert not (machine / "stress-plain.log").exists()
    assert "--install" not in (machine / "build.log").read_text()
    captured = capsys.readouterr()
    assert "a line without an end" in captured.out
    assert "FAILED: build" in captured.err


def test_other_parts_run_after_one_that_fails(machine, monkeypatch, capsys):
    monkeypatch.setenv("FAIL", "scaled")
    assert run(machine, "stress", "bench") == 1
    wanted = [("stress", "passed"), ("stress", "failed (3)"), ("stress", "passed")]
    assert outcomes(machine) == [*wanted, ("bench", "passed")]
    assert "FAILED: stress." in capsys.readouterr().err


@pytest.mark.parametrize(("tool", "status"), [("initcheck", 0), ("racecheck", 1)])
def test_what_initcheck_finds_is_told_and_does_not_count(machine, monkeypatch, tool, status):
    monkeypatch.setenv("FAIL", f"--tool {tool}")
    assert run(machine, "sanitize") == status
    assert outcomes(machine).count(("sanitize", "failed (3)")) == 1


def is_running(pid):
    """Whether it does anything yet: one that has ended may wait to be noticed."""
    try:
        return Path(f"/proc/{pid}/stat").read_text().rsplit(")", 1)[1].split()[0] != "Z"
    except OSError:
        return False


def test_a_part_that_takes_too_long_is_ended_with_all_it_has_started(machine, monkeypatch):
    monkeypatch.setenv("HANG", "--tool racecheck")
    start = time.monotonic()
    assert run(machine, "sanitize", "--minutes", "0.02") == 1
    assert time.monotonic() - start < 30
    assert outcomes(machine).count(("sanitize", "out of time")) == 1
    assert outcomes(machine).count(("sanitize", "passed")) == 3
    assert "begun" in (machine / "sanitize-racecheck.log").read_text()
    assert not is_running(Path(os.environ["HANG_PID"]).read_text().strip())


def test_children_end_with_it(machine, monkeypatch):
    """When a machine's time is over, whoever called `make gpu` ends it with a signal."""
    monkeypatch.setenv("HANG", "--scenario tail")
    monkeypatch.setenv("PYTHONPATH", str(ROOT))
    code = (
        "import sys; from pathlib import Path; from bench import gpu; "
        f"gpu.PYTHON = {gpu.PYTHON!r}; gpu.SITE = Path({str(gpu.SITE)!r}); "
        f"sys.exit(gpu.main(['stress', '--results', {str(machine)!r}]))"
    )
    pid = Path(os.environ["HANG_PID"])
    with subprocess.Popen([sys.executable, "-c", code], cwd=ROOT) as process:
        end = time.monotonic() + 30
        while not (pid.exists() and pid.read_text()) and time.monotonic() < end:
            time.sleep(0.05)
        assert is_running(pid.read_text().strip())
        process.terminate()
        assert process.wait(30) == 1
    assert not is_running(pid.read_text().strip())


def test_what_is_missing_is_told_before_anything_runs(machine, monkeypatch, capsys):
    which, site = shutil.which, gpu.SITE
    monkeypatch.setattr(gpu.shutil, "which", lambda n: None if n == "nvcc" else which(n))
    monkeypatch.setattr(gpu, "is_installed", lambda module: module != "xdist")
    monkeypatch.setattr(gpu, "SITE", site / "not built")
    for parts in (("build", "test"), ("stress",)):
        with pytest.raises(SystemExit):
            run(machine, *parts)
        assert not machine.exists()
        said = capsys.readouterr().err
        if "build" in parts:
            assert "build needs nvcc; test needs Python's xdist" in said
        else:
            assert "stress needs the build, which comes first" in said
    monkeypatch.setattr(gpu, "SITE", site)
    assert run(machine, "stress", "test") == 1  # a part that lacks something keeps no other back
    said = capsys.readouterr()
    assert "left out: test needs Python's xdist" in said.out
    assert "FAILED: test." in said.err
    assert {part for part, _ in outcomes(machine)} == {"stress"}
    with pytest.raises(SystemExit):
        run(machine, "stres")
    assert "no such part: stres; there are build, stress" in capsys.readouterr().err


def test_files_that_cannot_be_collected_are_left_out_and_named(machine, monkeypatch, capsys):
    monkeypatch.setattr(gpu, "is_installed", lambda module: module != "numpy")
    monkeypatch.setattr(gpu, "what_is_missing", lambda names: {})
    assert run(machine, "test") == 0
    assert "left out: tests/test_conformance.py, which needs numpy" in capsys.readouterr().out
    told = (machine / "test.log").read_text()
    assert f"--ignore={ROOT}/tests/test_conformance.py" in told
    assert f"--ignore={ROOT}/tests/test_functional.py" in told  # support/lists.py needs it


def test_make_passes_on_what_it_is_told(machine):
    variables = {"RESULTS": str(machine), "COMMIT": "abc123", "MINUTES": "4"}
    command = ["make", "-n", "gpu", "PARTS=build stress"]
    ours = {key: value for key, value in os.environ.items() if not key.startswith("MAKE")}
    environment = {**ours, **variables}  # not those of the make that runs this suite
    told = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True)
    words = told.stdout.replace("\\\n", " ").split()
    assert words[1:3] == ["-m", "bench.gpu"]
    assert words[3:] == [
        *("--results", f'"{machine}"', "--commit", '"abc123"', "--minutes", "4"),
        *("build", "stress"),
    ]


def test_without_a_gpu_it_says_so(monkeypatch, tmp_path):
    (tmp_path / "python").write_text("#!/bin/sh\necho 'No CUDA GPUs are available' >&2; exit 1\n")
    (tmp_path / "python").chmod(0o755)
    monkeypatch.setattr(gpu, "PYTHON", str(tmp_path / "python"))
    with pytest.raises(SystemExit, match="needs an NVIDIA GPU that torch sees: No CUDA GPUs"):
        gpu.find_gpu()


def test_the_package_is_staged_as_it_is_installed(monkeypatch, tmp_path):
    monkeypatch.setattr(gpu, "SITE", tmp_path)
    gpu.stage_python()
    staged = {path.relative_to(tmp_path / "warpstep") for path in tmp_path.rglob("*.py")}
    kernels = {path.relative_to(ROOT) for path in (ROOT / "kernels").rglob("*.py")}
    assert Path("kernels/triton/launch.py") in kernels
    assert staged == kernels | {
        path.relative_to(ROOT / "python" / "warpstep")
        for path in (ROOT / "python" / "warpstep").rglob("*.py")
    }
    assert (tmp_path / "warpstep" / "py.typed").exists()
