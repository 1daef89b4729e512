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

from bench.cases import STREAMS_READ, STREAMS_WRITTEN, Case
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

# Calling the copy loop for a smaller tensor than this would measure the call.
LEAST_COPY_FLOATS = 2**16


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
    """What measuring one case gave: samples by competitor, the copy loop's in nanoseconds (none
    where it would say nothing), and how many cores other processes kept busy meanwhile.
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
        self.optimizer, self.step = competitor.build(groups, case.sequence)
        self.sequence = case.sequence

    def surroundings(self) -> AbstractContextManager[None]:
        """In which its turns take place."""
        return surroundings(self.sequence, self.id == OURS)

    def backward(self) -> None:
        """Gradients as training makes them: by autograd, where its allocator puts them."""
        self.drop_gradients()
        torch.autograd.backward(self.parameters, self.gradients)
        synchronize(self.device)

    def operands(self) -> list[tuple[torch.Tensor, ...]]:
        """Of each parameter what one step reads, in the order of the native module's functions."""
        state = self.optimizer.state
        names = ("exp_avg", "exp_avg_sq")
        return [(p, p.grad, *(state[p][name] for name in names)) for p in self.parameters]

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
    """What memory can do: a step's bytes, moved with next to no arithmetic, in turns of its own.

    The native module's loop takes the place of warpstep's step, over the same parameters, gradients
    and moments, of which large ones stand for all: it reads all four and writes three back. The
    memory must be the same, because a machine can have a faster and a slower one (a virtual machine
    had 58 and 95 GB/s), and which of them a copy of a model lies in is chance.
    """

    kind = "warpstep's touch_streams (4 read, 3 written) over the tensors that it steps"

    def __init__(self, case: Case, entry: Entry, touch: Callable[..., object]) -> None:
        self.case = case
        self.entry = entry
        self.touch = touch

    def nanoseconds(self) -> float:
        """The time for the case's floor bytes."""
        self.entry.backward()
        for parameter in self.entry.parameters:
            parameter.grad.zero_()  # With these the loop leaves what it writes as it was.
        operands = self.entry.operands()
        streams = [views for of_one in operands if (views := as_floats(*of_one))]
        moved = (STREAMS_READ + STREAMS_WRITTEN) * sum(views[0].nbytes for views in streams)
        if not self.case.after_backward:
            time.sleep(SETTLE_SECONDS)
            self.run(streams)
        start = clock()
        self.run(streams)
        taken = clock() - start
        self.entry.drop_gradients()
        return taken * self.case.floor_bytes / moved

    def run(self, streams: list[Tensors]) -> None:
        """Moves all bytes once."""
        self.touch(streams, torch.get_num_threads())


class DeviceCopyLoop:
    """The same on a GPU, whose memory has one speed: torch's copy_ moves as many bytes, half of
    them read, half written.
    """

    kind = "torch's copy_"

    def __init__(self, case: Case) -> None:
        self.source = torch.ones(max(1, case.floor_bytes // 8), device="cuda")
        self.target = torch.empty_like(self.source)

    def nanoseconds(self) -> float:
        """The time for the case's floor bytes."""
        time.sleep(SETTLE_SECONDS)
        self.run()
        return device_time(self.run, head_start_ns=100_000)

    def run(self) -> None:
        """Moves all bytes once."""
        self.target.copy_(self.source)


def copy_loop(case: Case, entries: Sequence[Entry]) -> CopyLoop | DeviceCopyLoop | None:
    """The copy loop for a case. None where it would say nothing (small tensors, more than a step)
    and where there is no native module.
    """
    ours = next((entry for entry in entries if entry.id == OURS), None)
    if ours is None or case.sequence != "step":
        return None
    if ours.device == "cuda":
        return DeviceCopyLoop(case)
    touch = native_touch_streams()
    large = any(as_floats(parameter) for parameter in ours.parameters)
    return CopyLoop(case, ours, touch) if large and touch is not None else None


def as_floats(*tensors: torch.Tensor) -> list[torch.Tensor]:
    """The same stretch of each tensor as float32, whatever its format; nothing of small ones."""
    size = tensors[0].element_size()
    each = max(1, 4 // size)  # elements a float32
    starts = [-t.storage_offset() % each for t in tensors]
    count = min(t.numel() - start for t, start in zip(tensors, starts, strict=True)) // each * each
    if count * size < 4 * LEAST_COPY_FLOATS:
        return []
    return [
        t.detach().view(-1)[start : start + count].view(torch.float32)
        for t, start in zip(tensors, starts, strict=True)
    ]


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

    copy = copy_loop(case, entries)
    turns = [*entries, *([copy] if copy else [])]
    result = Result(case, times, [], copy.kind if copy else "")
    others = Others()
    start = clock()
    with quiet(), busy_core() if case.beside_busy_core else nullcontext():
        for done in range(effort.most if entries else 0):
            if done >= effort.least and clock() - start > effort.seconds * 1e9:
                break
            say(f"round {done + 1}")
            shuffle(turns)
            for turn in turns:
                if isinstance(turn, Entry):
                    with turn.surroundings():
                        take_turn(turn, times[turn.id], case, long=quickest > LONG_STEP_NS)
                else:
                    result.copy.append(turn.nanoseconds())
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
