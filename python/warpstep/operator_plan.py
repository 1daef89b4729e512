"""A step that modes, tracers and transforms see: by operators of torch instead of a launch."""

from __future__ import annotations

from collections import defaultdict
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor
from torch.autograd.graph import increment_version
from torch.optim.optimizer import Optimizer
from torch.utils._python_dispatch import is_traceable_wrapper_subclass

from warpstep import backends, functional, reference
from warpstep.entries import Entry, WithGrad
from warpstep.hypers import decay_form
from warpstep.lists import OPERATORS
from warpstep.plan import Plan
from warpstep.python_plan import PythonPlan
from warpstep.rules import Rule
from warpstep.shards import first_element, holds_values, layout_of, own_part, summed
from warpstep.stored import Stored
from warpstep.tail import Tail
from warpstep.transfers import brought

# By rule and form of decay.
OF_FORM = {(o.rule, "coupled" if o.coupled else "decoupled"): o for o in OPERATORS.values()}

Tensors = dict[str, Tensor]  # one parameter's: param, grad and its state


class OperatorPlan(Plan):
    """How one step is taken while `modes.are_active`: a launch would go past them.

    docs/design.md, NOTE [watched steps].
    """

    def _bind(self, optimizer: Optimizer, assignments: list[int]) -> PythonPlan:
        # For this step only: there is nothing to compare with.
        return PythonPlan(optimizer, self.options.rule, [])

    def _survey_of(self, group: dict[str, Any]) -> None:
        return None  # tensors need not have memory to look at

    def _prepare(self, optimizer: Optimizer, entry: Entry, repeated: bool = False) -> None:
        super()._prepare(optimizer, entry, repeated)
        entry.backend, entry.recipe = "reference", None  # in no bucket

    def step(self, optimizer: Optimizer, tail: Tail) -> str | None:
        """Takes the step. Everything has been checked: what fails now, a mode has refused."""
        step_tail = replace(tail, zero_grads=False, unscale_grads=False)
        params = self.with_grads(optimizer, self.python_only)
        self._reference_sums = self._step_operators(optimizer, params, step_tail)
        self._has_statistics = tail.statistics
        for mention in self.with_grads(optimizer, self.repeated):
            self._step_operators(optimizer, [mention], step_tail)
        self._versions.note_step(optimizer)
        if tail.zero_grads or tail.unscales:  # once all have been read: several may have the same
            reference.leave((grad for _, _, grad in params), tail)
        return None

    def _step_operators(
        self, optimizer: Optimizer, mentions: list[WithGrad], tail: Tail
    ) -> dict[Entry, Tensor]:
        """Steps the parameters that have a gradient. Returns the sums that statistics need."""
        calls: dict[tuple[int, torch.device], list[Tensors]] = defaultdict(list)
        computed: list[reference.Computed] = []
        sums: dict[Entry, Tensor] = {}
        sharded: list[Tensor] = []
        for entry, param, grad in mentions:
            rule, state = self.options.rule, optimizer.state.get(param) or {}
            group, layout = optimizer.param_groups[entry.group], layout_of(param)
            stepped = self.options.stepped(param, state, group)
            group = stepped.group
            tensors = {"param": stepped.param, "grad": grad, **stepped.state}
            if stepped.copy is not None:
                tensors["copy"] = stepped.copy
            by_parts = holds_values(layout) and all(
                layout_of(tensor) == layout for key, tensor in tensors.items() if key != "step"
            )
            if by_parts:
                tensors = {key: own_part(tensor) for key, tensor in tensors.items()}
                if layout is not None:
                    sharded.append(param)
            if by_parts and self._is_for_operator(group, tensors, tail):
                calls[entry.group, param.device].append(tensors)
                continue
            own_layout = layout if by_parts else None
            first, copy = first_element(param), tensors.pop("copy", None)
            stored = Stored(self.options.precision, entry.number, first, copy)
            one = _computed(tensors, group, rule, tail, own_layout, stored, on_host=not by_parts)
            computed.append(one)
            if one.sums is not None:
                sums[entry] = summed(one.sums, layout) if by_parts else one.sums
        for (index, device), of_call in calls.items():
            _call_operator(of_call, optimizer.param_groups[index], self.options.rule, tail, device)
        with torch.no_grad():
            for one in computed:
                for tensor, value in one.stores:
                    # Detached: a graph traced from this is replayed outside of no_grad.
                    reference.write(tensor.detach(), value)
        increment_version(sharded)  # of which only the shards were written to
        return sums

    def _is_for_operator(self, group: dict[str, Any], tensors: Tensors, tail: Tail) -> bool:
        """Whether warpstep's operators can express one parameter's step, and are to take it."""
        return not (
            backends.choose(self.options.backend, tensors["param"].device) == "reference"
            or tail.clip_coef is not None
            or tail.statistics
            or group.get("ema_decay") is not None
            or not self.options.is_of_dtypes(group)
            or any(tensor.dtype == torch.uint8 for tensor in tensors.values())
            or (self.options.rule, decay_form(group)) not in OF_FORM
            or any(isinstance(n.of(group), Tensor) for n in self.options.rule.numbers[2:])
            or any(is_traceable_wrapper_subclass(tensor) for tensor in tensors.values())
        )

    def __str__(self) -> str:
        return f"operators, for a mode or a transform: {len(self.python_only)} tensors"


def _call_operator(
    tensors: list[Tensors],
    group: dict[str, Any],
    rule: Rule,
    tail: Tail,
    device: torch.device,
) -> None:
    """One call for tensors of one group on one device."""

    def of_each(key: str) -> list[Tensor]:
        return [of_param[key] for of_param in tensors]

    operator = OF_FORM[rule, decay_form(group)]
    own: dict[str, Any] = {flag: bool(group[flag]) for flag in operator.flags}
    for name, number in zip(operator.numbers, rule.numbers[1:], strict=True):
        own.setdefault(name, float(number.of(group)))
    moments = rule.moments_of(group)
    grad_scale, found_inf, _ = tail.on(device)
    with torch.no_grad():
        getattr(functional, operator.name)(
            of_each("param"),
            of_each("grad"),
            *(of_each(key) if key in moments else [] for key in rule.moments),
            of_each("step") if rule.counts_steps(group) else [],
            lr=group["lr"] if isinstance(group["lr"], Tensor) else float(group["lr"]),
            **own,
            maximize=bool(group["maximize"]),
            grad_scale=grad_scale,
            found_inf=found_inf,
        )


def _computed(
    tensors: Tensors,
    group: dict[str, Any],
    rule: Rule,
    tail: Tail,
    layout: Any,
    stored: Stored,
    on_host: bool,
) -> reference.Computed:
    """One parameter's step by the reference; whether it is taken is not read on the host."""
    taken: bool | Tensor = True
    if tail.found_inf is not None:
        taken = brought(tail.found_inf, tensors["param"].device).squeeze() == 0
        taken = bool(taken) if on_host else taken
    state = {key: tensor for key, tensor in tensors.items() if key not in ("param", "grad")}
    return reference.computed(
        tensors["param"],
        tensors["grad"],
        state,
        group,
        rule,
        tail,
        taken,
        on_host=on_host,
        layout=layout,
        stored=stored,
    )
