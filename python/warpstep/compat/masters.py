"""What ``FusedAdam`` keeps of a parameter, and what its steps work on."""

from __future__ import annotations

from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import Tensor

from warpstep.codecs import joined, split
from warpstep.compat.counters import Counters
from warpstep.options import Options, Stepped
from warpstep.recipes import RESIDUAL
from warpstep.rules import ADAMW
from warpstep.shards import own_part
from warpstep.state import describe, is_dense, is_plain, match_layout, same_layout

# What a step reads of a group beside numbers, and Transformer Engine's groups do not have.
OWN_KEYS = ("maximize", "decoupled_weight_decay")
# The moments are two, and nothing in a group but numbers decides what a step is.
FUSED_ADAM = replace(
    ADAMW,
    title="FusedAdam's",
    flags=OWN_KEYS,
    moments=("exp_avg", "exp_avg_sq"),
    optional={},
)
_MASTER = "master_param"  # RESIDUAL's name, whatever kind of master it is
assert _MASTER == RESIDUAL
STATES = ("exp_avg", "exp_avg_sq", _MASTER)


@dataclass(frozen=True)
class Kept:
    """What a FusedAdam keeps of its parameters.

    A parameter that has 16 bits has a float32 master beside it, or the 16 bits of one that are not
    its own. One that has more is its own master: ``master_param`` shares its memory.
    """

    exp_avg_dtype: torch.dtype
    exp_avg_sq_dtype: torch.dtype
    masters: bool
    remainders: bool

    def dtype_of(self, name: str, param: Tensor) -> torch.dtype:
        """The dtype of one of ``STATES``."""
        if name == "exp_avg":
            return self.exp_avg_dtype
        if name == "exp_avg_sq":
            return self.exp_avg_sq_dtype
        if self.has_remainder(param):
            return torch.int16
        return torch.float32 if self.has_own_master(param) else param.dtype

    def has_remainder(self, param: Tensor) -> bool:
        """Whether a parameter's master is in the parameter and 16 bits more."""
        return self.masters and self.remainders and param.dtype == torch.bfloat16

    def has_own_master(self, param: Tensor) -> bool:
        """Whether a parameter has a float32 master, which is stepped in its place."""
        is_short = param.dtype in (torch.bfloat16, torch.float16)
        return self.masters and is_short and not self.has_remainder(param)

    @torch.no_grad()
    def new(self, name: str, param: Tensor) -> Tensor:
        """One of ``STATES`` as it begins."""
        dtype = self.dtype_of(name, param)
        if name != _MASTER or self.has_remainder(param):
            return torch.zeros_like(param, dtype=dtype, requires_grad=False)
        if self.has_own_master(param):
            return torch.empty_like(param, dtype=dtype, requires_grad=False).copy_(param)
        return param.detach()

    @property
    def names(self) -> tuple[str, ...]:
        """Those of ``STATES`` that there are."""
        return STATES if self.masters else STATES[:2]

    def settled(self, param: Tensor, master: Any) -> dict[str, Tensor]:
        """What takes a master's place that somebody else has put into the state; {} if it fits.

        Of a parameter that is its own master, what counts is the parameter.
        """
        if not (self.has_remainder(param) or self.has_own_master(param)):
            is_alias = isinstance(master, Tensor) and _is_same_memory(master, param)
            return {} if is_alias else {_MASTER: param.detach()}
        fits = (
            isinstance(master, Tensor)
            and master.shape == param.shape
            and master.device == param.device
            and (master.is_floating_point() or self.dtype_of(_MASTER, param) == master.dtype)
        )
        if not fits:
            raise RuntimeError(
                f"the state {_MASTER!r} of a parameter that is {describe(param)} is "
                f"{describe(master)}: shape and device must be the same, and it must be a "
                "float32 master" + (" or int16 remainders" if self.has_remainder(param) else "")
            )
        if self.has_remainder(param):  # a float32 master is split by the step
            floats = master.dtype not in (torch.int16, torch.float32)
            return {_MASTER: master.to(torch.float32)} if floats else {}
        master = master if master.dtype == torch.float32 else master.to(torch.float32)
        if is_plain(master) and is_dense(param) and not same_layout(master, param):
            return {_MASTER: match_layout(param, master)}
        return {_MASTER: master}

    @torch.no_grad()
    def loaded(self, name: str, param: Tensor, value: Any) -> Tensor:
        """A saved state, in a tensor of one's own as a step needs it.

        A float32 master of a parameter with a remainder stays one until the step. That of a
        parameter that is its own master is the parameter, and nothing is written to it.

        Raises ValueError where it does not fit.
        """
        if not isinstance(value, Tensor):
            raise ValueError(f"{name} is {value!r}, expected a tensor")
        part = self._converted(name, param, value)
        if name == _MASTER and not (self.has_remainder(param) or self.has_own_master(param)):
            return param.detach()
        dtype = part.dtype if name == _MASTER else self.dtype_of(name, param)
        new = torch.empty_like(param, dtype=dtype, requires_grad=False)
        own_part(new).copy_(part)
        return new

    @torch.no_grad()
    def write(self, name: str, param: Tensor, state: Tensor, value: Tensor) -> None:
        """Writes numbers into a state; of a master, what of it is in the parameter there, too.

        Raises ValueError where they do not fit.
        """
        part = self._converted(name, param, value)
        if name == _MASTER and self.has_remainder(param) and part.dtype != torch.int16:
            high, part = split(part)
            own_part(param.detach()).copy_(high)
        own_part(state).copy_(part)

    def _converted(self, name: str, param: Tensor, value: Tensor) -> Tensor:
        """This process's part of a state in float32, or int16 where that is a remainder."""
        part, own = own_part(value.detach()), own_part(param.detach())
        if part.shape != own.shape:
            raise ValueError(
                f"{name} is {describe(value)}, the parameter {describe(param)}: the shape must be "
                "the same"
            )
        is_remainder = name == _MASTER and value.dtype == torch.int16
        if not (is_remainder or value.is_floating_point()):
            raise ValueError(
                f"{name} is {describe(value)}: expected float32"
                + (", or the int16 of store_param_remainders" if name == _MASTER else "")
            )
        part = part.to(own.device)
        if not is_remainder:
            return part.to(torch.promote_types(param.dtype, torch.float32))
        if param.dtype != torch.bfloat16:
            raise ValueError(
                f"{name} is int16, what store_param_remainders keeps of bfloat16 parameters, and "
                f"the parameter is {describe(param)}"
            )
        return part if self.has_remainder(param) else joined(own, part)


