"""Everything that needs an NVIDIA GPU, in parts: `make gpu`, or `make gpu PARTS="build stress"`.

It takes the Python that is there and no network, and writes into one folder as it goes: a log for
each command, `parts.csv` with what became of each, and the benchmark's results. A part ends within
its limit; one that fails or is stopped leaves what it had.
"""

from __future__ import annotations

import argparse
import ast
import csv
import functools
import importlib.util
import os
import re
import shlex
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
TESTS = ROOT / "tests"
PYTHON = sys.executable
BUILD, SITE = ROOT / "build" / "gpu-cmake", ROOT / "build" / "gpu-site"

# The suite's processes, and the threads of each process. Most wait for Triton to compile.
PROCESSES, THREADS = min(14, max(2, (os.cpu_count() or 8) - 2)), 2
# The tests that differ where there is a GPU, by what is in their names: files, and the backends and
# devices that tests are parametrized with. Without those that take minutes and need none.
ON_GPU = "cuda or triton or gpu"
NOT_ON_GPU = ("integrations", "test_cuda_code.py", "test_triton_code.py")
COLUMNS = ("part", "command", "outcome", "seconds_of_part", "gpu", "commit", "ended_utc")
POLL_SECONDS = 0.2
# A stopped command may take so long to end by itself.
GRACE_SECONDS = 5.0

# Behind torch's caching allocator, and with nothing between allocations, a write beyond a tensor's
# end hits another tensor's memory, which no sanitizer minds.
UNCACHED = {"PYTORCH_NO_CUDA_MEMORY_CACHING": "1"}
KERNELS = ("step_kernel", "tile_kernel", "grad_norm_kernel", "least_magnitude_kernel")
OWN_KERNELS = tuple(word for name in KERNELS for word in ("--kernel-name", f"kns={name}"))
# torch asks for things that fail, and copes: those are no errors of the kernels.
SANITIZERS = {
    "memcheck": ("--padding", "64", "--report-api-errors", "no", *OWN_KERNELS),
    "racecheck": OWN_KERNELS,
    "synccheck": OWN_KERNELS,
    # Knows what was initialized only if it sees all kernels. torch reads padding of its own.
    "initcheck": (),
}


@dataclass(frozen=True)
class Setting:
    """Where the parts run: on which GPU, measuring which commit, with results in which folder, and
    each for how many minutes at most.
    """

    gpu: str
    capability: str
    results: Path
    commit: str | None
    minutes: float


@dataclass(frozen=True)
class Command:
    """A process, and the log that its output is appended to. Where it is not `fatal`, its failure
    is told and does not count.
    """

    log: str
    arguments: Sequence[str | Path]
    environment: dict[str, str] = field(default_factory=dict)
    fatal: bool = True

    def __str__(self) -> str:
        return shlex.join([*(f"{k}={v}" for k, v in self.environment.items()), *self._words()])

    def _words(self) -> list[str]:
        return [str(argument) for argument in self.arguments]

    def start(self, log: Path) -> subprocess.Popen[bytes]:
        """Begins it, in a process group of its own. It writes the log itself."""
        path = os.pathsep.join(map(str, (SITE, TESTS)))
        own = {"PYTHONPATH": path, "PYTHONUNBUFFERED": "1", **self.environment}
        with log.open("a") as file:
            file.write(f"$ {self}\n")
            file.flush()
            return subprocess.Popen(
                self._words(),
                cwd=ROOT,
                env={**os.environ, **own},
                stdout=file,
                stderr=subprocess.STDOUT,
                stdin=subprocess.DEVNULL,
                preexec_fn=os.setpgrp,
            )


Stages = list[list[Command]]  # Those of a stage run at the same time.


@dataclass(frozen=True)
class Part:
    """What `make gpu` can do by itself, and what has to be installed for it."""

    what: str
    stages: Callable[[Setting], Stages]
    modules: tuple[str, ...] = ()
    programs: tuple[str, ...] = ()
    needs_build: bool = True


