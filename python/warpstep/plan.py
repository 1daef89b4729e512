"""Plans: an optimizer's parameters sorted into buckets, bound once, launched each step.

A bucket holds all parameters of one recipe on one device that one backend steps in one launch.
The native module compares a plan with the optimizer at each step and says when it is stale.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Iterator
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor
from torch.autograd.graph import increment_version
from torch.optim.optimizer import Optimizer

from warpstep import backends, reference
from warpstep.buckets import Bucket, Entry, WithGrad, place_of, publish, with_grads
from warpstep.clipping import Clipping, RememberedGrad
from warpstep.hypers import check_group, pack_groups
from warpstep.norms import combined_norm, norm_of_norms, share_of_norm
from warpstep.recipes import Recipe, dtype_name, real_dtype
from warpstep.shards import largest, layout_of, own_part, summed, whole
from warpstep.state import (
    MOMENTS,
    check_device_for_fused,
    check_gradient,
    completed,
    is_walkable,
    match_layout,
    moments_dtype,
    parameter_name,
)
from warpstep.statistics import Statistics, statistics_of
from warpstep.tail import Tail

# What the native module calls parameters that are in no bucket of its own (csrc/plan.h).
NO_STATE, PYTHON_ONLY = -1, -2


@dataclass(frozen=True)
class Options:
    """What an optimizer asks of its plans: see its class."""

    backend: str = "auto"
    state_dtype: torch.dtype | None = None  # of new moments
    ema_dtype: torch.dtype | None = None  # of new averages


class Plan:
    """How one optimizer steps, until something that it depends on changes.

    Making a plan checks everything, allocates missing state, and only then publishes it: after an
    exception the optimizer is as it was.

    Attributes:
        buckets: the parameters that kernels step, those of one launch together.
    """

    @torch.inference_mode(False)  # state is for steps outside, too
    @torch.no_grad()
    def __init__(self, optimizer: Optimizer, options: Options) -> None:
        self.options = options
        self.buckets: list[Bucket] = []
        # The reference's parameters; and second mentions of a parameter, stepped after its first.
        self.python_only: list[Entry] = []
        self.repeated: list[Entry] = []
        groups = optimizer.param_groups
        for index, group in enumerate(groups):
            check_group(group, f" (in parameter group {index})")
            if not isinstance(params := group.get("params"), (list, tuple)):
                raise TypeError(
                    f"the 'params' of parameter group {index} are {params!r}, expected a list of "
                    "parameters"
                )

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
                entry = Entry(g, i, name, param, state or {})
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
                    (self.repeated if repeated else self.python_only).append(entry)
                else:
                    assignments.append(self._bucket_of(entry))
                entries.append(entry)
        # A parameter that is met twice shares its first entry's state.
        publish(optimizer, entries)

        self._reference_sums: dict[Entry, Tensor] = {}
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
        # Not to keep alive what a framework moves away or a program lets go of.
        for entry in entries:
            entry.param, entry.state, entry.new_state = None, {}, None
        self.cuda_buckets = [b for b in self.buckets if b.device.type == b.backend == "cuda"]
        self.triton_buckets = [(i, b) for i, b in enumerate(self.buckets) if b.backend == "triton"]

    def _prepare(self, optimizer: Optimizer, entry: Entry, repeated: bool = False) -> None:
        """Checks one parameter, chooses its backend, and works out what its state lacks."""
        param, group = entry.param, optimizer.param_groups[entry.group]
        grad = param.grad if param.grad is not None else param
        check_gradient(entry.name, param, grad)
        if group["fused"] and not entry.state:
            check_device_for_fused(entry.name, param)
        chosen = backends.choose(self.options.backend, param.device)

        amsgrad = bool(group["amsgrad"])
        on_device = chosen != "reference" or group["fused"] or group["capturable"]
        entry.new_state = completed(
            entry.name,
            param,
            entry.state,
            amsgrad=amsgrad,
            state_dtype=self.options.state_dtype,
            step_device=param.device if on_device else torch.device("cpu"),
            ema=group.get("ema_decay") is not None,
            wanted_ema_dtype=self.options.ema_dtype,
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
        """Whether ``step`` says when the plan is stale; else a plan serves one step only."""
        return self._native is not None

    def is_one_call(self, tail: Tail) -> bool:
        """Whether the native module takes the whole step, so that no signal can come between."""
        others = self.python_only or self.repeated or self.triton_buckets
        return self._native is not None and not others and not tail.unscales

    def step(self, optimizer: Optimizer, tail: Tail) -> str | None:
        """Takes the step; or says why the plan does not hold any more, and nothing is changed."""
        tensors: list[tuple[Tensor | None, ...]] | None = None
        if tail.needs_tensors:
            tensors = [
                (*tail.on(b.device), self._statistics_table(i) if tail.statistics else None)
                for i, b in enumerate(self.buckets)
            ]
        for bucket in self.cuda_buckets:
            stream = torch.cuda.current_stream(bucket.device)
            bucket.use_tables_on(stream)
            if tail.clip_coef is not None and tail.clip_coef.is_cuda:
                tail.clip_coef.record_stream(stream)  # it is let go of after the launch
        reason: str | None
        if self.is_one_call(tail):
            reason = self._native.step(
                optimizer.state,
                optimizer.param_groups,
                torch.get_num_threads(),
                tensors,
                zero_grads=tail.zero_grads,
                expected_grads=-1 if tail.measured_grads is None else tail.measured_grads,
            )
        else:
            reason = self._step_in_parts(optimizer, tail, tensors)
        if reason is None:
            self._has_statistics = tail.statistics
        return reason

    @torch.inference_mode(False)
    @torch.no_grad()  # which the line above turns off
    def _step_in_parts(
        self, optimizer: Optimizer, tail: Tail, tensors: list[tuple[Tensor | None, ...]] | None
    ) -> str | None:
        """The step where Python runs or launches some of it. The caller keeps signals away."""
        threads = torch.get_num_threads()
        if self._native is not None:
            reason: str | None = self._native.check(
                optimizer.state, optimizer.param_groups, threads
            )
            if reason is not None:
                return reason
        if tail.measured_grads not in (None, self.count_grads(optimizer)):
            return "gradients came or went after their norm was taken"
        later = self._writes_grads_later(optimizer, tail)
        in_pass = replace(tail, zero_grads=False, unscale_grads=False) if later else tail
        if self._native is not None:
            self._native.keep_alive()
        try:
            # All that can fail, before the first write.
            stepped = with_grads(optimizer, self.python_only)
            computed = self._computed_by_reference(optimizer, stepped, in_pass)
            for index, bucket in self.triton_buckets:
                of_bucket = tensors[index] if tensors is not None else (None,) * 4
                self._run_triton(optimizer, index, bucket, of_bucket, in_pass)
            reference.store(computed)
            if self._native is not None:
                zeroes, unscales = in_pass.zero_grads, in_pass.unscales
                self._native.launch(threads, tensors, zero_grads=zeroes, unscale_grads=unscales)
            for mention in with_grads(optimizer, self.repeated):
                reference.store(self._computed_by_reference(optimizer, [mention], in_pass))
        finally:
            if self._native is not None:
                self._native.let_go()
        if later:  # all have been read
            reference.leave((p.grad for g in optimizer.param_groups for p in g["params"]), tail)
        self._reference_sums = {
            entry: one.sums
            for (entry, _, _), one in zip(stepped, computed, strict=True)
            if one.sums is not None
        }
        return None

    def _writes_grads_later(self, optimizer: Optimizer, tail: Tail) -> bool:
        """Whether kernels must not write gradients, or would write copies of them."""
        if not (tail.zero_grads or tail.unscales):
            return False
        if self._native is None or tail.zero_grads:
            return not tail.zero_grads or self._has_shared_grads(optimizer)
        copied = self._native.copied_grads()
        are_copies = any(own_part(grad).data_ptr() != copy.data_ptr() for grad, copy in copied)
        return are_copies or self._has_shared_grads(optimizer)

    def _has_shared_grads(self, optimizer: Optimizer) -> bool:
        if self._native is not None:
            return bool(self.repeated or self._native.has_shared_grads())
        grads = [own_part(grad) for _, _, grad in with_grads(optimizer, self._in_buckets())]
        runs = sorted((g.data_ptr(), g.data_ptr() + g.nbytes) for g in grads if g.numel() > 0)
        overlap = any(after[0] < one[1] for one, after in itertools.pairwise(runs))
        return bool(self.repeated) or overlap

    def _computed_by_reference(
        self, optimizer: Optimizer, mentions: list[WithGrad], tail: Tail
    ) -> list[reference.Computed]:
        """Checks and steps parameters that the native module does not look at."""
        entries = []
        for planned, param, _ in mentions:
            state = optimizer.state.get(param) or {}
            entry = Entry(planned.group, planned.index, planned.name, param, state)
            self._prepare(optimizer, entry)
            entries.append(entry)
        publish(optimizer, entries)
        taken = not entries or tail.found_inf is None or tail.found_inf.item() == 0
        computed = []
        for entry, (_, _, grad) in zip(entries, mentions, strict=True):
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
        return torch.tensor(self._native.chunk_counts(index), dtype=torch.int64, device="cpu")

    def _statistics_table(self, index: int) -> Tensor:
        """The memory in which a bucket's chunks leave their sums: made once, for graphs to keep."""
        bucket = self.buckets[index]
        if bucket.statistics is None:
            shape = (self._chunk_count(index), 4)
            bucket.statistics = torch.zeros(shape, dtype=torch.float64, device=bucket.device)
            bucket.chunk_counts = self._chunk_counts(index).to(bucket.device)
            bucket.stream = None  # it does not know of them
        return bucket.statistics

    def _in_buckets(self) -> Iterator[Entry]:
        return (entry for bucket in self.buckets for entry in bucket.entries)

    def statistics(self, optimizer: Optimizer) -> Statistics | None:
        """What the last step saw; None where no step has been taken with statistics."""
        if not self._has_statistics:
            return None
        params: list[Tensor | None] = []
        tables: list[Tensor] = []
        for bucket in self.buckets:
            if bucket.statistics is not None:
                params += [place_of(optimizer, entry) for entry in bucket.entries]
                # In the order of the chunks: the same bits each time. Unsafe: lengths are not read.
                sums = torch.segment_reduce(
                    bucket.statistics, "sum", lengths=bucket.chunk_counts, axis=0, unsafe=True
                )
                tables.append(summed(sums, bucket.shards))
        for entry in self.python_only:
            params.append(place_of(optimizer, entry))
            none = torch.tensor([0.0, 0.0, 0.0, -1.0], dtype=torch.float64, device="cpu")
            tables.append(whole(self._reference_sums.get(entry, none))[None])
        return statistics_of(params, tables) if tables else None

    def grad_norm(self, optimizer: Optimizer, norm_type: float) -> Tensor:
        """The norm of all gradients as they are, after they were gathered. float64.

        One launch a bucket for the 2-norm and the inf-norm; other norms go through torch.
        """
        others = [grad for _, _, grad in with_grads(optimizer, self.python_only)]
        none = torch.tensor(0.0, dtype=torch.float64, device="cpu")
        if self._native is None or norm_type not in (2.0, math.inf):
            grads = [grad for _, _, grad in with_grads(optimizer, self._in_buckets())]
            grads = [whole(grad) for grad in (*grads, *others) if grad.numel() > 0]
            return norm_of_norms(grads, norm_type) if grads else none
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
        shares += [share_of_norm(grad, norm_type) for grad in others if grad.numel() > 0]
        return combined_norm(shares, norm_type) if shares else none

    def stale_grads(self, optimizer: Optimizer) -> str | None:
        """Why this plan does not describe the gradients, or None. Gathers them."""
        threads = torch.get_num_threads()
        reason: str | None = self._native.gather_grads(optimizer.param_groups, threads)
        return reason

    def clipping(self, optimizer: Optimizer, coef: Tensor, grad_scale: Tensor | None) -> Clipping:
        """A clipping of the gradients that were gathered, which are remembered as they are."""
        measured = 0 if self._native is None else self._native.remember_grads()
        elsewhere = [*self.python_only, *(() if self._native else self._in_buckets())]
        others = [RememberedGrad.of(p, grad) for _, p, grad in with_grads(optimizer, elsewhere)]
        plan = self if self._native else None
        return Clipping(coef, grad_scale, plan, others, measured + len(others))

    def compare_grads(self) -> tuple[int, int]:
        """How many of the gradients remembered are kept; and of those, how many unwritten."""
        found: tuple[int, int] = self._native.compare_grads()
        return found

    def forget_grads(self) -> None:
        """Lets go of the gradients remembered."""
        if self._native is not None:
            self._native.forget_grads()

    def count_grads(self, optimizer: Optimizer) -> int:
        """How many parameters have a gradient, of those that are stepped once."""
        others = len(with_grads(optimizer, self.python_only))
        if self._native is not None:
            return others + int(self._native.count_grads())
        return others + len(with_grads(optimizer, self._in_buckets()))

    def _triton_inputs(
        self, optimizer: Optimizer, index: int
    ) -> tuple[Tensor, bytes, list[tuple[Tensor, Tensor, Tensor]]]:
        """Gradients' addresses and hyper-parameters.

        Without the native module also parameters, their gradients, and these laid out as them.
        """
        if self._native is not None:
            grads = torch.frombuffer(bytearray(self._native.grad_table(index)), dtype=torch.int64)
            return grads, self._native.hyper_table(index), []
        entries = self.buckets[index].entries
        found = {
            entry: (param, grad, match_layout(own_part(param), own_part(grad)))
            for entry, param, grad in with_grads(optimizer, entries)
        }
        # An empty tensor's gradient has no address; any but 0 makes its step count.
        addresses = [(found[e][2].data_ptr() or 1) if e in found else 0 for e in entries]
        grads = torch.tensor(addresses, dtype=torch.int64, device="cpu")
        return grads, pack_groups(optimizer.param_groups), list(found.values())

    def _run_triton(
        self,
        optimizer: Optimizer,
        index: int,
        bucket: Bucket,
        of_bucket: tuple[Tensor | None, ...],
        tail: Tail,
    ) -> None:
        kernel, _ = backends.triton_kernel()
        assert kernel is not None
        grads, hypers, found = self._triton_inputs(optimizer, index)
        grad_scale, found_inf, clip_coef, statistics = of_bucket
        kernel.launch(
            bucket.tables,
            grads,
            hypers,
            recipe=bucket.recipe,
            grad_scale=grad_scale,
            found_inf=found_inf,
            clip_coef=clip_coef,
            statistics=statistics,
            zero_grads=tail.zero_grads,
            unscale_grads=tail.unscales,
        )
        if self._native is None:
            increment_version([param for param, _, _ in found])
            if tail.zero_grads:
                increment_version([grad for _, grad, _ in found])
                for _, grad, seen in found:
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