def _is_same_memory(a: Tensor, b: Tensor) -> bool:
    a, b = own_part(a), own_part(b)
    same = (a.dtype, a.shape, a.stride()) == (b.dtype, b.shape, b.stride())
    return same and is_plain(a) and is_plain(b) and a.data_ptr() == b.data_ptr()


@dataclass(frozen=True)
class FusedOptions(Options):
    """What a FusedAdam asks of its plans."""

    kept: Kept | None = None
    counts: Counters = field(default_factory=lambda: Counters([]))
    capturable: bool = False
    begins_all: bool = True
    watches_masters: bool = False

    @torch.no_grad()
    def stepped(self, param: Tensor, state: dict[str, Any], group: dict[str, Any]) -> Stepped:
        """As `Options.stepped`: a float32 master in its parameter's place."""
        kept = self.kept
        assert kept is not None
        if _MASTER in state and not kept.masters:
            raise RuntimeError(
                f"the state of a parameter that is {describe(param)} has {_MASTER!r}, and "
                "master_weights is False: a step would leave it behind. Remove it, or set "
                "master_weights."
            )
        has_moments = any(state.get(name) is not None for name in STATES[:2])
        new: dict[str, Any] = {
            name: kept.new(name, param)
            for name in kept.names
            if state.get(name) is None and (name == _MASTER or not has_moments)
        }
        if state.get(_MASTER) is not None:
            new |= kept.settled(param, state[_MASTER])
        found = {**state, **new, "step": self.counters[param]}
        own: dict[str, Any] = {"master": None, "capturable": self.capturable}
        stepped, copy = param, None
        if kept.has_remainder(param):
            own["master"] = "residual"
        elif kept.has_own_master(param):
            stepped, copy = found.pop(_MASTER), param
        else:
            found.pop(_MASTER, None)
        return Stepped(stepped, found, {**group, **own}, copy, new)
