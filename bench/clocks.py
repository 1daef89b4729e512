"""A GPU's clocks, power and temperature during measurements, as nvidia-smi tells them."""

from __future__ import annotations

import shutil
import statistics
import subprocess
from pathlib import Path
from types import TracebackType

import torch

QUERIED = ("timestamp", "clocks.sm", "clocks.mem", "power.draw", "temperature.gpu")
UNITS = {"clocks.sm": "MHz", "clocks.mem": "MHz", "power.draw": "W", "temperature.gpu": "C"}
INTERVAL_MS = 200


class Clocks:
    """While it is entered, nvidia-smi adds a line to a file every 200 ms. It sets nothing."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self.process: subprocess.Popen[bytes] | None = None

    def __enter__(self) -> Clocks:
        if (program := shutil.which("nvidia-smi")) is not None:
            gpu = f"GPU-{torch.cuda.get_device_properties(0).uuid}"
            command = [program, f"--id={gpu}", f"--query-gpu={','.join(QUERIED)}"]
            command += ["--format=csv,noheader,nounits", f"--loop-ms={INTERVAL_MS}"]
            with self.path.open("w") as file:
                file.write(", ".join(QUERIED) + "\n")
                file.flush()
                self.process = subprocess.Popen(command, stdout=file, stderr=subprocess.DEVNULL)
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        if self.process is not None:
            self.process.terminate()
            self.process.wait()

    def count(self) -> int:
        """How many samples there are so far."""
        return self.path.read_text().count("\n") - 1 if self.process is not None else 0

    def samples(self, first: int = 0) -> list[dict[str, float]]:
        """The samples so far, from the one with number `first` on."""
        if self.process is None:
            return []
        lines = self.path.read_text().splitlines()[1 + first :]
        return [sample for line in lines if (sample := read(line)) is not None]

    def summary(self, first: int = 0) -> dict[str, dict[str, float]]:
        """Of each quantity that the GPU tells, the least, the median and the largest value."""
        samples = self.samples(first)
        found = {}
        for name, unit in UNITS.items():
            if values := [sample[name] for sample in samples if name in sample]:
                middle = statistics.median(values)
                found[f"{name} {unit}"] = {"min": min(values), "median": middle, "max": max(values)}
        return found


def read(line: str) -> dict[str, float] | None:
    """One line of nvidia-smi's, without what the GPU does not tell; None for half a line."""
    values = line.split(", ")
    if len(values) != len(QUERIED) or not values[-1]:
        return None
    sample = {}
    for name, value in zip(QUERIED[1:], values[1:], strict=True):
        try:
            sample[name] = float(value)
        except ValueError:
            continue
    return sample
