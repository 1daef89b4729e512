"""A thousand steps of one long tensor and 10,000 short ones, compared with the CPU's bit by bit.

What a few steps in a quiet process do not show: a step counter that is advanced twice, or read too
late by one of a thousand blocks, an arrival counter that does not come back to zero, a table that
is overwritten while a launch reads it. Steps follow each other without waiting, and every so many
all is compared: counters, arrivals, and every bit of parameters, moments and averages.

`python tests/stress.py` runs it on the GPU, `--help` lists what can be chosen. It prints a line a
finding, and exits with 0 if there is none.
"""

from __future__ import annotations

import argparse
import sys
import time
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn import Parameter

import warpstep
from support.environment import runnable_backends
from support.tolerance import bound
from warpstep.backends import unavailable_reason

CHUNK = 16_384
LR = 1e-3
GRADIENTS = 3  # so many different ones, in turns
SCENARIOS = {
    "plain": "",
    "scaled": "gradients unscaled; some steps are skipped",
    "tail": "clipped twice, averaged, counted, gradients zeroed; some steps are skipped",
}
WAYS = ("eager", "side stream", "graph")


@dataclass(frozen=True)
class Size:
    """How much is stepped: a tensor of so many chunks, and so many of less than one."""

    chunks: int = 1000
    short: int = 10_000

    def numels(self) -> list[int]:
        """Elements of each tensor. Together in one stretch of memory they have all alignments."""
        return [self.chunks * CHUNK - 5, *(1 + 7 * i % 61 for i in range(self.short))]


class Model:
    """Parameters and their optimizer; all that depends on a seed is the same for every model."""

    def __init__(self, size: Size, scenario: str, backend: str, device: str, way: str) -> None:
        self.name = f"{backend}, {way}"
        self.backend, self.device, self.way = backend, device, way
        self.tail = scenario == "tail"
        generator = torch.Generator().manual_seed(0)
        self.numels = size.numels()

        def numbers() -> Tensor:
            return torch.randn(sum(self.numels), generator=generator).to(device)

        self.flat, *self.gradients = (numbers() for _ in range(1 + GRADIENTS))
        self.flat_grad = torch.zeros_like(self.flat)
        self.params = [Parameter(part) for part in self.flat.split(self.numels)]
        for param, grad in zip(self.params, self.flat_grad.split(self.numels), strict=True):
            param.grad = grad
        half = len(self.params) // 2
        self.optimizer = warpstep.AdamW(
            [{"params": self.params[:half]}, {"params": self.params[half:], "lr": 2 * LR}],
            lr=LR,
            backend=backend,
            capturable=way == "graph",
            **({"ema_decay": 0.99, "stats": True} if self.tail else {}),
        )
        # As GradScaler sets them around its call of step().
        self.found_inf: Tensor | None = None
        if scenario != "plain":
            self.found_inf = torch.tensor(0.0, device=device)
            self.optimizer.found_inf = self.found_inf
        if scenario == "scaled":
            self.optimizer.grad_scale = torch.tensor(4.0, device=device)
        self.taken = 0  # steps that were not skipped
        self.norm = torch.zeros(())
        self.side = torch.cuda.Stream(device) if way != "eager" else None
        self.graph: torch.cuda.CUDAGraph | None = None

    def run(self, first: int, last: int) -> None:
        """The steps from `first` until before `last`, none of which is waited for."""
        if self.side is None:
            for t in range(first, last):
                self.step(t)
            return
        self.side.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(self.side):
            for t in range(first, last):
                self.step(t)
        torch.cuda.current_stream().wait_stream(self.side)

    def step(self, t: int) -> None:
        """One step, with the gradients that it has by its number."""
        self.flat_grad.copy_(self.gradients[t % GRADIENTS])
        skipped = self.found_inf is not None and t % 7 == 3
        if self.found_inf is not None:
            self.found_inf.fill_(float(skipped))
        self.taken += not skipped
        if self.graph is not None:
            self.graph.replay()
        elif self.way == "graph" and t > 0:
            self.graph = torch.cuda.CUDAGraph()
            with torch.cuda.graph(self.graph, stream=self.side):
                self.clip_and_step()
            self.graph.replay()
        else:
            self.clip_and_step()

    def clip_and_step(self) -> None:
        """What a graph captures."""
        if self.tail:
            # Sums may differ in their last bits from the CPU's; a maximum may not.
            self.norm = self.optimizer.clip_grad_norm_(1e9)
            self.optimizer.clip_grad_norm_(0.5, float("inf"))
        self.optimizer.step(zero_grads=self.tail)

    def operands(self) -> dict[str, Tensor]:
        """All that the steps have written, flat."""
        states = [self.optimizer.state[param] for param in self.params]
        names = ["exp_avg", "exp_avg_sq", *(["ema"] if self.tail else [])]
        found = {name: torch.cat([state[name].view(-1) for state in states]) for name in names}
        return {"param": self.flat, **found}

    def arrivals(self) -> list[Tensor]:
        """The arrival counters of each bucket, which has them where a GPU's kernel steps it."""
        buckets = self.optimizer.plan.buckets
        found = [b.tables["arrivals"].view(torch.int32) for b in buckets if b.backend == "cuda"]
        return found + [b.table.arrivals for b in buckets if b.backend == "triton"]

    def findings(self, expected: Model, operands: dict[str, Tensor]) -> list[str]:
        """How this model differs from `expected`, whose `operands` these are, on this device."""
        found = []
        steps = torch.stack([self.optimizer.state[p]["step"] for p in self.params])
        counters = torch.full_like(steps, expected.taken)
        found += self.differing("step counters", steps, counters, [1] * len(self.params))
        if arrivals := sum(int(counters.count_nonzero()) for counters in self.arrivals()):
            found.append(f"{arrivals} arrival counters are not zero")
        for name, mine in self.operands().items():
            theirs = operands[name]
            if self.backend == "reference":  # torch's operations fuse nothing
                if not torch.allclose(mine, theirs, rtol=0, atol=self.tolerance(name, theirs)):
                    found.append(f"{name} is far from what it should be")
            else:
                found += self.differing(name, mine, theirs, self.numels)
        if self.tail:
            found += self.tail_findings(expected)
        return found

    def differing(self, what: str, mine: Tensor, theirs: Tensor, numels: list[int]) -> list[str]:
        """Where the bits of two float32 tensors differ: nothing, or one line."""
        differ = mine.view(torch.int32) != theirs.view(torch.int32)
        if not differ.any():
            return []
        at = int(differ.nonzero()[0])
        ends = torch.tensor(numels).cumsum(0)
        tensor = int(torch.searchsorted(ends, at, right=True))
        element = at - int(ends[tensor]) + numels[tensor]
        return [
            f"{what}: {int(differ.sum())} of {differ.numel()} differ, the first in tensor {tensor} "
            f"(element {element}): {mine[at].item()!r}, expected {theirs[at].item()!r}"
        ]

    def tail_findings(self, expected: Model) -> list[str]:
        """Of gradients that should be zero, statistics, and the norm that was returned."""
        found = []
        if self.flat_grad.any():
            found.append("gradients are not zero")
        mine, theirs = (model.optimizer.statistics() for model in (self, expected))
        if mine.nonfinite.any():
            found.append(f"{int(mine.nonfinite.sum())} gradients were found not finite")
        # The CPU sums 1,024 elements at a time in float32, and the norm's own kernel in float64.
        sums, single = 1024 * 2**-24, 4 * 2**-24
        pairs = [(name, getattr(mine, name), getattr(theirs, name), sums) for name in NORMS]
        for name, a, b, rtol in [*pairs, ("the clipped norm", self.norm, expected.norm, single)]:
            if not torch.allclose(a.cpu(), b.cpu(), rtol=rtol, atol=0):
                found.append(f"{name} is not the CPU's")
        return found

    def tolerance(self, name: str, expected: Tensor) -> float:
        """A few roundings a step."""
        if name in ("param", "ema"):
            return bound(self.taken, 2 * LR, expected)
        return self.taken * 10 * torch.finfo(torch.float32).eps * float(expected.abs().max())


