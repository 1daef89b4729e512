"""Buckets: parameters of one recipe on one device, which one launch steps. A class for each way."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from warpstep import backends
from warpstep.entries import Entry
from warpstep.options import Options
from warpstep.recipes import Recipe
from warpstep.shards import first_element, largest, own_part, smallest, summed
from warpstep.tail import Tail

# A step's scalars on a bucket's device, as kernels read them, and the table of its statistics.
TailTensors = tuple[Tensor | None, Tensor | None, Tensor | None, Tensor | None]


@dataclass
class Bucket:
    """Entries that one backend steps together; their tensors are bound by a `_native.Plan`."""

    backend: str
    recipe: Recipe
    device: torch.device
    shards: Any  # how its tensors are laid out over processes: layout_of()
    entries: list[Entry] = field(default_factory=list)
    bound: Any = None  # the plan's native part, or a PythonPlan in its place
    index: int = -1  # of this bucket there
    statistics: Tensor | None = None  # float64[chunks, 4], once asked for
    chunk_counts: Tensor | None = None  # int64[tensors], beside them
    # Where some group's decay is "min": float64[tensors + chunks], Launch::least of layout.h.
    least: Tensor | None = None

    def bind(self, bound: Any, index: int, options: Options) -> None:
        """Makes what launches need, once its tensors are bound."""
        self.bound, self.index = bound, index

    @property
    def is_native(self) -> bool:
        """Whether the native module launches it."""
        return True

    @property
    def chunks(self) -> int:
        """How many chunks all its tensors are cut into."""
        return int(self.bound.chunk_count(self.index))

    def count_chunks(self) -> list[int]:
        """How many chunks each tensor is cut into."""
        counts: list[int] = self.bound.chunk_counts(self.index)
        return counts

    def keep_least(self) -> None:
        """Makes room for the tensors' smallest magnitudes, which launches find from now on."""
        rows = len(self.entries)
        self.least = torch.zeros(rows + self.chunks, dtype=torch.float64, device=self.device)
        self._bind_least(self.least)

    def _bind_least(self, least: Tensor) -> None:
        self.bound.set_least(self.index, least=least.data_ptr(), shared=self.shards is not None)

    @property
    def finds_least_apart(self) -> bool:
        """Whether `find_least` is to be called before a launch, which does not do it itself."""
        return self.least is not None and not (self.is_native and self.shards is None)

    def find_least(self) -> None:
        """Finds the smallest magnitudes of whole tensors. Every process has to call it."""
        assert self.least is not None
        self._launch_least()
        if self.shards is not None:
            of_tensors = self.least[: len(self.entries)]
            of_tensors.copy_(smallest(of_tensors, self.shards))

    def _launch_least(self) -> None:
        self.bound.find_least(self.index, torch.get_num_threads())

    def tensors_of(self, tail: Tail) -> TailTensors:
        """What a launch reads and writes for a step's tail."""
        return (*tail.on(self.device), self._statistics_table() if tail.statistics else None)

    def _statistics_table(self) -> Tensor:
        """Where chunks leave their sums: made once, for graphs to keep."""
        if self.statistics is None:
            # The upload first: a graph that is being captured refuses it.
            counts = torch.tensor(self.count_chunks(), dtype=torch.int64, device="cpu")
            self.chunk_counts = counts.to(self.device)
            self.statistics = torch.zeros((self.chunks, 4), dtype=torch.float64, device=self.device)
        return self.statistics

    def sums_of_statistics(self) -> Tensor:
        """The sums of the last step over whole tensors, float64[tensors, 4]."""
        assert self.statistics is not None
        # In the order of the chunks: the same bits each time. Unsafe: lengths are not read.
        sums = torch.segment_reduce(
            self.statistics, "sum", lengths=self.chunk_counts, axis=0, unsafe=True
        )
        return summed(sums, self.shards)

    def use_on_current_stream(self, tail: Tail | None = None) -> None:
        """Keeps what a launch reads from reuse until the current stream has done with it."""

    def share_of_norm(self, is_largest: bool) -> Tensor:
        """The sum of the gradients' squares, or the largest magnitude: over whole tensors."""
        out = torch.zeros(2 + self.chunks, dtype=torch.float64, device=self.device)
        self._launch_norm(is_largest, out)
        return (largest if is_largest else summed)(out[0], self.shards)

    def _launch_norm(self, is_largest: bool, out: Tensor) -> None:
        self.bound.grad_norm(self.index, is_largest, torch.get_num_threads(), out)

    def __str__(self) -> str:
        return f"{self.backend}: {len(self.entries)} tensors on {self.device}, {self.recipe}"