def python(log: str, *arguments: str | Path, **environment: str) -> Command:
    """A command that the Python which runs this runs."""
    return Command(log, [PYTHON, *arguments], environment)


def build(setting: Setting) -> Stages:
    """Stages the package by hand, which takes neither pip nor a network."""
    import pybind11

    configure: list[str | Path] = ["cmake", "-G", "Ninja", "-S", ROOT, "-B", BUILD]
    configure += ["-DWARPSTEP_CUDA=ON", f"-DWARPSTEP_CUDA_ARCHS={setting.capability}"]
    configure += [f"-DPython_EXECUTABLE={PYTHON}", f"-Dpybind11_DIR={pybind11.get_cmake_dir()}"]
    configure += [f"-DCMAKE_INSTALL_PREFIX={SITE / 'warpstep'}"]
    smi = [[Command("build", ["nvidia-smi"], fatal=False)]] if shutil.which("nvidia-smi") else []
    return [
        *smi,
        [Command("build", ["nvcc", "--version"])],
        [Command("build", configure)],
        [Command("build", ["cmake", "--build", BUILD])],
        [python("build", "-c", "from bench import gpu; gpu.stage_python()")],
        [Command("build", ["cmake", "--install", BUILD])],
        [python("build", "-m", "warpstep")],
        # Where one backend does not step, the parts go on with the other.
        [replace(python("build", "-c", "from bench import gpu; gpu.step_by_each()"), fatal=False)],
    ]


def stage_python() -> None:
    """Puts the package's Python files where the native module is going to be installed."""
    shutil.rmtree(SITE, ignore_errors=True)
    package = SITE / "warpstep"
    shutil.copytree(ROOT / "python" / "warpstep", package, ignore=shutil.ignore_patterns("*.so"))
    kernels = Path("kernels") / "triton"
    shutil.copytree(ROOT / kernels, package / kernels, ignore=shutil.ignore_patterns("__pycache__"))


def step_by_each() -> None:
    """A step by each backend of a GPU, beside the CPU's. Tests leave out a backend that cannot run,
    so this is where it is told.
    """
    import torch

    import warpstep

    def stepped(backend: str, device: str) -> torch.Tensor:
        param = torch.nn.Parameter(torch.arange(-5.0, 50_000).to(device))
        param.grad = param.detach().flip(0)
        warpstep.AdamW([param], lr=0.1, backend=backend).step()
        return param.detach().cpu()

    expected, differ = stepped("cpu", "cpu"), False
    for backend in ("cuda", "triton"):
        try:
            others = int((stepped(backend, "cuda") != expected).sum())
            found = f"{others} of {expected.numel()} parameters are not the CPU's"
        except Exception as error:
            others, found = 1, f"{type(error).__name__}: {error}"
        print(f"A step by {backend}: {found}", flush=True)
        differ = differ or others > 0
    sys.exit(differ)


def stress(setting: Setting) -> Stages:
    """The stress test at its full size, its scenarios side by side: the GPU is then never quiet."""
    script = TESTS / "stress.py"
    return [
        [
            python(f"stress-{name}", script, "--scenario", name, OMP_NUM_THREADS="4")
            for name in ("plain", "scaled", "tail")
        ]
    ]


def test(setting: Setting) -> Stages:
    """Of the suite what differs on a GPU, and is not slow. Each outcome is told at once, so that a
    part that is stopped has told them.
    """
    left_out = [*(TESTS / name for name in NOT_ON_GPU), *sorted(uncollectable())]
    ignored = [f"--ignore={path}" for path in left_out]
    arguments = ["-n", str(PROCESSES), "--dist", "loadgroup", "-m", "not slow", "-k", ON_GPU]
    arguments += ["-vv", "-rfEs"]
    arguments += ["-p", "no:cacheprovider", "-o", "console_output_style=count", *ignored]
    return [[python("test", "-m", "pytest", TESTS, *arguments, OMP_NUM_THREADS=str(THREADS))]]


