"""Plans: an optimizer's parameters sorted into buckets, bound once, launched each step.

A bucket holds all parameters of one recipe on one device that one backend steps in one launch.
The native module compares a plan with the optimizer at each step and says when it is stale.
"""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Iterable
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor
from torch.optim.optimizer import Optimizer

from warpstep import backends, reference
from warpstep.binding import NO_STATE, PYTHON_ONLY, bound
from warpstep.buckets import BUCKETS, Bucket, TailTensors, TritonBucket
from warpstep.by_reference import Versions, compute
from warpstep.checks import check_copy, check_gradient
from warpstep.clipping import Clipping, RememberedGrad
from warpstep.collector import without_collections
from warpstep.entries import Entry, WithGrad, publish, with_grads
from warpstep.hypers import check_group, decay_form
from warpstep.norms import combined_norm, norm_of_norms, share_of_norm
from warpstep.options import Options
from warpstep.python_plan import PythonPlan
from warpstep.recipes import RESIDUAL, Recipe, real_dtype
from warpstep.shards import layout_of, own_part, whole
from warpstep.state import completed, parameter_name, unwalkable_reason
from warpstep.statistics import Statistics, statistics_of
from warpstep.stored import moments_in
from warpstep.survey import Survey
from warpstep.tail import Tail

_NOTHING: dict[str, Any] = {}
_NAMED = 8  # parameters in a line of `print(plan)`: the reference may step a whole model's


