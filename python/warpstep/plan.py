"""Plans: an optimizer's parameters sorted into buckets, bound once, launched each step.

A bucket holds all parameters of one recipe on one device that one backend steps in one launch.
The native module compares a plan with the optimizer at each step and says when it is stale.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor
from torch.autograd.graph import increment_version

from warpstep import backends, reference
from warpstep.hypers import check_group, pack_groups
from warpstep.recipes import Recipe, dtype_name, real_dtype
from warpstep.shards import largest, layout_of, own_part, summed, whole
from warpstep.state import (
    MOMENTS,
    check_gradient,
    completed,
    is_walkable,
    match_layout,
    moments_dtype,
)
from warpstep.tail import Clipping, Statistics, Tail, combined_norm, statistics_of

if TYPE_CHECKING:
    from warpstep.optimizer import OnePass

# What the native module calls parameters that are in no bucket of its own (csrc/plan.h).
NO_STATE, PYTHON_ONLY = -1, -2


@dataclass
class Entry:
    """A parameter that has a gradient or a state, with what its step needs."""

    param: Tensor
    group: int
    name: str
    state: dict[str, Any]
    backend: str = "reference"
    recipe: Recipe | None = None
    new_state: dict[str, Any] | None = None  # to be merged into the state


@dataclass
class Bucket:
    """Entries of one recipe on one device that one backend steps together."""

    backend: str
    recipe: Recipe
    device: torch.device
    shards: Any  # how its tensors are laid out over processes: layout_of()
    entries: list[Entry] = field(default_factory=list)
    tables: Any = None  # device memory, kept alive
    statistics: Tensor | None = None  # float64[chunks, 4], once asked for
    chunk_counts: Tensor | None = None  # int64[tensors], beside them
    stream: Any = None  # the one that the tables are known to be used on

    def use_tables_on(self, stream: torch.cuda.Stream) -> None:
        """Keeps the tables' memory from reuse until what ``stream`` does by now is done."""
        if stream != self.stream:
            self.stream = stream
            statistics = () if self.statistics is None else (self.statistics,)
            for table in (*self.tables.values(), *statistics):
                table.record_stream(stream)

    def __str__(self) -> str:
        return f"{self.backend}: {len(self.entries)} tensors on {self.device}, {self.recipe}"


def parameter_name(groups: list[dict[str, Any]], group: int, index: int) -> str:
    """``parameter 3 of group 0 ('layer.weight')``, for messages."""
    names = groups[group].get("param_names")
    name = f" ({names[index]!r})" if names else ""
    return f"parameter {index} of group {group}{name}"


