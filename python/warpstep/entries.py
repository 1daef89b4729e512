"""Entries: the parameters of a plan, each with what its step needs."""

from __future__ import annotations

from collections.abc import Iterable
from contextlib import nullcontext
from dataclasses import dataclass
from typing import Any

from torch import Tensor
from torch.autograd.graph import increment_version
from torch.optim.optimizer import Optimizer

from warpstep import signals
from warpstep.recipes import Recipe
from warpstep.shards import own_part
from warpstep.state import PARAM


@dataclass(eq=False, slots=True)
class Entry:
    """A parameter that has a gradient or a state, with what its step needs."""

    group: int
    index: int  # in its group
    param: Any  # while a plan is made: later it is found by its place, and not kept alive
    state: dict[str, Any]
    number: int = 0  # of the parameter among the optimizer's
    backend: str = "reference"
    recipe: Recipe | None = None
    name: str = ""  # as messages have it; and why the reference steps it, where it does
    reason: str = ""
    new_state: dict[str, Any] | None = None  # to be merged into the state
    identity: int = 0  # the parameter's id(), once the plan is made


WithGrad = tuple[Entry, Tensor, Tensor]  # an entry, its parameter and the parameter's gradient


def place_of(optimizer: Optimizer, entry: Entry) -> Tensor | None:
    """The parameter in an entry's place; None where the optimizer has none there any more."""
    groups = optimizer.param_groups
    if entry.group < len(groups) and entry.index < len(groups[entry.group]["params"]):
        param: Tensor = groups[entry.group]["params"][entry.index]
        return param
    return None


def with_grads(
    optimizer: Optimizer, entries: Iterable[Entry], grad_name: str = "grad"
) -> list[WithGrad]:
    """Those entries whose parameter has a gradient, with both."""
    placed = ((entry, place_of(optimizer, entry)) for entry in entries)
    found = ((e, p, getattr(p, grad_name, None)) for e, p in placed if p is not None)
    return [(e, p, grad) for e, p, grad in found if grad is not None]


def publish(optimizer: Optimizer, entries: list[Entry]) -> None:
    """Merges the entries' new tensors into the optimizer's state, each parameter's as a whole.

    Signals wait: no step would take a state of which a part is missing.
    """
    is_new = any(entry.new_state is not None for entry in entries)
    with signals.deferred() if is_new else nullcontext():
        for entry in entries:
            if entry.new_state is not None:
                _merge(optimizer.state[entry.param], entry, entry.new_state)
            entry.state = optimizer.state.get(entry.param) or {}


def _merge(state: dict[str, Any], entry: Entry, new: dict[str, Any]) -> None:
    # Not what its first mention has brought.
    ours = {key: new[key] for key in new if entry.state.get(key) is state.get(key)}
    param = ours.pop(PARAM, None)
    added = {key: value for key, value in ours.items() if value is not None}
    if param is not None:
        own_part(entry.param.detach()).copy_(own_part(param))
        increment_version(entry.param)
    state.update(added)  # takes memory for all of them first
    for key, value in ours.items():
        if value is None:
            state.pop(key, None)


def version_of(tensor: Tensor) -> int:
    """How often a tensor was written to; tensors made in inference mode do not count."""
    return 0 if tensor.is_inference() else tensor._version


def was_written(tensor: Tensor, version: int) -> bool:
    """Whether a tensor was written to since ``version_of`` it was that."""
    return version_of(tensor) != version