class Plan:
    """How one optimizer steps, until something that it depends on changes.

    Making a plan checks everything, allocates missing state, and only then publishes it: after an
    exception the optimizer is as it was.

    Attributes:
        buckets: the parameters that kernels step, those of one launch together.
    """

    @torch.inference_mode(False)  # state is for steps outside, too
    @torch.no_grad()
    @without_collections()
    def __init__(self, optimizer: Optimizer, options: Options) -> None:
        self.options = options
        self.buckets: list[Bucket] = []
        self._kinds: dict[Any, list[int]] = {}  # which of them there are of a kind
        # The reference's parameters; and second mentions of a parameter, stepped after its first.
        self.python_only: list[Entry] = []
        self.repeated: list[Entry] = []
        groups = optimizer.param_groups
        for index, group in enumerate(groups):
            check_group(group, options.rule, f" (in parameter group {index})")
            if not isinstance(params := group.get("params"), (list, tuple)):
                raise TypeError(
                    f"the 'params' of parameter group {index} are {params!r}, expected a list of "
                    "parameters"
                )

        entries: list[Entry] = []
        assignments: list[int] = []
        seen: set[int] = set()
        for g, group in enumerate(groups):
            survey = self._survey_of(group)
            for i, param in enumerate(group["params"]):
                state = optimizer.state.get(param)
                grad = options.grad_of(param)
                begins = state or options.begins_all or not options.rule.has_state(group)
                if grad is None and not begins:
                    assignments.append(NO_STATE)
                    continue
                entry = Entry(g, i, param, state or {}, len(assignments))
                repeated = id(param) in seen
                try:
                    if repeated or survey is None or not survey.sorts(entry):
                        self._prepare(optimizer, entry, repeated)
                except (RuntimeError, TypeError):
                    if grad is not None:
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
        self._bound = self._bind(optimizer, assignments)
        # Of parameters with a residual that the native module does not look at: after their step.
        self._versions = Versions(
            entry
            for entry in (self.python_only if self.lasts else entries)
            if groups[entry.group].get("master")
        )
        of_min = {g for g, group in enumerate(groups) if decay_form(group) == "min"}
        for index, bucket in enumerate(self.buckets):
            bucket.bind(self._bound, index, options)
            if of_min and any(entry.group in of_min for entry in bucket.entries):
                bucket.keep_least()
        complex_ones = (entry for entry in entries if entry.param.is_complex())
        self._complex = {assignments[entry.number] for entry in complex_ones}  # buckets with any
        # Not to keep alive what a framework moves away or a program lets go of.
        for entry in entries:
            entry.identity = id(entry.param)
            entry.param, entry.state, entry.new_state = None, _NOTHING, None
        self._by_python = [b for b in self.buckets if isinstance(b, TritonBucket)]
        self._finding_least = [b for b in self.buckets if b.finds_least_apart]

    def _bind(self, optimizer: Optimizer, assignments: list[int]) -> Any:
        """What holds the tensors of the buckets, looks at them at each step and launches."""
        return bound(optimizer, self.options, self.buckets, assignments)

    def _survey_of(self, group: dict[str, Any]) -> Survey | None:
        options, precision = self.options, self.options.precision
        if group.get("master") or options.copies or options.counters:
            return None
        if precision.state_dtype == "8bit":
            return None
        return Survey(
            group,
            options.rule,
            backend=options.backend,
            precision=precision,
        )

    def with_grads(self, optimizer: Optimizer, entries: Iterable[Entry]) -> list[WithGrad]:
        """Those entries whose parameter has a gradient, with both."""
        return with_grads(optimizer, entries, self.options.grad_name)

    def _prepare(self, optimizer: Optimizer, entry: Entry, repeated: bool = False) -> None:
        """Checks one parameter, chooses its backend, and works out what its state lacks."""
        entry.name = name = parameter_name(optimizer.param_groups, entry.group, entry.index)
        param, group = entry.param, optimizer.param_groups[entry.group]
        grad = self.options.grad_of(param)
        grad = param if grad is None else grad
        check_gradient(name, param, grad)
        if group.get("fused") and not entry.state:
            backends.check_device_for_fused(name, param)
        chosen = backends.choose(self.options.backend, param.device)

        rule, precision = self.options.rule, self.options.precision
        on_device = chosen != "reference" or group.get("fused") or group.get("capturable")
        on_device = on_device or param in self.options.counters
        stepped, state, group, copy, new_state = self.options.stepped(param, entry.state, group)
        changes = completed(
            name,
            stepped,
            state,
            rule,
            group,
            precision=precision,
            step_device=param.device if on_device else torch.device("cpu"),
        )
        entry.new_state = {**new_state, **(changes or {})} or None
        check_copy(name, stepped, copy)
        if repeated:
            entry.reason = "the optimizer has it a second time, which is stepped after the first"
            return
        if chosen == "reference":
            entry.reason = (
                "the reference backend was asked for (backend=, or WARPSTEP_BACKEND)"
                if self.options.backend == chosen
                else f"no other backend runs on {param.device}: see `python -m warpstep`"
            )
            return
        state = {**state, **(changes or {})}
        moments = moments_in(state, rule.moments_of(group))
        ema = state["ema"] if group.get("ema_decay") is not None else None
        step = state["step"] if precision.counts_steps(rule, group) else None
        has_master = group.get("master") is not None
        recipe = Recipe(
            rule.name,
            precision.format_of_param(stepped, has_master),
            real_dtype(grad.dtype),
            tuple(precision.format_of_moment(rule, key, m.dtype) for key, m in moments.items()),
            None if ema is None else real_dtype(ema.dtype),
            step is not None,
            has_master,
            None if copy is None else copy.dtype,
            stepped is not param,
        )
        residual = state[RESIDUAL] if has_master else None
        others = {**moments, "master": stepped, "ema": ema, RESIDUAL: residual, "copy": copy}
        entry.reason = unwalkable_reason(param, grad, others, step)
        if not entry.reason and not backends.has_kernel(chosen, recipe):
            entry.reason = f"the {chosen} backend has no kernel for {recipe.in_words}"
        if not entry.reason:
            entry.backend, entry.recipe = chosen, recipe

    def _bucket_of(self, entry: Entry) -> int:
        """The number of the entry's bucket, which is made if it is the first."""
        assert entry.recipe is not None
        device, shards = entry.param.device, layout_of(entry.param)
        of_kind = self._kinds.setdefault((entry.backend, entry.recipe, device), [])
        for index in of_kind:
            if self.buckets[index].shards == shards:
                self.buckets[index].entries.append(entry)
                return index
        kind = BUCKETS[entry.backend]
        self.buckets.append(kind(entry.backend, entry.recipe, device, shards, [entry]))
        of_kind.append(len(self.buckets) - 1)
        return of_kind[-1]

    @property
    def lasts(self) -> bool:
        """Whether ``step`` says when the plan is stale; else the plan serves one step only."""
        return not isinstance(self._bound, PythonPlan)

    def is_one_call(self, tail: Tail) -> bool:
        """Whether the native module takes the whole step, so that no signal can come between."""
        others = self.python_only or self.repeated or self._by_python or self._finding_least
        return self.lasts and not others and not tail.unscales

    def check_capture(self, tail: Tail) -> None:
        """Raises RuntimeError if a graph that is being captured would not repeat the step."""
        for bucket in self.buckets:
            if bucket.backend == "cpu":
                raise RuntimeError(
                    "step() is being captured in a graph, which would not repeat what is stepped "
                    f"on the CPU ({bucket}): give those parameters an optimizer of their own"
                )
            if tail.statistics and bucket.statistics is None:
                raise RuntimeError(
                    "step() is being captured in a graph and has no room for statistics yet: take "
                    "a step before capturing"
                )

    def step(self, optimizer: Optimizer, tail: Tail) -> str | None:
        """Takes the step; or says why the plan does not hold any more, and nothing is changed."""
        tensors = [b.tensors_of(tail) for b in self.buckets] if tail.needs_tensors else None
        for bucket in self.buckets:
            bucket.use_on_current_stream(tail)
        reason: str | None
        if self.is_one_call(tail):
            reason = self._bound.step(
                optimizer.state,
                optimizer.param_groups,
                torch.get_num_threads(),
                tensors,
                tail.zero_grads,
                -1 if tail.measured_grads is None else tail.measured_grads,
            )
        else:
            reason = self._step_in_parts(optimizer, tail, tensors)
        if reason is None:
            self._has_statistics = tail.statistics
        return reason

    @torch.inference_mode(False)
    @torch.no_grad()  # which the line above turns off
    def _step_in_parts(
        self, optimizer: Optimizer, tail: Tail, tensors: list[TailTensors] | None
    ) -> str | None:
        """The step where Python runs or launches some of it. The caller keeps signals away."""
        threads = torch.get_num_threads()
        reason: str | None = self._bound.check(optimizer.state, optimizer.param_groups, threads)
        if reason is None:
            reason = self._changed_by_python(optimizer)
        if reason is not None:
            return reason
        self._bound.keep_alive()  # before any Python, which another thread might use
        try:
            # All that can fail, before the first write.
            if tail.measured_grads not in (None, self.count_grads(optimizer)):
                return "gradients came or went after their norm was taken"
            later = self._writes_grads_later(tail)
            in_pass = replace(tail, zero_grads=False, unscale_grads=False) if later else tail
            stepped = self.with_grads(optimizer, self.python_only)
            if self._versions.written(optimizer):
                return "a parameter with a residual was written to"
            computed = self._computed_by_reference(optimizer, stepped, in_pass)
            for bucket in self._finding_least:
                bucket.find_least()
            for bucket in self._by_python:
                of_bucket = (None,) * 4 if tensors is None else tensors[bucket.index]
                bucket.launch(of_bucket, in_pass)
            zeroes, unscales = in_pass.zero_grads, in_pass.unscales
            reference.store(
                computed, lambda: self._bound.launch(threads, tensors, zeroes, unscales)
            )
            for mention in self.with_grads(optimizer, self.repeated):
                reference.store(self._computed_by_reference(optimizer, [mention], in_pass))
            if self.repeated:  # written to once more
                self._bound.note_versions(optimizer.param_groups)
        finally:
            self._bound.let_go()
        self._versions.note_step(optimizer)
        if later:  # all have been read
            params = (p for group in optimizer.param_groups for p in group["params"])
            reference.leave(map(self.options.grad_of, params), tail)
        self._reference_sums = {
            entry: one.sums
            for (entry, _, _), one in zip(stepped, computed, strict=True)
            if one.sums is not None
        }
        return None

    def _changed_by_python(self, optimizer: Optimizer) -> str | None:
        """Why the plan is stale by gradients that the native module does not look at.

        Of sparse ones a step is torch's own, or raises: who makes the next plan knows which.
        """
        grads = (grad for _, _, grad in self.with_grads(optimizer, self.python_only))
        sparse = any(grad.layout != torch.strided for grad in grads)
        return "a gradient's kind changed" if sparse else None

    def _writes_grads_later(self, tail: Tail) -> bool:
        """Whether kernels must not write gradients, or would write copies of them."""
        if not (tail.zero_grads or tail.unscales):
            return False
        if self.repeated or self._bound.has_shared_grads():
            return True
        copied = () if tail.zero_grads else self._bound.copied_grads()
        return any(own_part(grad).data_ptr() != copy.data_ptr() for grad, copy in copied)

    def _computed_by_reference(
        self, optimizer: Optimizer, mentions: list[WithGrad], tail: Tail
    ) -> list[reference.Computed]:
        """Checks and steps parameters that the native module does not look at."""
        entries = []
        for planned, param, _ in mentions:
            state = optimizer.state.get(param) or {}
            entry = Entry(planned.group, planned.index, param, state, planned.number)
            self._prepare(optimizer, entry)
            entries.append(entry)
        publish(optimizer, entries)
        taken = not entries or tail.found_inf is None or tail.found_inf.item() == 0
        computed = []
        for entry, (_, _, grad) in zip(entries, mentions, strict=True):
            group_of = optimizer.param_groups[entry.group]
            computed.append(compute(entry, grad, group_of, self.options, tail, taken))
        return computed

    def written_params(self, optimizer: Optimizer) -> list[Tensor]:
        """Parameters with a residual that were written to since the last step."""
        written: list[Tensor] = self._bound.written_params(optimizer.param_groups)
        return written + self._versions.written(optimizer)

    def note_versions(self, optimizer: Optimizer) -> None:
        """Parameters with a residual are as they should be, whatever was written to them."""
        self._bound.note_versions(optimizer.param_groups)
        self._versions.note(optimizer)

    def statistics(self, optimizer: Optimizer) -> Statistics | None:
        """What the last step saw; None where no step has been taken with statistics."""
        if not self._has_statistics:
            return None
        there = {id(param): param for group in optimizer.param_groups for param in group["params"]}
        params: list[Tensor | None] = []
        tables: list[Tensor] = []
        for bucket in self.buckets:
            if bucket.statistics is not None:
                params += [there.get(entry.identity) for entry in bucket.entries]
                tables.append(bucket.sums_of_statistics())
        for entry in self.python_only:
            params.append(there.get(entry.identity))
            none = torch.tensor([0.0, 0.0, 0.0, -1.0], dtype=torch.float64, device="cpu")
            tables.append(whole(self._reference_sums.get(entry, none))[None])
        return statistics_of(params, tables) if tables else None

    def grad_norm(self, optimizer: Optimizer, norm_type: float) -> Tensor:
        """The norm of all gradients as they are, after they were gathered. float64.

        One launch a bucket for the 2-norm and the inf-norm; other norms go through torch, as does
        the inf-norm of a complex bucket, which kernels see as pairs of real numbers.
        """
        others = [grad for _, _, grad in self.with_grads(optimizer, self.python_only)]
        none = torch.tensor(0.0, dtype=torch.float64, device="cpu")
        if norm_type not in (2.0, math.inf):
            in_buckets = (entry for bucket in self.buckets for entry in bucket.entries)
            grads = [grad for _, _, grad in self.with_grads(optimizer, in_buckets)]
            grads = [whole(grad) for grad in (*grads, *others) if grad.numel() > 0]
            return norm_of_norms(grads, norm_type) if grads else none
        shares = []
        is_largest = math.isinf(norm_type)
        for bucket in self.buckets:
            if is_largest and bucket.index in self._complex:
                others += [grad for _, _, grad in self.with_grads(optimizer, bucket.entries)]
                continue
            bucket.use_on_current_stream()
            shares.append(bucket.share_of_norm(is_largest))
        shares += [share_of_norm(grad, norm_type) for grad in others if grad.numel() > 0]
        return combined_norm(shares, norm_type) if shares else none

    def gather_grads(self, optimizer: Optimizer) -> str | None:
        """Gathers the gradients, for their norm; or says why the plan does not describe them."""
        threads = torch.get_num_threads()
        reason: str | None = self._bound.gather_grads(optimizer.param_groups, threads)
        return reason or self._changed_by_python(optimizer)

    def clipping(self, optimizer: Optimizer, coef: Tensor, grad_scale: Tensor | None) -> Clipping:
        """A clipping of the gradients that were gathered, which are remembered as they are."""
        measured = self._bound.remember_grads()
        elsewhere = self.with_grads(optimizer, self.python_only)
        name = self.options.grad_name
        others = [RememberedGrad.of(param, grad, name) for _, param, grad in elsewhere]
        return Clipping(coef, grad_scale, self, others, measured + len(others))

    def compare_grads(self) -> tuple[int, int]:
        """How many of the gradients remembered are kept; and of those, how many unwritten."""
        found: tuple[int, int] = self._bound.compare_grads()
        return found

    def forget_grads(self) -> None:
        """Lets go of the gradients remembered."""
        self._bound.forget_grads()

    def count_grads(self, optimizer: Optimizer) -> int:
        """How many parameters have a gradient, of those that are stepped once."""
        return len(self.with_grads(optimizer, self.python_only)) + int(self._bound.count_grads())

    def __str__(self) -> str:
        lines = [str(bucket) for bucket in self.buckets]
        by_reference = [*self.python_only, *self.repeated]
        if by_reference:
            lines.append(f"reference: {len(by_reference)} tensors")
        names = defaultdict(list)
        for entry in by_reference:
            names[entry.reason].append(entry.name)
        for reason, of_reason in names.items():
            more = len(of_reason) - _NAMED
            named = ", ".join(of_reason[:_NAMED]) + (f" and {more} more" if more > 0 else "")
            lines.append(f"  {named}: {reason}")
        return "\n".join(lines)
