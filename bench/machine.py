"""The machine that a result was measured on, in words."""

from __future__ import annotations

import datetime
import os
import platform
import re
import resource
import subprocess
import sys
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from importlib import metadata
from pathlib import Path
from typing import Any

import torch

REPOSITORY = Path(__file__).resolve().parent.parent


def output_of(command: Sequence[str]) -> str | None:
    """What a command prints, or None where it cannot be run."""
    try:
        done = subprocess.run(
            command, cwd=REPOSITORY, capture_output=True, text=True, timeout=20, check=True
        )
    except (OSError, subprocess.SubprocessError):
        return None
    return done.stdout.strip()


def version_of(distribution: str) -> str | None:
    """The version of an installed distribution, or None."""
    try:
        return metadata.version(distribution)
    except metadata.PackageNotFoundError:
        return None


def cpu_model() -> str:
    """What the CPU calls itself."""
    try:
        text = Path("/proc/cpuinfo").read_text()
    except OSError:
        text = ""
    named = re.search(r"^model name\s*:\s*(.+)$", text, re.MULTILINE)
    return named[1].strip() if named else platform.processor() or platform.machine()


def physical_bytes() -> int:
    """Memory built in."""
    return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")


def free_bytes(device: str) -> int:
    """Memory that a run may fill: what is free, less a reserve."""
    if device == "cuda":
        return int(torch.cuda.mem_get_info()[0] * 0.9)
    try:
        text = Path("/proc/meminfo").read_text()
    except OSError:
        text = ""
    free = re.search(r"^MemAvailable:\s*(\d+) kB", text, re.MULTILINE)
    available = int(free[1]) * 1024 if free else physical_bytes() // 2
    return int(available * 0.8)


# It ends with its parent, however that ends.
KEEP_BUSY = """
import os
parent = os.getppid()
print(flush=True)
while os.getppid() == parent:
    for _ in range(100_000):
        pass
"""


@contextmanager
def busy_core() -> Iterator[None]:
    """While another process computes, and nothing else, on whichever core the system gives it."""
    command = [sys.executable, "-c", KEEP_BUSY]
    with subprocess.Popen(command, stdout=subprocess.PIPE) as process:
        try:
            assert process.stdout is not None
            process.stdout.readline()  # it has begun
            yield
        finally:
            process.kill()


class Others:
    """How much of the machine other processes take: `cores()` since this was made, on Linux.

    This process's children are no others, once they have ended.
    """

    def __init__(self) -> None:
        self.start = self._seconds()

    def cores(self) -> float | None:
        """Cores kept busy by others, in the mean; None where the system does not tell."""
        now = self._seconds()
        if self.start is None or now is None:
            return None
        busy, own, wall = (b - a for a, b in zip(self.start, now, strict=True))
        return max(0.0, (busy - own) / wall)

    @staticmethod
    def _seconds() -> tuple[float, float, float] | None:
        """Seconds of work of all processes, of this one with its children, and on the clock."""
        try:
            line = Path("/proc/stat").read_text().splitlines()[0]
        except OSError:
            return None
        user, nice, system, _, _, irq, soft_irq, stolen = map(int, line.split()[1:9])
        ticks = user + nice + system + irq + soft_irq + stolen
        children = resource.getrusage(resource.RUSAGE_CHILDREN)
        own = time.process_time() + children.ru_utime + children.ru_stime
        return ticks / os.sysconf("SC_CLK_TCK"), own, time.monotonic()


def commit() -> str | None:
    """The commit measured, marked where the working tree differs from it."""
    name = output_of(["git", "rev-parse", "--short=12", "HEAD"])
    if name is None:
        return None
    return f"{name}+changes" if output_of(["git", "status", "--porcelain", "-uno"]) else name


def cores() -> int:
    """How many of the CPU's this process may use."""
    if hasattr(os, "sched_getaffinity"):
        return len(os.sched_getaffinity(0))
    return os.cpu_count() or 1


def describe(device: str, named_commit: str | None = None) -> dict[str, Any]:
    """Everything a reader needs to place a result. `named_commit` is what somebody says it is of,
    for where git cannot tell.
    """
    import warpstep

    machine: dict[str, Any] = {
        "device": device,
        "name": cpu_model(),
        "cpu": cpu_model(),
        "cores": cores(),
        "threads": torch.get_num_threads(),
        "memory_gib": round(physical_bytes() / 2**30, 1),
        "system": platform.platform(terse=True),
        "python": platform.python_version(),
        "torch": torch.__version__,
        "triton": version_of("triton"),
        "warpstep": warpstep.__version__,
        "backend": warpstep.status().chosen["cuda:0" if device == "cuda" else "cpu"],
        "native": warpstep.status().native,
        "commit": named_commit or commit(),
        "date": datetime.datetime.now(datetime.timezone.utc).strftime("%Y-%m-%d %H:%M"),
    }
    if device == "cuda":
        properties = torch.cuda.get_device_properties(0)
        driver = output_of(["nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader"])
        machine |= {
            "name": properties.name,
            "gpu": properties.name,
            "gpu_memory_gib": round(properties.total_memory / 2**30, 1),
            "gpu_capability": f"{properties.major}.{properties.minor}",
            "driver": driver.splitlines()[0] if driver else None,
            "cuda": torch.version.cuda,
        }
    return machine


def cpu_code(machine: dict[str, Any]) -> str:
    """The instruction set of its CPU kernels; "Python" where there is no native module."""
    return str((machine["native"] or {}).get("CPU code", "Python"))


def slug(machine: dict[str, Any]) -> str:
    """A folder name for the machine: the GPU's name, or the CPU's with its code and its cores.

    Virtual machines call several generations of processors by one name; the code tells them apart.
    """
    words = machine["name"]
    if machine["device"] == "cpu":
        words = f"cpu {words} {cpu_code(machine)} {machine['cores']} cores"
    words = re.sub(r"\((r|tm)\)", "", words.lower())
    return re.sub(r"[^a-z0-9]+", "-", words).strip("-")
