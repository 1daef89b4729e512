"""How one case is measured: all competitors in one process, turn by turn, each on its own copy."""

from __future__ import annotations

import gc
import math
import random
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass, field
from zlib import crc32

import torch

from bench.cases import ITEMSIZE, STREAMS_READ, STREAMS_WRITTEN, Case
from bench.competitors import LR, OURS, Competitor, Groups, one_line
from bench.machine import Others, busy_core
from bench.sequences import Step, surroundings
from warpstep import backends

Tensors = list[torch.Tensor]

clock = time.perf_counter_ns

WARM_UP_STEPS = 3

# Steps ahead of the timed one: 400 tensors of 1,024 settle from 1,400 to 450 us within four. They
# end early once they have taken this long; a case whose step takes everyone as long gets none.
STEPS_AHEAD = 4
LONG_STEP_NS = 20e6

# An idle OpenMP worker spins before it sleeps, some 8 ms with libgomp's default: long enough to
# take a core from a competitor with threads of its own. Waiting this long lets it go to sleep.
SETTLE_SECONDS = 0.010

# The copy loop's streams need not be longer than this: it is far beyond any cache.
MOST_COPY_FLOATS = 2**26


@dataclass(frozen=True)
class Effort:
    """How many rounds a case is given: as many as fit into `seconds`, within limits."""

    least: int
    most: int
    seconds: float


@dataclass
class Times:
    """One competitor's samples in nanoseconds, one a round, and what became of it."""

    step: list[float] = field(default_factory=list)
    host: list[float] = field(default_factory=list)
    device: list[float] = field(default_factory=list)
    difference_lr: float | None = None
    left_out: str | None = None


@dataclass
class Result:
    """What measuring one case gave: samples by competitor, the copy loop's in nanoseconds, and how
    many cores other processes kept busy meanwhile.
    """

    case: Case
    times: dict[str, Times]
    copy: list[float]
    copy_kind: str
    others_cores: float | None = None


@dataclass(frozen=True)
class Spread:
    """A median with its 10th and 90th percentile, and the mean, which rare long samples raise."""

    median: float
    p10: float
    p90: float
    mean: float


def spread(samples: Sequence[float]) -> Spread:
    """The spread of some samples."""
    at = torch.tensor([0.5, 0.1, 0.9], dtype=torch.float64)
    values = torch.tensor(samples, dtype=torch.float64)
    return Spread(*values.quantile(at).tolist(), values.mean().item())


def ratio(numerators: Sequence[float], denominators: Sequence[float]) -> Spread:
    """The median of the per-round ratios: what disturbs a whole round cancels in each of them."""
    if len(numerators) != len(denominators):
        raise ValueError(f"{len(numerators)} rounds against {len(denominators)}")
    return spread([a / b for a, b in zip(numerators, denominators, strict=True)])


class Entry:
    """A competitor bound to its own copy of a case's parameters."""

    def __init__(
        self, competitor: Competitor, case: Case, initial: Tensors, gradients: Tensors
    ) -> None:
        self.id = competitor.id
        self.device = initial[0].device.type
        self.parameters = [torch.nn.Parameter(placed_like(t, case.offset)) for t in initial]
        self.gradients = gradients
        groups: Groups = [
            {"params": self.parameters[i :: case.groups], "lr": LR * (1 + i / case.groups)}
            for i in range(case.groups)
        ]
        self.step: Step = competitor.build(groups, case.sequence)
        self.sequence = case.sequence

    def surroundings(self) -> AbstractContextManager[None]:
        """In which its turns take place."""
        return surroundings(self.sequence, self.id == OURS)

    def backward(self) -> None:
        """Gradients as training makes them: by autograd, where its allocator puts them."""
        self.drop_gradients()
        torch.autograd.backward(self.parameters, self.gradients)
        synchronize(self.device)

    def drop_gradients(self) -> None:
        """What zero_grad() does."""
        for parameter in self.parameters:
            parameter.grad = None

    def timed(self) -> tuple[float, float]:
        """Nanoseconds until a step's result is there, and until the step returned. On a CPU they
        are the same.
        """
        start = clock()
        self.step()
        returned = clock()
        synchronize(self.device)
        return clock() - start, returned - start


def placed_like(values: torch.Tensor, offset: int) -> torch.Tensor:
    """A copy of `values` that begins `offset` elements behind an aligned address."""
    flat = torch.empty(values.numel() + offset, dtype=values.dtype, device=values.device)
    return flat[offset:].view(values.shape).copy_(values)


def random_tensors(case: Case, device: str, scale: float) -> Tensors:
    """One random tensor a shape, each allocated by itself."""
    dtype = getattr(torch, case.dtype)
    return [torch.randn(s, device=device).mul_(scale).to(dtype) for s in case.shapes]