@dataclass
class CudaBucket(Bucket):
    """A bucket whose stable tables lie in the device's memory."""

    tables: dict[str, Tensor] = field(default_factory=dict)
    stream: Any = None  # the one that the tables are known to be used on

    def bind(self, bound: Any, index: int, options: Options) -> None:
        """Puts the stable tables in the device's memory."""
        super().bind(bound, index, options)
        self.tables = {
            name: torch.frombuffer(bytearray(data), dtype=torch.uint8).to(self.device)
            for name, data in bound.host_tables(index).items()
        }
        addresses = {name: table.data_ptr() for name, table in self.tables.items()}
        bound.set_device_tables(index, **addresses)

    def _bind_least(self, least: Tensor) -> None:
        self.tables["least"] = least
        super()._bind_least(least)

    def _statistics_table(self) -> Tensor:
        if self.statistics is None:
            self.stream = None  # it does not know of them
        return super()._statistics_table()

    def use_on_current_stream(self, tail: Tail | None = None) -> None:
        """Records tables and scalars for the current stream."""
        if self.device.type != "cuda":  # the tests' build runs the CUDA source on the CPU
            return
        stream = torch.cuda.current_stream(self.device)
        if stream != self.stream:
            self.stream = stream
            statistics = () if self.statistics is None else (self.statistics,)
            for table in (*self.tables.values(), *statistics):
                table.record_stream(stream)
        numbers = () if tail is None else (tail.grad_scale, tail.found_inf, tail.clip_coef)
        for number in numbers:  # let go of after the launch
            if number is not None and number.is_cuda:
                number.record_stream(stream)


@dataclass
class TritonBucket(Bucket):
    """A bucket that Python launches, by Triton."""

    table: Any = None  # a kernels.triton.launch.TensorTable

    @property
    def is_native(self) -> bool:
        """False: the native module only looks at its tensors."""
        return False

    @property
    def _kernel(self) -> Any:
        kernel, _ = backends.triton_kernel()
        assert kernel is not None
        return kernel

    def bind(self, bound: Any, index: int, options: Options) -> None:
        """Makes the tensor table that Triton's kernels read."""

        def of_state(key: str | None) -> list[Tensor] | None:
            return None if key is None else [_flat(entry.state[key]) for entry in self.entries]

        params = [_flat(entry.param.detach()) for entry in self.entries]
        to = counters = None
        if self.recipe.copy is not None:
            to = [own_part(options.copies[entry.param].detach()) for entry in self.entries]
        if self.recipe.counts_steps:
            counters = [
                options.counters[entry.param] if options.counters else entry.state["step"]
                for entry in self.entries
            ]
        # A copy and a gradient are in no state, a parameter only where it is a master.
        master, *keys, _, _ = self.recipe.keys()
        firsts = None  # where nothing is drawn or in blocks, nobody asks
        if not self.recipe.is_plain:
            firsts = [first_element(entry.param) for entry in self.entries]
        self.table = self._kernel.TensorTable(
            [of_state(master) or params, *map(of_state, keys), to],
            counters,
            [entry.group for entry in self.entries],
            self.device,
            firsts=firsts,
            numbers=[entry.number for entry in self.entries],
            seed=options.precision.seed,
        )
        super().bind(bound, index, options)

    @property
    def chunks(self) -> int:
        """How many chunks, which are programs here, all its tensors are cut into."""
        return int(self.table.programs)

    def count_chunks(self) -> list[int]:
        """How many each tensor is cut into."""
        counts: list[int] = self.table.chunk_counts.tolist()
        return counts

    def launch(self, tensors: TailTensors, tail: Tail) -> None:
        """Launches the step's kernel. Version counters are the plan's business."""
        grad_scale, found_inf, clip_coef, statistics = tensors
        self._kernel.launch(
            self.table,
            self._grads(),
            self.bound.hyper_table(self.index),
            recipe=self.recipe,
            grad_scale=grad_scale,
            found_inf=found_inf,
            clip_coef=clip_coef,
            statistics=statistics,
            least=self.least,
            zero_grads=tail.zero_grads,
            unscale_grads=tail.unscales,
        )

    def _bind_least(self, least: Tensor) -> None:
        pass  # each launch is told

    def _launch_least(self) -> None:
        hypers, recipe = self.bound.hyper_table(self.index), self.recipe
        self._kernel.least_magnitudes(self.table, self._grads(), hypers, self.least, recipe=recipe)

    def _launch_norm(self, is_largest: bool, out: Tensor) -> None:
        grads, recipe = self._grads(), self.recipe
        self._kernel.grad_norm(self.table, grads, out, recipe=recipe, largest=is_largest)

    def _grads(self) -> Tensor:
        return torch.frombuffer(bytearray(self.bound.grad_table(self.index)), dtype=torch.int64)


def _flat(tensor: Tensor) -> Tensor:
    """This process's part of a tensor, as the numbers that it is made of."""
    part = own_part(tensor)
    return torch.view_as_real(part) if part.is_complex() else part


BUCKETS = {"cpu": Bucket, "cuda": CudaBucket, "triton": TritonBucket}
