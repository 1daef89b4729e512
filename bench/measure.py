"""How one case is measured: all competitors in one process, turn by turn, each on its own copy."""

from __future__ import annotations

import gc
import math
import random
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass, field
from zlib import crc32

import torch

from bench.cases import Case
from bench.competitors import LR, OURS, Competitor, Groups, one_line
from bench.copying import Tensors, copy_loop
from bench.devices import Cpu, Cuda, clock
from bench.machine import Others, busy_core
from bench.sequences import surroundings
from bench.shards import as_shards, local

WARM_UP_STEPS = 3

# Steps ahead of the timed one: 400 tensors of 1,024 settle from 1,400 to 450 us within four. They
# end early once they have taken this long; a case whose step takes everyone as long gets none.
STEPS_AHEAD = 4
LONG_STEP_NS = 20e6


# A step that the host takes longer to enqueue has more launches than a GPU's queue.
MOST_QUEUED_NS = 100e6


@dataclass(frozen=True)
class Effort:
    """How many rounds a case is given: as many as fit into `seconds`, within limits."""

    least: int
    most: int
    seconds: float


@dataclass
class Times:
    """One competitor's samples in nanoseconds, one a round, and what became of it. On a CPU there
    are no `host` and `device` times, and a device time is NaN where it could not be told.
    """

    step: list[float] = field(default_factory=list)
    host: list[float] = field(default_factory=list)
    device: list[float] = field(default_factory=list)
    difference_lr: float | None = None
    left_out: str | None = None


@dataclass
class Result:
    """What measuring one case gave: samples by competitor, the copy loop's in nanoseconds (none
    where it would say nothing), and meanwhile the cores that other processes kept busy, and the
    median and the least of the GPU's clocks.
    """

    case: Case
    times: dict[str, Times]
    copy: list[float] = field(default_factory=list)
    copy_kind: str = ""
    others_cores: float | None = None
    sm_mhz: tuple[float | None, float | None] = (None, None)


@dataclass(frozen=True)
class Spread:
    """A median with its 10th and 90th percentile, and the mean, which rare long samples raise."""

    median: float
    p10: float
    p90: float
    mean: float


def spread(samples: Sequence[float]) -> Spread | None:
    """The spread of the samples that there are; None where more than half are NaN."""
    values = torch.tensor(samples, dtype=torch.float64)
    values = values[~values.isnan()]
    if 2 * len(values) < max(1, len(samples)):
        return None
    at = torch.tensor([0.5, 0.1, 0.9], dtype=torch.float64)
    return Spread(*values.quantile(at).tolist(), values.mean().item())


def ratio(numerators: Sequence[float], denominators: Sequence[float]) -> Spread | None:
    """The median of the per-round ratios: what disturbs a whole round cancels in each of them."""
    if len(numerators) != len(denominators):
        raise ValueError(f"{len(numerators)} rounds against {len(denominators)}")
    return spread([a / b for a, b in zip(numerators, denominators, strict=True)])


def median(samples: Spread | None) -> float | None:
    """Of a spread, if there is one."""
    return None if samples is None else samples.median


class Entry:
    """A competitor bound to its own copy of a case's parameters."""

    def __init__(
        self,
        competitor: Competitor,
        case: Case,
        initial: Tensors,
        gradients: Tensors,
        device: Cpu,
    ) -> None:
        self.id = competitor.id
        self.device = device
        own = [placed_like(t, case.offset) for t in initial]
        self.parameters = [torch.nn.Parameter(t) for t in (as_shards(own) if case.sharded else own)]
        self.gradients = as_shards(gradients) if case.sharded else gradients
        groups: Groups = [
            {"params": self.parameters[i :: case.groups], "lr": LR * (1 + i / case.groups)}
            for i in range(case.groups)
        ]
        self.optimizer, self.step = competitor.build(groups, case)
        self.sequence = case.sequence

    def surroundings(self) -> AbstractContextManager[None]:
        """In which its turns take place."""
        return surroundings(self.sequence, self.id == OURS)

    def warm_up(self) -> float:
        """The first steps, which allocate and compile; the nanoseconds that the quickest took."""
        times = []
        for _ in range(WARM_UP_STEPS):
            self.backward()
            times.append(self.timed()[0])
        self.drop_gradients()
        return min(times)

    def backward(self) -> None:
        """Gradients as training makes them: by autograd, where its allocator puts them."""
        self.drop_gradients()
        torch.autograd.backward(self.parameters, self.gradients)
        self.device.synchronize()

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
        """Nanoseconds until a step's result is there, and until the step returned."""
        return self.device.timed(self.step)


