"""What a rule is: the update of a parameter, and what it has in groups and states."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import torch
from torch import Tensor

Numbers = tuple[Tensor, ...]  # scalars in float64, in the order of Rule.numbers
Constants = tuple[Any, ...]  # of one rule: scalar tensors, or floats


class Number(NamedTuple):
    """A number that a group has: a value of its own, or one of a pair."""

    key: str
    label: str  # in messages
    which: int | None = None  # of the pair, 0 or 1
    is_flag: bool = False  # whether it is true or false

    @property
    def name(self) -> str:
        """``betas[0]``, for messages."""
        return self.key if self.which is None else f"{self.key}[{self.which}]"

    def of(self, group: dict[str, Any]) -> Any:
        """The number that a group has."""
        return group[self.key] if self.which is None else group[self.key][self.which]


LR, WEIGHT_DECAY = Number("lr", "learning rate"), Number("weight_decay", "weight_decay value")


@dataclass(frozen=True)
class Rule:
    """One rule. A class of its own has the formula, in plain PyTorch.

    Attributes:
        name: as the kernels call it (``RuleId`` in kernels/layout.h).
        title: whose state dicts it takes, in messages.
        numbers: what a step reads of a group; ``lr`` and ``weight_decay`` come first, and the order
            is that of ``Hyper::numbers`` there.
        flags: what is true or false in a group.
        moments: what a state has of each parameter beside ``step`` and ``ema``, in kernels' order.
        optional: for moments that there are not always, the key of the group that decides.
        squares: which of them are never negative, and decay slowly: rounded at random in 16 bits.
        counted_for: the keys of a group with which the rule counts steps, where none of them is
            zero; None where it always does.
        is_whole: whether a state that has anything of it has all.
        takes_sparse: whether torch's optimizer steps sparse gradients.
    """

    name: str
    title: str
    numbers: tuple[Number, ...]
    flags: tuple[str, ...]
    moments: tuple[str, ...]
    optional: Mapping[str, str] = field(default_factory=dict, hash=False)
    squares: frozenset[str] = frozenset()
    counted_for: tuple[str, ...] | None = None
    is_whole: bool = True
    takes_sparse: bool = False

    def moments_of(self, group: dict[str, Any]) -> tuple[str, ...]:
        """The moments of a group's parameters."""
        return tuple(
            key for key in self.moments if key not in self.optional or group.get(self.optional[key])
        )

    def needs_count(self, group: dict[str, Any]) -> bool:
        """Whether the update depends on how many steps there were since the moments began."""
        return self.counted_for is None or all(group.get(key) for key in self.counted_for)

    def counts_steps(self, group: dict[str, Any]) -> bool:
        """Whether a group's parameters have step counters."""
        return self.needs_count(group) or group.get("ema_decay") is not None

    def has_state(self, group: dict[str, Any]) -> bool:
        """Whether a group's parameters have any."""
        return bool(self.moments_of(group)) or self.counts_steps(group)

    def switches(self) -> list[str]:
        """The keys of a group whose truth decides what its parameters have in their state."""
        return sorted({*self.optional.values(), *(self.counted_for or ())})

    def constants(self, numbers: Numbers, t: Tensor, compute: torch.dtype) -> Constants:
        """What `update` needs, in float64, at step ``t`` (counted from 1)."""
        raise NotImplementedError

    def update(self, c: Any, grad: Tensor, moments: dict[str, Tensor]) -> Tensor:
        """What is taken from the parameter beside the decay; ``moments`` get their new values."""
        raise NotImplementedError
