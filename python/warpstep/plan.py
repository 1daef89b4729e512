"""Plans: an optimizer's parameters sorted into buckets, bound once, launched each step.

A bucket holds all parameters of one recipe on one device that one backend steps in one launch.
The native module compares a plan with the optimizer at each step and says when it is stale.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor
from torch.autograd.graph import increment_version

from warpstep import backends, reference
from warpstep.hypers import check_group, pack_groups
from warpstep.recipes import Recipe, real_dtype
from warpstep.state import (
    MOMENTS,
    check_gradient,
    completed,
    describe,
    is_dense,
    is_plain,
    match_layout,
    moments_dtype,
)

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
    entries: list[Entry] = field(default_factory=list)
    tables: Any = None  # device memory, kept alive
    stream: Any = None  # the one that the tables are known to be used on

    def use_tables_on(self, stream: torch.cuda.Stream) -> None:
        """Keeps the tables' memory from reuse until what ``stream`` does by now is done."""
        if stream != self.stream:
            self.stream = stream
            for table in self.tables.values():
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
            if not isinstance(group["params"], (list, tuple)):
                raise TypeError(f"the params of group {index} are no list: {group['params']!r}")

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
        )
        state = {**entry.state, **(entry.new_state or {})}
        moment = moments_dtype(state, amsgrad)
        if moment is None or repeated or chosen == "reference":
            return
        recipe = Recipe(real_dtype(param.dtype), real_dtype(grad.dtype), moment, amsgrad)
        streams = (param, grad, state["step"], *(state[k] for k in MOMENTS if k in state))
        plain = all(is_plain(tensor) for tensor in streams)
        if plain and is_dense(param) and backends.has_kernel(chosen, recipe):
            entry.backend, entry.recipe = chosen, recipe

    def _bucket_of(self, entry: Entry) -> int:
        """The number of the entry's bucket, which is made if it is the first."""
        assert entry.recipe is not None
        for index, bucket in enumerate(self.buckets):
            same_kind = bucket.backend == entry.backend and bucket.recipe == entry.recipe
            if same_kind and bucket.device == entry.param.device:
                bucket.entries.append(entry)
                return index
        self.buckets.append(Bucket(entry.backend, entry.recipe, entry.param.device, [entry]))
        return len(self.buckets) - 1

    def _fill_tables(self, index: int, bucket: Bucket) -> None:
        """Puts a bucket's stable tables in its device's memory."""
        if bucket.backend == "triton":
            kernel, _ = backends.triton_kernel()
            assert kernel is not None

            def stream(key: str) -> list[Tensor]:
                tensors = [e.state[key] for e in bucket.entries]
                return [torch.view_as_real(t) if t.is_complex() else t for t in tensors]

            params = [e.param.detach() for e in bucket.entries]
            bucket.tables = kernel.TensorTable(
                [torch.view_as_real(p) if p.is_complex() else p for p in params],
                stream("exp_avg"),
                stream("exp_avg_sq"),
                stream("max_exp_avg_sq") if bucket.recipe.amsgrad else None,
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
        reason: str | None = self._native.check(optimizer.state, optimizer.param_groups)
        return reason

    def run(self, optimizer: OnePass, grad_scale: Tensor | None, found_inf: Tensor | None) -> None:
        """Takes the step, after a check that found the plan valid."""
        # All that can fail, before the first write.
        values: list[tuple[Tensor, Tensor]] = []
        if self.python_only:
            values = self._computed_by_reference(optimizer, self.python_only, grad_scale, found_inf)
        scales = None
        if grad_scale is not None or found_inf is not None:
            scales = [
                tuple(scale_on(t, b.device) for t in (grad_scale, found_inf)) for b in self.buckets
            ]
        for bucket in self.cuda_buckets:
            bucket.use_tables_on(torch.cuda.current_stream(bucket.device))
        if self._native is not None:
            self._native.launch(torch.get_num_threads(), scales)
        for index, bucket in self.triton_buckets:
            pair = scales[index] if scales is not None else (None, None)
            self._run_triton(optimizer, index, bucket, *pair)
        if self._native is not None and self.buckets:
            self._native.increment_versions()
        if values:
            reference.store(values)
        for mention in self.repeated:
            again = self._computed_by_reference(optimizer, [mention], grad_scale, found_inf)
            reference.store(again)

    def _computed_by_reference(
        self,
        optimizer: OnePass,
        mentions: list[tuple[Tensor, int, str]],
        grad_scale: Tensor | None,
        found_inf: Tensor | None,
    ) -> list[tuple[Tensor, Tensor]]:
        """Checks and steps parameters that the native module does not look at."""
        entries = []
        for param, group, name in mentions:
            if param.grad is not None:
                entry = Entry(param, group, name, optimizer.state.get(param) or {})
                self._prepare(optimizer, entry)
                entries.append(entry)
        publish(optimizer, entries)
        values: list[tuple[Tensor, Tensor]] = []
        if entries and found_inf is not None and found_inf.item() != 0:
            return values
        for entry in entries:
            grad = entry.param.grad
            assert grad is not None
            hypers = optimizer.param_groups[entry.group]
            values += reference.computed(entry.param, grad, entry.state, hypers, grad_scale)
        return values

    def _run_triton(
        self,
        optimizer: OnePass,
        index: int,
        bucket: Bucket,
        grad_scale: Tensor | None,
        found_inf: Tensor | None,
    ) -> None:
        kernel, _ = backends.triton_kernel()
        assert kernel is not None
        copies: list[Tensor] = []  # alive until the launch is enqueued
        if self._native is not None:
            grads = torch.frombuffer(bytearray(self._native.grad_table(index)), dtype=torch.int64)
            hypers = self._native.hyper_table(index)
        else:
            copies = [
                match_layout(e.param, e.param.grad)
                for e in bucket.entries
                if e.param.grad is not None
            ]
            rest = iter(copies)
            # An empty tensor's gradient has no address; any but 0 makes its step count.
            grads = torch.tensor(
                [0 if e.param.grad is None else next(rest).data_ptr() or 1 for e in bucket.entries],
                dtype=torch.int64,
            )
            hypers = pack_groups(optimizer.param_groups)
        kernel.launch(
            bucket.tables,
            grads,
            hypers,
            recipe=bucket.recipe,
            grad_scale=grad_scale,
            found_inf=found_inf,
        )
        if self._native is None:
            increment_version([e.param for e in bucket.entries if e.param.grad is not None])

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


def scale_on(scale: Tensor | None, device: torch.device) -> Tensor | None:
    """A GradScaler's number as float32 on ``device``; raises ValueError if it is not one number."""
    if scale is None:
        return None
    if scale.numel() != 1:
        raise ValueError(f"grad_scale and found_inf must have one element, not {describe(scale)}")
    return scale.to(device=device, dtype=torch.float32, non_blocking=True)