def sanitize(setting: Setting) -> Stages:
    """All of compute-sanitizer's tools at the same time: each keeps one core busy."""
    script = [PYTHON, TESTS / "sanitize.py"]
    return [
        [
            Command(
                f"sanitize-{tool}",
                ["compute-sanitizer", "--tool", tool, "--error-exitcode", "1", *options, *script],
                UNCACHED,
                fatal=tool != "initcheck",
            )
            for tool, options in SANITIZERS.items()
        ]
    ]


def bench(setting: Setting) -> Stages:
    """The benchmark on the GPU."""
    return [[benchmark("bench", setting.results, setting, "--device", "cuda")]]


def bench_cpu(setting: Setting) -> Stages:
    """What more threads give on the cores beside the GPU."""
    only = ("--device", "cpu", "--only", "*-threads")
    return [[benchmark("bench-cpu", setting.results / "cpu", setting, *only)]]


def benchmark(log: str, out: Path, setting: Setting, *arguments: str) -> Command:
    """bench.run with its results in `out`."""
    commit = ["--commit", setting.commit] if setting.commit else []
    minutes = ("--minutes", f"{setting.minutes - 1:g}")  # and one to end the last case
    return python(log, "-m", "bench.run", "--out", out, *commit, *minutes, *arguments)


PARTS = {
    "build": Part(
        "compile the kernels for this GPU",
        build,
        ("torch", "pybind11"),
        ("cmake", "ninja", "nvcc"),
        needs_build=False,
    ),
    "stress": Part("a thousand steps of 10,001 tensors, compared with the CPU's", stress),
    "test": Part("the suite without its slow tests", test, ("pytest", "xdist", "numpy")),
    "sanitize": Part(
        "compute-sanitizer's tools", sanitize, ("pytest", "numpy"), ("compute-sanitizer",)
    ),
    "bench": Part("the benchmark on the GPU", bench),
    "bench-cpu": Part("the benchmark of the CPU's threads", bench_cpu),
}


@functools.cache  # Most files of tests/ import the same few, which would be parsed again for each.
def imports_of(source: str) -> list[str]:
    """What a module needs to be imported at all: full names, of modules and of what is in them."""
    found = []
    for statement in ast.parse(source).body:
        if isinstance(statement, ast.Import):
            found += [name.name for name in statement.names]
        elif isinstance(statement, ast.ImportFrom) and statement.level == 0 and statement.module:
            found.append(statement.module)
            found += [f"{statement.module}.{name.name}" for name in statement.names]
    return found


@functools.cache  # Thousands of imports are of few modules.
def is_installed(module: str) -> bool:
    """Whether Python would find it. The repository's own modules count."""
    own = {path.stem for path in TESTS.rglob("*")} | {"bench", "warpstep"}
    return module in own or importlib.util.find_spec(module) is not None


def lacking(path: Path) -> set[str]:
    """The packages that a file of tests/ lacks here, or a file there that it imports."""
    found = set()
    for name in imports_of(path.read_text()):
        own = TESTS / f"{name.replace('.', '/')}.py"
        if own.exists():
            found |= lacking(own)
        elif not is_installed(name.split(".")[0]):
            found.add(name.split(".")[0])
    return found


def uncollectable() -> dict[Path, list[str]]:
    """Test files that pytest could not import here -> the packages that they lack."""
    lacks = {path: sorted(lacking(path)) for path in TESTS.rglob("test_*.py")}
    return {path: packages for path, packages in lacks.items() if packages}


