"""Parameters that the reference steps: computed as options say, noticed to be written to."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

from torch import Tensor
from torch.optim.optimizer import Optimizer

from warpstep import reference
from warpstep.entries import Entry, version_of, was_written, with_grads
from warpstep.options import Options
from warpstep.shards import first_element, layout_of, own_part, summed
from warpstep.stored import Stored
from warpstep.tail import Tail


def compute(
    entry: Entry, grad: Tensor, group: dict[str, Any], options: Options, tail: Tail, taken: bool
) -> reference.Computed:
    """One parameter's step, not yet stored."""
    param, state, group, copy, _ = options.stepped(entry.param, entry.state, group)
    layout, first = layout_of(param), first_element(param)
    by_parts = layout is not None and not options.is_of_dtypes(group)
    if by_parts:  # bits are of no use to DTensor's operations
        state = {key: own_part(tensor) for key, tensor in state.items()}
        param, grad = own_part(param), own_part(grad)
        copy = None if copy is None else own_part(copy)
    computed = reference.computed(
        param,
        grad,
        state,
        group,
        options.rule,
        tail,
        taken,
        layout=layout if by_parts else None,
        stored=Stored(options.precision, entry.number, first, copy),
    )
    if by_parts and computed.sums is not None:
        computed.sums = summed(computed.sums, layout)
    return computed


class Versions:
    """How often parameters with a residual were written to, as of the last step."""

    def __init__(self, entries: Iterable[Entry]) -> None:
        self._versions = {entry: version_of(entry.param) for entry in entries}

    def written(self, optimizer: Optimizer) -> list[Tensor]:
        """Those that were written to since."""
        return [p for p, entry in self._there(optimizer) if was_written(p, self._versions[entry])]

    def note_step(self, optimizer: Optimizer) -> None:
        """A step has written to those that have a gradient."""
        for entry, param, _ in with_grads(optimizer, self._versions):
            self._versions[entry] = version_of(param)

    def note(self, optimizer: Optimizer) -> None:
        """All are as they should be, whatever was written to them."""
        for param, entry in self._there(optimizer):
            self._versions[entry] = version_of(param)

    def _there(self, optimizer: Optimizer) -> list[tuple[Tensor, Entry]]:
        """Those that the optimizer still has, wherever: its groups may have been edited since."""
        if not self._versions:
            return []
        params = {id(param): param for group in optimizer.param_groups for param in group["params"]}
        found = ((params.get(entry.identity), entry) for entry in self._versions)
        return [(param, entry) for param, entry in found if param is not None]