class GraphEntry(Entry):
    """A competitor whose step is captured in a CUDA graph and replayed. Gradients stay in place."""

    def warm_up(self) -> float:
        """The first step is taken as it is, and the next are replayed."""
        self.backward()
        assert isinstance(self.device, Cuda)
        self.step = self.device.captured(self.step)
        times = []
        for _ in range(1, WARM_UP_STEPS):
            self.backward()
            times.append(self.timed()[0])
        return min(times)

    def backward(self) -> None:
        """The same gradients, where the graph reads them."""
        for parameter in self.parameters:
            if parameter.grad is None:
                parameter.grad = torch.empty_like(parameter)
        with torch.no_grad():
            torch._foreach_copy_([p.grad for p in self.parameters], self.gradients)
        self.device.synchronize()

    def drop_gradients(self) -> None:
        """They are kept: a graph has their addresses."""


def placed_like(values: torch.Tensor, offset: int) -> torch.Tensor:
    """A copy of `values` that begins `offset` elements behind an aligned address."""
    flat = torch.empty(values.numel() + offset, dtype=values.dtype, device=values.device)
    return flat[offset:].view(values.shape).copy_(values)


def random_tensors(case: Case, device: torch.device, scale: float) -> Tensors:
    """One random tensor a shape, each allocated by itself."""
    dtype = getattr(torch, case.dtype)
    return [torch.randn(s, device=device).mul_(scale).to(dtype) for s in case.shapes]


def take_turn(entry: Entry, times: Times, case: Case, long: bool) -> None:
    """One turn: new gradients, then a step that is timed.

    If the case is to be measured right after a backward pass, that is all. Else idle threads are
    given time to sleep, and a few steps ahead bring the case into the caches, unless it is `long`:
    then no competitor pays for what the one before it left there and on the cores.
    """
    entry.backward()
    if not case.after_backward:
        entry.device.rest()
        ahead = 0.0
        for _ in range(0 if long else STEPS_AHEAD):
            ahead += entry.timed()[0]
            if ahead > LONG_STEP_NS:
                break
    step, host = entry.timed()
    times.step.append(step)
    if isinstance(entry.device, Cuda):
        times.host.append(host)
        times.device.append(
            entry.device.device_time(entry.step, head_start_ns=2 * host + 100_000)
            if host < MOST_QUEUED_NS
            else math.nan
        )
    entry.drop_gradients()


@contextmanager
def threads_of(case: Case) -> Iterator[None]:
    """With as many threads as the case says, torch's own number if it says none."""
    before = torch.get_num_threads()
    torch.set_num_threads(case.threads or before)
    try:
        yield
    finally:
        torch.set_num_threads(before)


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
    device: Cpu,
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
    initial = random_tensors(case, device.memory, 0.02)
    gradients = random_tensors(case, device.memory, 1e-3)
    times = {competitor.id: Times() for competitor in competitors}

    entries = []
    quickest = math.inf
    for competitor in competitors:
        say(f"warming up {competitor.id}")
        try:
            kind = GraphEntry if competitor.graph else Entry
            entry = kind(competitor, case, initial, gradients, device)
            with entry.surroundings():
                quickest = min(quickest, entry.warm_up())
        except Exception as error:  # A peer can fail in any way; the others are still measured.
            times[competitor.id].left_out = one_line(error)
            continue
        entries.append(entry)
    del initial
    for entry in entries:
        times[entry.id].difference_lr = mean_difference(entry, entries[0]) / LR

    copy = copy_loop(case, entries, device)
    turns = [*entries, *([copy] if copy else [])]
    result = Result(case, times, copy_kind=copy.kind if copy else "")
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
            float((local(p).float() - local(q).float()).abs().sum(dtype=torch.float64))
            for p, q in zip(entry.parameters, other.parameters, strict=True)
        )
    return total / sum(p.numel() for p in entry.parameters)