def what_is_missing(names: Sequence[str]) -> dict[str, list[str]]:
    """Parts -> what they need and do not find here."""
    found = {}
    for name in names:
        part = PARTS[name]
        absent = [f"Python's {m}" for m in part.modules if not is_installed(m)]
        absent += [program for program in part.programs if shutil.which(program) is None]
        built = any((SITE / "warpstep").glob("_native*.so"))
        if part.needs_build and not built and "build" not in names[: names.index(name)]:
            absent.append("the build, which comes first: PARTS='build ...'")
        if absent:
            found[name] = absent
    return found


def stop(processes: Sequence[subprocess.Popen[bytes]]) -> None:
    """Ends processes and all that they have started."""
    for number in (signal.SIGTERM, signal.SIGKILL):
        for process in processes:
            try:
                os.killpg(process.pid, number)
            except ProcessLookupError:
                continue
        end = time.monotonic() + GRACE_SECONDS
        while time.monotonic() < end and any(process.poll() is None for process in processes):
            time.sleep(POLL_SECONDS)


class Follower:
    """Shows what is appended to a log, line by line."""

    def __init__(self, log: Path, label: str) -> None:
        self.log, self.label = log, label
        self.at = log.stat().st_size if log.exists() else 0
        self.begun = b""  # of a line

    def show(self, last: bool = False) -> None:
        """Prints the lines that have been completed; with `last`, the rest too."""
        with self.log.open("rb") as file:
            file.seek(self.at)
            text = self.begun + file.read()
            self.at = file.tell()
        *lines, self.begun = text.split(b"\n")
        if last and self.begun:
            lines.append(self.begun)
        for line in lines:
            print(f"{self.label}{line.decode(errors='replace')}", flush=True)


def run_together(commands: Sequence[Command], results: Path, end: float) -> list[str]:
    """Runs commands at the same time; what became of each. At `end` they are stopped."""
    logs = [results / f"{command.log}.log" for command in commands]
    labels = [f"[{command.log}] " if len(commands) > 1 else "" for command in commands]
    followers = [Follower(log, label) for log, label in zip(logs, labels, strict=True)]
    processes: list[subprocess.Popen[bytes]] = []
    try:
        for command, log in zip(commands, logs, strict=True):
            processes.append(command.start(log))
        while any(process.poll() is None for process in processes) and time.monotonic() < end:
            time.sleep(POLL_SECONDS)
            for follower in followers:
                follower.show()
    finally:
        codes = [process.poll() for process in processes]
        stop([process for process in processes if process.poll() is None])
        for follower in followers[: len(processes)]:
            follower.show(last=True)
    in_words = {0: "passed", None: "out of time"}
    return [in_words.get(code, f"failed ({code})") for code in codes]


def run_part(name: str, setting: Setting) -> bool:
    """Runs one part until it ends, a stage of it fails, or its time is over; whether all passed
    that has to.
    """
    stages = PARTS[name].stages(setting)
    for command in (command for stage in stages for command in stage):
        (setting.results / f"{command.log}.log").unlink(missing_ok=True)
    start = time.monotonic()
    print(f"== {name}: {PARTS[name].what}; at most {setting.minutes:g} minutes", flush=True)
    passed = True
    for stage in stages:
        outcomes = run_together(stage, setting.results, start + 60 * setting.minutes)
        seconds = time.monotonic() - start
        for command, outcome in zip(stage, outcomes, strict=True):
            record(setting, name, command, outcome, seconds)
            if outcome != "passed":
                note = "" if command.fatal else ", which does not count"
                print(f"{outcome}{note}: {command} (see {command.log}.log)", flush=True)
            passed &= outcome == "passed" or not command.fatal
        if not passed:
            break
    print(f"== {name}: {'passed' if passed else 'FAILED'} in {time.monotonic() - start:.0f} s")
    return passed


