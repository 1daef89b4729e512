"""What memory can do: as many bytes as a step moves, with next to no arithmetic, same run."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING

import torch

from bench.cases import Case
from bench.competitors import OURS
from bench.devices import Cpu, Cuda, clock
from warpstep import backends

if TYPE_CHECKING:
    from bench.measure import Entry

Tensors = list[torch.Tensor]

# Calling the copy loop for a smaller tensor than this would measure the call.
LEAST_COPY_FLOATS = 2**16

# What a GPU copies stands for more: many times what its caches hold, and a millisecond.
MOST_COPY_BYTES = 2**32


class CopyLoop:
    """A step's bytes, moved on a CPU in turns of its own.

    The native module's loop takes the place of warpstep's step, over the same parameters, gradients
    and moments, of which large ones stand for all: it reads all four and writes three back. The
    memory must be the same, because a machine can have a faster and a slower one (a virtual machine
    had 58 and 95 GB/s), and which of them a copy of a model lies in is chance.
    """

    kind = "warpstep's touch_streams (4 read, 3 written) over the tensors that it steps"

    def __init__(self, case: Case, entry: Entry, touch: Callable[..., object], device: Cpu) -> None:
        self.case = case
        self.entry = entry
        self.touch = touch
        self.device = device

    def nanoseconds(self) -> float:
        """The time for the case's floor bytes."""
        self.entry.backward()
        for parameter in self.entry.parameters:
            parameter.grad.zero_()  # With these the loop leaves what it writes as it was.
        operands = self.entry.operands()
        arrays = [views for of_one in operands if (views := as_floats(*of_one))]
        moved = self.case.accesses * sum(views[0].nbytes for views in arrays)
        if not self.case.after_backward:
            self.device.rest()
            self.run(arrays)
        start = clock()
        self.run(arrays)
        taken = clock() - start
        self.entry.drop_gradients()
        return taken * self.case.floor_bytes / moved

    def run(self, arrays: list[Tensors]) -> None:
        """Moves all bytes once."""
        self.touch(arrays, torch.get_num_threads())


class OwnCopyLoop(CopyLoop):
    """The same over arrays of its own, for recipes whose tensors have several sizes."""

    kind = "warpstep's touch_streams (4 read, 3 written) over arrays of its own"

    def __init__(self, case: Case, entry: Entry, touch: Callable[..., object], device: Cpu) -> None:
        super().__init__(case, entry, touch, device)
        self.arrays = [torch.zeros(case.floor_bytes // 28) for _ in range(4)]

    def nanoseconds(self) -> float:
        """The time for the case's floor bytes."""
        self.device.rest()
        self.run([self.arrays])
        start = clock()
        self.run([self.arrays])
        return clock() - start


class DeviceCopyLoop:
    """The same on a GPU, whose memory has one speed: torch's copy_ moves as many bytes, half of
    them read, half written; at most 4 GiB, of which the time for more is worked out.
    """

    kind = "torch's copy_"

    def __init__(self, case: Case, device: Cuda) -> None:
        self.device = device
        floats = max(1, copied_bytes(case) // 8)
        self.share = case.floor_bytes / (8 * floats)
        self.source = torch.ones(floats, device=device.memory)
        self.target = torch.empty_like(self.source)

    def nanoseconds(self) -> float:
        """The time for the case's floor bytes."""
        self.run()
        return self.share * self.device.device_time(self.run, head_start_ns=100_000)

    def run(self) -> None:
        """Moves all bytes once."""
        self.target.copy_(self.source)


def copied_bytes(case: Case) -> int:
    """Bytes that a GPU's copy loop moves, which is also the memory that it takes."""
    return min(case.floor_bytes, MOST_COPY_BYTES)


def copy_loop(
    case: Case, entries: Sequence[Entry], device: Cpu
) -> CopyLoop | DeviceCopyLoop | None:
    """The copy loop for a case. None where it would say nothing (small tensors, more than a step),
    where there is no native module, and on a CPU for other operands than AdamW's.
    """
    ours = next((entry for entry in entries if entry.id == OURS), None)
    if ours is None or not case.moves_the_floor:
        return None
    if isinstance(device, Cuda):
        return DeviceCopyLoop(case, device)
    if case.optimizer != "AdamW":
        return None
    touch = native_touch_streams()
    if case.recipe or case.sequence == "copies":
        is_large = case.is_memory_bound and touch is not None
        return OwnCopyLoop(case, ours, touch, device) if touch and is_large else None
    large = any(as_floats(parameter) for parameter in ours.parameters)
    return CopyLoop(case, ours, touch, device) if large and touch is not None else None


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