NORMS = ("grad_norm", "param_norm", "update_norm")


def run(
    size: Size, scenario: str, steps: int, every: int, backends: dict[str, str], say=print
) -> list[str]:
    """The steps of a scenario on each backend and in each way; what was found to be wrong.

    A model in which something is wrong, or that raises, takes no further step; the others do.
    """
    expected = Model(size, scenario, "cpu", "cpu", "eager")
    models, findings = [], []
    start = time.monotonic()

    def give_up(name: str, t: int, what: list[str]) -> None:
        lines = [f"{scenario}, {name}, after step {t}: {line}" for line in what]
        findings.extend(lines)
        for line in lines:
            say(line)

    for backend, device in backends.items():
        for way in WAYS if device != "cpu" else WAYS[:1]:
            models.append(Model(size, scenario, backend, device, way))
    for first in range(0, steps, every):
        last = min(first + every, steps)
        expected.run(first, last)
        operands = expected.operands()
        for device in set(backends.values()):
            there = {name: t.to(device) for name, t in operands.items()}
            for model in [m for m in models if m.device == device]:
                try:
                    model.run(first, last)
                    found = model.findings(expected, there)
                except Exception as error:  # The others go on.
                    found = [f"{type(error).__name__}: {error}"]
                if found:
                    models.remove(model)
                    give_up(model.name, last, found)
        if last * 10 // steps > first * 10 // steps or not models:
            names = "; ".join(model.name for model in models)
            seconds = time.monotonic() - start
            say(f"{scenario}: {last} of {steps} steps in {seconds:.0f} s, as on the CPU: {names}")
        if not models:
            break
    return findings


def main() -> int:
    """Runs what the command line says, on every backend that a GPU has."""
    on_gpus = {b: d for b, d in runnable_backends().items() if d != "cpu"}
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--steps", type=int, default=1000)
    parser.add_argument("--every", type=int, default=20, help="steps between comparisons")
    parser.add_argument("--chunks", type=int, default=Size.chunks, help="of the long tensor")
    parser.add_argument("--short", type=int, default=Size.short, help="how many short tensors")
    parser.add_argument("--scenario", choices=SCENARIOS, action="append")
    parser.add_argument("--backend", choices=runnable_backends(), action="append")
    given = parser.parse_args()
    chosen = given.backend or list(on_gpus)
    if not chosen:
        parser.error("no backend runs on a GPU here; --backend names one that runs without")
    backends = {backend: runnable_backends()[backend] for backend in chosen}
    size = Size(given.chunks, given.short)
    findings = []
    for backend in ("cuda", "triton") if torch.cuda.is_available() and not given.backend else ():
        if backend not in on_gpus:
            why = unavailable_reason(backend, torch.device("cuda", 0))
            findings.append(f"{backend} takes no part: {why}")
            print(findings[-1])
    for scenario in given.scenario or SCENARIOS:
        findings += run(size, scenario, given.steps, given.every, backends)
    print(f"{len(findings)} findings")
    return 1 if findings else 0


if __name__ == "__main__":
    sys.exit(main())