class CopyLoop:
    """What memory can do, measured beside the competitors, over as many bytes as the case's floor.

    On a CPU the native module's loop reads four streams and writes three of them back, as a step
    does. Where it is missing, and on a GPU, torch's copy_ moves as many bytes, half of them read,
    half written.
    """

    def __init__(self, case: Case, device: str) -> None:
        self.device = device
        streams = STREAMS_READ + STREAMS_WRITTEN
        wanted = max(1, case.floor_bytes // (streams * ITEMSIZE["float32"]))
        floats = min(wanted, MOST_COPY_FLOATS)
        self.scale = wanted / floats
        touch = native_touch_streams() if device == "cpu" else None
        if touch is not None:
            self.kind = "warpstep's touch_streams (4 read, 3 written)"
            # Ones, since zeros would be one page of memory mapped everywhere.
            tensors = [torch.ones(floats) for _ in range(STREAMS_READ)]
            self.run: Step = lambda: touch(*tensors, torch.get_num_threads())
        else:
            self.kind = "torch's copy_"
            source = torch.ones(floats * streams // 2, device=device)
            target = torch.empty_like(source)
            self.run = lambda: target.copy_(source)

    def nanoseconds(self) -> float:
        """The time for the case's floor bytes."""
        self.run()
        if self.device == "cuda":
            return device_time(self.run, head_start_ns=100_000) * self.scale
        start = clock()
        self.run()
        return (clock() - start) * self.scale


def native_touch_streams() -> Callable[..., object] | None:
    """The native module's read-modify-write loop, or None where there is no native module."""
    module, _ = backends.native()
    return None if module is None else module.touch_streams


def synchronize(device: str) -> None:
    """Until the device has done all that it was given."""
    if device == "cuda":
        torch.cuda.synchronize()


def device_time(step: Step, head_start_ns: float) -> float:
    """Nanoseconds the GPU needs for `step`, queued behind a pause so that the host is ahead.

    More launches than the queue holds (about a thousand) make the host wait for the pause to end:
    then this is the time of a GPU that its host keeps waiting.
    """
    before, after = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
    torch.cuda.synchronize()
    torch.cuda._sleep(int(head_start_ns * 2))  # In cycles; no GPU runs much above 2 GHz.
    before.record()
    step()
    after.record()
    torch.cuda.synchronize()
    return before.elapsed_time(after) * 1e6


def take_turn(entry: Entry, times: Times, case: Case, long: bool) -> None:
    """One turn: new gradients, then a step that is timed.

    If the case is to be measured right after a backward pass, that is all. Else idle threads are
    given time to sleep, and a few steps ahead bring the case into the caches, unless it is `long`:
    then no competitor pays for what the one before it left there and on the cores.
    """
    entry.backward()
    if not case.after_backward:
        time.sleep(SETTLE_SECONDS)
        ahead = 0.0
        for _ in range(0 if long else STEPS_AHEAD):
            ahead += entry.timed()[0]
            if ahead > LONG_STEP_NS:
                break
    step, host = entry.timed()
    times.step.append(step)
    if entry.device == "cuda":
        times.host.append(host)
        times.device.append(device_time(entry.step, head_start_ns=2 * host + 100_000))
    entry.drop_gradients()


@contextmanager
def quiet() -> Iterator[None]:
    """No garbage collection while the clock runs."""
    gc.collect()
    gc.disable()
    try:
        yield
    finally:
        gc.enable()


def measure(
    case: Case,
    competitors: Sequence[Competitor],
    device: str,
    *,
    effort: Effort,
    say: Callable[[str], None],
) -> Result:
    """Measures a case.

    A round gives each competitor one turn, and the copy loop one, in an order shuffled from a fixed
    seed. All see the same gradients. A competitor that fails is left out, with its reason. `say` is
    told what is being done.
    """
    seed = crc32(case.id.encode())
    torch.manual_seed(seed)
    shuffle = random.Random(seed).shuffle
    initial = random_tensors(case, device, 0.02)
    gradients = random_tensors(case, device, 1e-3)
    copy = CopyLoop(case, device)
    times = {competitor.id: Times() for competitor in competitors}

    entries = []
    quickest = math.inf
    for competitor in competitors:
        say(f"warming up {competitor.id}")
        try:
            entry = Entry(competitor, case, initial, gradients)
            with entry.surroundings():
                for _ in range(WARM_UP_STEPS):
                    entry.backward()
                    step, _ = entry.timed()
                    quickest = min(quickest, step)
        except Exception as error:  # A peer can fail in any way; the others are still measured.
            times[competitor.id].left_out = one_line(error)
            continue
        entry.drop_gradients()
        entries.append(entry)
    del initial
    for entry in entries:
        times[entry.id].difference_lr = mean_difference(entry, entries[0]) / LR

    turns: list[Entry | CopyLoop] = [*entries, copy]
    result = Result(case, times, [], copy.kind)
    others = Others()
    start = clock()
    with quiet(), busy_core() if case.beside_busy_core else nullcontext():
        for done in range(effort.most if entries else 0):
            if done >= effort.least and clock() - start > effort.seconds * 1e9:
                break
            say(f"round {done + 1}")
            shuffle(turns)
            for turn in turns:
                if isinstance(turn, CopyLoop):
                    time.sleep(SETTLE_SECONDS)
                    result.copy.append(turn.nanoseconds())
                else:
                    with turn.surroundings():
                        take_turn(turn, times[turn.id], case, long=quickest > LONG_STEP_NS)
    result.others_cores = others.cores()
    return result


def mean_difference(entry: Entry, other: Entry) -> float:
    """The mean absolute difference of a parameter between two competitors.

    The mean and not the largest: two roundings of one bfloat16 may lie a whole learning rate apart.
    """
    with torch.no_grad():
        total = sum(
            float((p.float() - q.float()).abs().sum(dtype=torch.float64))
            for p, q in zip(entry.parameters, other.parameters, strict=True)
        )
    return total / sum(p.numel() for p in entry.parameters)
