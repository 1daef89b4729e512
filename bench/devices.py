"""What differs between measuring on a CPU and on a GPU: waiting, resting, device time, graphs."""

from __future__ import annotations

import math
import time
from collections.abc import Callable

import torch

from bench.sequences import Step

clock = time.perf_counter_ns

# An idle OpenMP worker spins before it sleeps, some 8 ms with libgomp's default: long enough to
# take a core from a competitor with threads of its own. Waiting this long lets it go to sleep.
SETTLE_SECONDS = 0.010


class Cpu:
    """Where a step has its result when it returns."""

    name = "cpu"
    memory: torch.device = torch.device("cpu")

    def synchronize(self) -> None:
        """Until all that was asked for is done: it is."""

    def rest(self) -> None:
        """Before a turn: lets the threads of the one before go to sleep."""
        time.sleep(SETTLE_SECONDS)

    def timed(self, step: Step) -> tuple[float, float]:
        """Nanoseconds until a step's result is there, and until the step returned."""
        start = clock()
        step()
        returned = clock()
        self.synchronize()
        return clock() - start, returned - start


class Cuda(Cpu):
    """Where a step returns once it is enqueued."""

    name = "cuda"
    memory = torch.device("cuda")

    def synchronize(self) -> None:
        """Until the GPU has done all that it was given."""
        torch.cuda.synchronize()

    def rest(self) -> None:
        """No rest: nobody's threads spin, and a GPU without work lowers its clocks."""

    def device_time(self, step: Step, head_start_ns: float) -> float:
        """Nanoseconds the GPU needs for `step`, queued behind a pause so that the host is ahead.

        NaN where the host was not: the GPU then waited for it. The queue holds about a thousand
        launches, and more make the host wait for the pause to end.
        """
        before, after = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        torch.cuda.synchronize()
        torch.cuda._sleep(int(head_start_ns * 2))  # In cycles; no GPU runs much above 2 GHz.
        start = clock()
        before.record()
        step()
        after.record()
        was_ahead = clock() - start < head_start_ns
        torch.cuda.synchronize()
        return before.elapsed_time(after) * 1e6 if was_ahead else math.nan

    def captured(self, step: Step) -> Callable[[], None]:
        """Takes a step, as capturing needs, then captures another; what replays that."""
        side = torch.cuda.Stream()
        side.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(side):
            step()
        torch.cuda.current_stream().wait_stream(side)
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            step()
        replay: Callable[[], None] = graph.replay
        return replay


DEVICES = {"cpu": Cpu(), "cuda": Cuda()}
