"""Gradients that a clipping has measured: remembered, and compared with what the step finds."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import NoReturn, Protocol

from torch import Tensor
from torch.optim.optimizer import Optimizer

from warpstep.shards import own_part
from warpstep.state import is_plain
from warpstep.tail import Tail


class RemembersGrads(Protocol):
    """A plan, as a clipping needs it."""

    def compare_grads(self) -> tuple[int, int]:
        """How many of the gradients remembered are kept; and of those, how many unwritten."""

    def forget_grads(self) -> None:
        """Lets go of the gradients remembered."""


@dataclass
class Clipping:
    """What all clippings since the last step make together, for the next step to apply.

    It holds for the gradients that were measured, as they were: see ``still_holds``.
    """

    coef: Tensor  # float64, one number: the gradients are to be multiplied by it
    grad_scale: Tensor | None  # that the gradients still carry
    plan: RemembersGrads  # those that kernels step
    others: list[RememberedGrad]
    measured: int  # gradients remembered, by the plan and here

    def compare(self) -> tuple[int, int]:
        """How many of the gradients measured are still there; and of those, how many unwritten."""
        kept, unwritten = self.plan.compare_grads()
        for other in self.others:
            kept += other.is_kept()
            unwritten += other.is_kept() and other.is_unwritten()
        return kept, unwritten

    def still_holds(self) -> bool:
        """Whether the gradients are those that were measured; False if they were all replaced.

        Raises RuntimeError where some are and some are not, or where one was written to: what was
        measured is then no longer there, and what is there was not measured.
        """
        kept, unwritten = self.compare()
        if kept > 0 and unwritten < self.measured:
            self.raise_changed(self.measured)
        return kept > 0

    def raise_changed(self, grads_now: int) -> NoReturn:
        """Raises RuntimeError: the gradients, ``grads_now`` of them, are not what was measured."""
        kept, unwritten = self.compare()
        raise RuntimeError(
            f"gradients changed after clip_grad_norm_(): of the {self.measured} that were "
            f"measured, {self.measured - kept} were replaced and {kept - unwritten} written to, "
            f"and there are {grads_now} now. Clip right before the step, after everything else "
            "that writes gradients; or forget the clipping with zero_grad()."
        )

    def added_to(self, tail: Tail, optimizer: Optimizer) -> Tail:
        """The step's tail with this clipping in it.

        Raises RuntimeError where the step is told of a scale that the clipping knew nothing of.
        """
        if self.grad_scale is None and tail.grad_scale is not None:
            for name in ("grad_scale", "found_inf"):  # which GradScaler leaves after an exception
                vars(optimizer).pop(name, None)
            raise RuntimeError(
                "clip_grad_norm_() has clipped gradients that are scaled by a GradScaler, to a "
                "norm that is meant for unscaled ones: their step would be too small by the "
                "scale. Pass scaler= to clip_grad_norm_(), or call scaler.unscale_(optimizer) "
                "before it. No parameter has been changed; zero_grad() forgets the clipping."
            )
        scale = tail.grad_scale if self.grad_scale is None else self.grad_scale
        return replace(tail, grad_scale=scale, clip_coef=self.coef, measured_grads=self.measured)


@dataclass(frozen=True, eq=False)
class RememberedGrad:
    """A gradient that no native plan looks at, as it was."""

    param: Tensor
    grad: Tensor
    name: str  # the attribute of the parameter that it is
    version: int
    address: int

    @classmethod
    def of(cls, param: Tensor, grad: Tensor, name: str) -> RememberedGrad:
        """``param``'s gradient, as it is now."""
        return cls(param, grad, name, *_version_and_address(grad))

    def is_kept(self) -> bool:
        """Whether it is its parameter's gradient still."""
        return getattr(self.param, self.name, None) is self.grad

    def is_unwritten(self) -> bool:
        """Whether neither its version counter nor its memory is another since."""
        return _version_and_address(self.grad) == (self.version, self.address)


def _version_and_address(grad: Tensor) -> tuple[int, int]:
    own = own_part(grad)
    version = 0 if grad.is_inference() else grad._version  # which has no counter
    return version, own.data_ptr() if is_plain(own) else 0