class Plan:
    """How one optimizer steps, until something that it depends on changes.

    Making a plan checks everything, allocates missing state, and only then publishes it: after an
    exception the optimizer is as it was.
    """

    def __init__(self, optimizer: OnePass) -> None:
        self.buckets: list[Bucket] = []
        # The reference's parameters; and second mentions of a parameter, stepped after its first.
        self.python_only: list[tuple[Tensor, int, str]] = []
        self.repeated: list[tuple[Tensor, int, str]] = []
        groups = optimizer.param_groups
        for index, group in enumerate(groups):
            check_group(group, f" (in parameter group {index})")
            if not isinstance(params := group.get("params"), (list, tuple)):
                raise TypeError(f"the params of group {index} are no list: {params!r}")

        entries: list[Entry] = []
        assignments: list[int] = []
        seen: set[int] = set()
        for g, group in enumerate(groups):
            for i, param in enumerate(group["params"]):
                state = optimizer.state.get(param)
                if param.grad is None and not state:
                    assignments.append(NO_STATE)
                    continue
                name = parameter_name(groups, g, i)
                entry = Entry(param, g, name, state or {})
                repeated = id(param) in seen
                try:
                    self._prepare(optimizer, entry, repeated)
                except (RuntimeError, TypeError):
                    if param.grad is not None:
                        raise
                    assignments.append(NO_STATE)  # nothing to step: it may be as it likes
                    continue
                seen.add(id(param))
                if entry.backend == "reference":
                    assignments.append(PYTHON_ONLY)
                    (self.repeated if repeated else self.python_only).append((param, g, name))
                else:
                    assignments.append(self._bucket_of(entry))
                entries.append(entry)
        # A parameter that is met twice shares its first entry's state.
        publish(optimizer, entries)

        self._reference_sums: dict[Tensor, Tensor] = {}
        self._has_statistics = False
        self._native: Any = None
        module, _ = backends.native()
        if module is not None:
            self._native = module.Plan(
                state=optimizer.state,
                param_groups=groups,
                assignments=assignments,
                buckets=[
                    module.BucketSpec(
                        backend="external" if b.backend == "triton" else b.backend,
                        **dict(zip(("param", "grad", "moment"), b.recipe.names(), strict=True)),
                        amsgrad=b.recipe.amsgrad,
                        ema=None if b.recipe.ema is None else dtype_name(b.recipe.ema),
                    )
                    for b in self.buckets
                ],
                match_layout=match_layout,
            )
        for index, bucket in enumerate(self.buckets):
            self._fill_tables(index, bucket)
        # Not to keep alive state that a framework moves away.
        for entry in entries:
            entry.state, entry.new_state = {}, None
        self.cuda_buckets = [b for b in self.buckets if b.device.type == b.backend == "cuda"]
        self.triton_buckets = [(i, b) for i, b in enumerate(self.buckets) if b.backend == "triton"]

    def _prepare(self, optimizer: OnePass, entry: Entry, repeated: bool = False) -> None:
        """Checks one parameter, chooses its backend, and works out what its state lacks."""
        param, group = entry.param, optimizer.param_groups[entry.group]
        grad = param.grad if param.grad is not None else param
        check_gradient(entry.name, param, grad)
        requested = "reference" if group["fused"] is False else optimizer.backend
        chosen = backends.choose(requested, param.device)

        amsgrad = bool(group["amsgrad"])
        on_device = chosen != "reference" or group["fused"] or group["capturable"]
        entry.new_state = completed(
            entry.name,
            param,
            entry.state,
            amsgrad=amsgrad,
            state_dtype=optimizer.state_dtype,
            step_device=param.device if on_device else torch.device("cpu"),
            ema=group.get("ema_decay") is not None,
            wanted_ema_dtype=optimizer.ema_dtype,
        )
        state = {**entry.state, **(entry.new_state or {})}
        moment = moments_dtype(state, amsgrad)
        if moment is None or repeated or chosen == "reference":
            return
        moments = [state[key] for key in (MOMENTS if amsgrad else MOMENTS[:2])]
        ema = None
        if group.get("ema_decay") is not None:
            ema = real_dtype(state["ema"].dtype)
            moments.append(state["ema"])
        recipe = Recipe(real_dtype(param.dtype), real_dtype(grad.dtype), moment, amsgrad, ema)
        walkable = is_walkable(param, grad, moments, state["step"])
        if walkable and backends.has_kernel(chosen, recipe):
            entry.backend, entry.recipe = chosen, recipe

    def _bucket_of(self, entry: Entry) -> int:
        """The number of the entry's bucket, which is made if it is the first."""
        assert entry.recipe is not None
        device, shards = entry.param.device, layout_of(entry.param)
        for index, bucket in enumerate(self.buckets):
            same_kind = bucket.backend == entry.backend and bucket.recipe == entry.recipe
            same_place = bucket.device == device and bucket.shards == shards
            if same_kind and same_place:
                bucket.entries.append(entry)
                return index
        self.buckets.append(Bucket(entry.backend, entry.recipe, device, shards, [entry]))
        return len(self.buckets) - 1

    def _fill_tables(self, index: int, bucket: Bucket) -> None:
        """Puts a bucket's stable tables in its device's memory."""
        if bucket.backend == "triton":
            kernel, _ = backends.triton_kernel()
            assert kernel is not None

            def stream(key: str) -> list[Tensor]:
                tensors = [own_part(e.state[key]) for e in bucket.entries]
                return [torch.view_as_real(t) if t.is_complex() else t for t in tensors]

            params = [own_part(e.param).detach() for e in bucket.entries]
            bucket.tables = kernel.TensorTable(
                [torch.view_as_real(p) if p.is_complex() else p for p in params],
                stream("exp_avg"),
                stream("exp_avg_sq"),
                stream("max_exp_avg_sq") if bucket.recipe.amsgrad else None,
                stream("ema") if bucket.recipe.ema is not None else None,
                stream("step"),
                [e.group for e in bucket.entries],
                bucket.device,
            )
        elif bucket.backend == "cuda":
            host = self._native.host_tables(index)
            bucket.tables = {
                name: torch.frombuffer(bytearray(data), dtype=torch.uint8).to(bucket.device)
                for name, data in host.items()
                if data
            }
            addresses = {n: bucket.tables[n].data_ptr() if n in bucket.tables else 0 for n in host}
            self._native.set_device_tables(index, **addresses)

    @property
    def checked_by_native(self) -> bool:
        """Whether ``stale`` can tell; else a plan serves one step only."""
        return self._native is not None

    def stale(self, optimizer: OnePass) -> str | None:
        """Why this plan no longer describes the optimizer, or None. Gathers the step's inputs."""
        state, groups, threads = optimizer.state, optimizer.param_groups, torch.get_num_threads()
        reason: str | None = self._native.check(state, groups, threads)
        return reason

    def run(self, optimizer: OnePass, tail: Tail) -> None:
        """Takes the step, after a check that found the plan valid."""
        if tail.zero_grads and self._has_shared_grads():  # not zeroed before all have been read
            self.run(optimizer, replace(tail, zero_grads=False))
            for group in optimizer.param_groups:
                for param in group["params"]:
                    if param.grad is not None:
                        param.grad.detach().zero_()
            return
        # All that can fail, before the first write.
        computed: list[reference.Computed] = []
        if self.python_only:
            computed = self._computed_by_reference(optimizer, self.python_only, tail)
        tensors: list[tuple[Tensor | None, ...]] | None = None
        if tail.needs_tensors:
            tensors = [
                (*tail.on(b.device), self._statistics_table(i) if tail.statistics else None)
                for i, b in enumerate(self.buckets)
            ]
        for bucket in self.cuda_buckets:
            stream = torch.cuda.current_stream(bucket.device)
            bucket.use_tables_on(stream)
            if tail.total_norm is not None and tail.total_norm.is_cuda:
                tail.total_norm.record_stream(stream)  # it is let go of after the launch
        if self._native is not None:
            self._native.launch(
                torch.get_num_threads(),
                tensors,
                max_norm=tail.max_norm,
                zero_grads=tail.zero_grads,
            )
        for index, bucket in self.triton_buckets:
            of_bucket = tensors[index] if tensors is not None else (None,) * 4
            self._run_triton(optimizer, index, bucket, of_bucket, tail)
        if self._native is not None and self.buckets:
            self._native.increment_versions(tail.zero_grads)
        for one in computed:
            reference.store(one.stores)
        for mention in self.repeated:
            for one in self._computed_by_reference(optimizer, [mention], tail):
                reference.store(one.stores)
        self._reference_sums = {one.param: one.sums for one in computed if one.sums is not None}
        self._has_statistics = tail.statistics

    def _has_shared_grads(self) -> bool:
        return bool(self.repeated or (self._native and self._native.has_shared_grads()))

    def _computed_by_reference(
        self, optimizer: OnePass, mentions: list[tuple[Tensor, int, str]], tail: Tail
    ) -> list[reference.Computed]:
        """Checks and steps parameters that the native module does not look at."""
        entries = []
        for param, group, name in mentions:
            if param.grad is not None:
                entry = Entry(param, group, name, optimizer.state.get(param) or {})
                self._prepare(optimizer, entry)
                entries.append(entry)
        publish(optimizer, entries)
        taken = not entries or tail.found_inf is None or tail.found_inf.item() == 0
        computed = []
        for entry in entries:
            grad = entry.param.grad
            assert grad is not None
            group_of = optimizer.param_groups[entry.group]
            one = reference.computed(entry.param, grad, entry.state, group_of, tail, taken)
            computed.append(one)
        return computed

    def _chunk_count(self, index: int) -> int:
        if self.buckets[index].backend == "triton":
            programs: int = self.buckets[index].tables.programs
            return programs
        return int(self._native.chunk_count(index))

    def _chunk_counts(self, index: int) -> Tensor:
        """Of each tensor of a bucket."""
        if self.buckets[index].backend == "triton":
            counts: Tensor = self.buckets[index].tables.chunk_counts
            return counts
        return torch.tensor(self._native.chunk_counts(index), dtype=torch.int64)

    def _statistics_table(self, index: int) -> Tensor:
        """The memory in which a bucket's chunks leave their sums: made once, for graphs to keep."""
        bucket = self.buckets[index]
        if bucket.statistics is None:
            shape = (self._chunk_count(index), 4)
            bucket.statistics = torch.zeros(shape, dtype=torch.float64, device=bucket.device)
            bucket.chunk_counts = self._chunk_counts(index).to(bucket.device)
            bucket.stream = None  # it does not know of them
        return bucket.statistics

    def statistics(self) -> Statistics | None:
        """What the last step saw; None where no step has been taken with statistics."""
        if not self._has_statistics:
            return None
        params: list[Tensor] = []
        tables: list[Tensor] = []
        for bucket in self.buckets:
            if bucket.statistics is not None:
                params += [entry.param for entry in bucket.entries]
                # In the order of the chunks: the same bits each time. Unsafe: lengths are not read.
                sums = torch.segment_reduce(
                    bucket.statistics, "sum", lengths=bucket.chunk_counts, axis=0, unsafe=True
                )
                tables.append(summed(sums, bucket.shards))
        for param, _, _ in self.python_only:
            params.append(param)
            none = torch.tensor([0.0, 0.0, 0.0, -1.0], dtype=torch.float64)
            tables.append(whole(self._reference_sums.get(param, none))[None])
        return statistics_of(params, tables) if tables else None

    def grad_norm(self, norm_type: float) -> Tensor:
        """The norm of all gradients as they are, after they were gathered. float64.

        One launch a bucket for the 2-norm and the inf-norm; other norms go through torch.
        """
        entries = [entry for bucket in self.buckets for entry in bucket.entries]
        others = [param.grad for param, _, _ in self.python_only if param.grad is not None]
        if self._native is None or norm_type not in (2.0, math.inf):
            grads = [entry.param.grad for entry in entries if entry.param.grad is not None]
            norm = torch.nn.utils.get_total_norm([whole(g) for g in (*grads, *others)], norm_type)
            return norm.double()
        for bucket in self.cuda_buckets:
            bucket.use_tables_on(torch.cuda.current_stream(bucket.device))
        shares = []
        for index, bucket in enumerate(self.buckets):
            out = torch.zeros(
                2 + self._chunk_count(index), dtype=torch.float64, device=bucket.device
            )
            is_largest = math.isinf(norm_type)
            if bucket.backend == "triton":
                self._triton_grad_norm(index, bucket, is_largest, out)
            else:
                threads = torch.get_num_threads()
                self._native.grad_norm(index, largest=is_largest, threads=threads, out=out)
            shares.append((largest if is_largest else summed)(out[0], bucket.shards))
        shares += [_grad_share(grad, norm_type) for grad in others if grad.numel() > 0]
        return combined_norm(shares, norm_type) if shares else torch.tensor(0.0).double()

    def stale_grads(self, optimizer: OnePass) -> str | None:
        """Why this plan does not describe the gradients, or None. Gathers and remembers them."""
        threads = torch.get_num_threads()
        reason: str | None = self._native.gather_grads(optimizer.param_groups, threads)
        return reason

    def clipping(self, total_norm: Tensor, max_norm: float) -> Clipping:
        """What is known of the gradients that were gathered, remembered as they are."""
        elsewhere = [param for param, _, _ in self.python_only]
        if self._native is None:
            elsewhere += [entry.param for bucket in self.buckets for entry in bucket.entries]
        others = [(p, p.grad, p.grad._version) for p in elsewhere if p.grad is not None]
        return Clipping(total_norm, max_norm, self if self._native else None, others=others)

    def compare_grads(self) -> tuple[int, int, int]:
        """Of the gradients remembered: their number, how many are kept, and how many unwritten."""
        found: tuple[int, int, int] = self._native.compare_grads()
        return found

    def forget_grads(self) -> None:
        """Lets go of the gradients remembered."""
        if self._native is not None:
            self._native.forget_grads()

    def count_grads(self) -> int:
        """How many parameters have a gradient, of those that are stepped once."""
        others = sum(param.grad is not None for param, _, _ in self.python_only)
        if self._native is not None:
            return others + int(self._native.count_grads())
        entries = (entry for bucket in self.buckets for entry in bucket.entries)
        return others + sum(entry.param.grad is not None for entry in entries)

    def _triton_inputs(self, optimizer: OnePass, index: int) -> tuple[Tensor, bytes, list[Tensor]]:
        """Gradients' addresses, hyper-parameters, and copies to be kept until the launch."""
        if self._native is not None:
            grads = torch.frombuffer(bytearray(self._native.grad_table(index)), dtype=torch.int64)
            return grads, self._native.hyper_table(index), []
        entries = self.buckets[index].entries
        both = [(e.param, e.param.grad) for e in entries if e.param.grad is not None]
        copies = [match_layout(own_part(param), own_part(grad)) for param, grad in both]
        rest = iter(copies)
        # An empty tensor's gradient has no address; any but 0 makes its step count.
        grads = torch.tensor(
            [0 if e.param.grad is None else next(rest).data_ptr() or 1 for e in entries],
            dtype=torch.int64,
        )
        return grads, pack_groups(optimizer.param_groups), copies

    def _run_triton(
        self,
        optimizer: OnePass,
        index: int,
        bucket: Bucket,
        of_bucket: tuple[Tensor | None, ...],
        tail: Tail,
    ) -> None:
        kernel, _ = backends.triton_kernel()
        assert kernel is not None
        grads, hypers, copies = self._triton_inputs(optimizer, index)
        grad_scale, found_inf, total_norm, statistics = of_bucket
        kernel.launch(
            bucket.tables,
            grads,
            hypers,
            recipe=bucket.recipe,
            grad_scale=grad_scale,
            found_inf=found_inf,
            total_norm=total_norm,
            max_norm=tail.max_norm,
            statistics=statistics,
            zero_grads=tail.zero_grads,
        )
        if self._native is None:
            grads_of = [(e.param, e.param.grad) for e in bucket.entries if e.param.grad is not None]
            increment_version([param for param, _ in grads_of])
            if tail.zero_grads:
                increment_version([grad for _, grad in grads_of])
                for (_, grad), seen in zip(grads_of, copies, strict=True):
                    if seen.data_ptr() != own_part(grad).data_ptr():
                        grad.zero_()

    def _triton_grad_norm(self, index: int, bucket: Bucket, largest: bool, out: Tensor) -> None:
        kernel, _ = backends.triton_kernel()
        assert kernel is not None
        grads = torch.frombuffer(bytearray(self._native.grad_table(index)), dtype=torch.int64)
        kernel.grad_norm(bucket.tables, grads, out, recipe=bucket.recipe, largest=largest)

    def __str__(self) -> str:
        lines = [str(bucket) for bucket in self.buckets]
        by_reference = len(self.python_only) + len(self.repeated)
        if by_reference:
            lines.append(f"reference: {by_reference} tensors")
        return "\n".join(lines)


def publish(optimizer: OnePass, entries: list[Entry]) -> None:
    """Merges the entries' new tensors into the optimizer's state. Cannot fail half-way."""
    for entry in entries:
        if entry.new_state is not None:
            state = optimizer.state[entry.param]
            for key, value in entry.new_state.items():
                if entry.state.get(key) is state.get(key):  # not published for its first mention
                    state[key] = value
        entry.state = optimizer.state[entry.param]


def _grad_share(grad: Tensor, norm_type: float) -> Tensor:
    """One gradient's share of `combined_norm`."""
    values = reference.real_view(grad.detach())
    norm = whole(torch.linalg.vector_norm(values, norm_type, dtype=torch.float64))
    return norm if math.isinf(norm_type) else norm.square()
