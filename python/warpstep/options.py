"""What an optimizer asks of its plans."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, NamedTuple

from torch import Tensor

from warpstep.precision import Precision
from warpstep.rules import Rule


class Stepped(NamedTuple):
    """What a step works on for one parameter."""

    param: Tensor  # the parameter, or a master in its place, whose copy it is then
    state: dict[str, Any]
    group: dict[str, Any]
    copy: Tensor | None
    new_state: dict[str, Any]  # what of the state is new: to be added to the optimizer's


@dataclass(frozen=True)
class Options:
    """What an optimizer asks of its plans: see its class."""

    rule: Rule
    backend: str = "auto"
    precision: Precision = field(default_factory=Precision)
    copies: Mapping[Tensor, Tensor] = field(default_factory=dict)  # by parameter
    counters: Mapping[Tensor, Tensor] = field(default_factory=dict)  # those that are in no state
    grad_name: str = "grad"  # the attribute of parameters that is their gradient
    watches_masters: bool = True  # what is written to a parameter with a residual counts
    begins_all: bool = False  # also parameters without a gradient get a state
    # Which writes are counted, and what a skipped step leaves in the gradients: torch's fused way.
    as_fused: bool = False

    def grad_of(self, param: Tensor) -> Tensor | None:
        """A parameter's gradient."""
        grad: Tensor | None = getattr(param, self.grad_name, None)
        return grad

    def stepped(self, param: Tensor, state: dict[str, Any], group: dict[str, Any]) -> Stepped:
        """What is stepped for a parameter. Changes nothing."""
        return Stepped(param, state, group, self.copies.get(param), {})

    def is_of_dtypes(self, group: dict[str, Any]) -> bool:
        """Whether dtypes alone tell how a group's parameters are stored."""
        return not (group.get("master") or self.copies) and self.precision.is_of_dtypes
