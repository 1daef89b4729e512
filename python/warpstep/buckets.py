"""Entries: parameters with what their step needs. Buckets: entries that are stepped together."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor
from torch.optim.optimizer import Optimizer

from warpstep.recipes import Recipe


@dataclass(eq=False)
class Entry:
    """A parameter that has a gradient or a state, with what its step needs."""

    group: int
    index: int  # in its group
    name: str
    param: Any  # while a plan is made: later it is found by its place, and not kept alive
    state: dict[str, Any]
    backend: str = "reference"
    recipe: Recipe | None = None
    new_state: dict[str, Any] | None = None  # to be merged into the state


def place_of(optimizer: Optimizer, entry: Entry) -> Tensor | None:
    """The parameter in an entry's place; None where the optimizer has none there any more."""
    groups = optimizer.param_groups
    if entry.group < len(groups) and entry.index < len(groups[entry.group]["params"]):
        param: Tensor = groups[entry.group]["params"][entry.index]
        return param
    return None


WithGrad = tuple[Entry, Tensor, Tensor]  # an entry, its parameter and the parameter's gradient


def with_grads(optimizer: Optimizer, entries: Iterable[Entry]) -> list[WithGrad]:
    """Those entries whose parameter has a gradient, with both."""
    placed = ((entry, place_of(optimizer, entry)) for entry in entries)
    return [(e, p, p.grad) for e, p in placed if p is not None and p.grad is not None]


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


def publish(optimizer: Optimizer, entries: list[Entry]) -> None:
    """Merges the entries' new tensors into the optimizer's state. Cannot fail half-way."""
    for entry in entries:
        if entry.new_state is not None:
            state = optimizer.state[entry.param]
            for key, value in entry.new_state.items():
                if entry.state.get(key) is state.get(key):  # not published for its first mention
                    state[key] = value
        entry.state = optimizer.state[entry.param]