def record(setting: Setting, part: str, command: Command, outcome: str, seconds: float) -> None:
    """Adds a line to parts.csv."""
    path = setting.results / "parts.csv"
    is_new = not path.exists()
    with path.open("a", newline="") as file:
        writer = csv.writer(file, lineterminator="\n")
        if is_new:
            writer.writerow(COLUMNS)
        ended = time.strftime("%Y-%m-%d %H:%M:%S", time.gmtime())
        what = (part, str(command).replace(f"{ROOT}/", ""), outcome, f"{seconds:.1f}")
        writer.writerow([*what, setting.gpu, setting.commit or "", ended])


def find_gpu() -> tuple[str, str]:
    """The first GPU's name and compute capability, asked for in a process that then lets it go."""
    ask = (
        "import torch; p = torch.cuda.get_device_properties(0); "
        "print(p.name, f'{p.major}{p.minor}', sep='\\n')"
    )
    done = subprocess.run([PYTHON, "-c", ask], capture_output=True, text=True)
    if done.returncode:
        why = (done.stderr.strip().splitlines() or ["no reason given"])[-1]
        raise SystemExit(f"make gpu needs an NVIDIA GPU that torch sees: {why}")
    name, capability = done.stdout.strip().splitlines()[-2:]
    return name, capability


def slug(name: str) -> str:
    """A folder name for a GPU, as bench.machine makes it."""
    return re.sub(r"[^a-z0-9]+", "-", name.lower()).strip("-")


def commit_here() -> str | None:
    """What git says, where there is one and a repository."""
    done = None
    if shutil.which("git"):
        command = ["git", "describe", "--always", "--exclude=*", "--abbrev=12", "--dirty=+changes"]
        done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    return done.stdout.strip() if done is not None and done.returncode == 0 else None


def main(given: Sequence[str] | None = None) -> int:
    """Runs the parts asked for, one after another. 0 if all passed, 1 if not."""
    parser = argparse.ArgumentParser(prog="python -m bench.gpu", description=__doc__)
    listed = "; ".join(f"{name}: {part.what}" for name, part in PARTS.items())
    parser.add_argument("parts", nargs="*", metavar="PART", help=f"all, or some of: {listed}")
    parser.add_argument("--results", type=Path, help="folder, instead of bench/results/<GPU>")
    parser.add_argument("--commit", help="the commit, where there is no .git to tell it")
    parser.add_argument("--minutes", type=float, default=8.0, help="the limit of a part")
    asked = parser.parse_args(given)
    names = asked.parts or list(PARTS)
    if unknown := [name for name in names if name not in PARTS]:
        parser.error(f"no such part: {', '.join(unknown)}; there are {', '.join(PARTS)}")
    missing = what_is_missing(names)
    told = [f"{name} needs {', '.join(absent)}" for name, absent in missing.items()]
    if missing.keys() >= set(names) or "build" in missing:
        parser.error("; ".join(told))
    gpu, capability = find_gpu()
    results = (asked.results or ROOT / "bench" / "results" / slug(gpu)).resolve()
    results.mkdir(parents=True, exist_ok=True)
    setting = Setting(gpu, capability, results, asked.commit or commit_here(), asked.minutes)
    print(f"{gpu}, commit {setting.commit or 'unknown'}. Results go to {results}", flush=True)
    for path, lacks in uncollectable().items() if "test" in names else ():
        print(f"left out: {path.relative_to(ROOT)}, which needs {', '.join(lacks)}", flush=True)

    for line in told:
        print(f"left out: {line}", flush=True)

    signal.signal(signal.SIGTERM, lambda *_: sys.exit(1))  # so that children are ended
    failed = list(missing)
    for name in (name for name in names if name not in missing):
        if not run_part(name, setting):
            failed.append(name)
            if name == "build":  # What was built before would be tested.
                print("Nothing else runs, for want of a build.")
                break
    if failed:
        print(f"FAILED: {', '.join(failed)}. Logs: {results}", file=sys.stderr)
        return 1
    print(f"All passed: {', '.join(names)}. `make report` puts bench/results into the documents.")
    return 0


if __name__ == "__main__":
    sys.exit(main())
